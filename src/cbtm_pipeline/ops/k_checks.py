"""The check of `cbtm doctor` that says whether the training tokens are enough for experts to win.

It quotes docs/which-k.md. A test compares the numbers with the stored metrics of the study.
"""

from collections.abc import Iterator

from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.ops.facts import Facts
from cbtm_pipeline.ops.finding import Line

# training tokens of all experts together, for each parameter of one model
WITHOUT_GAIN = 7.3  # the most with which the study's best ensemble did not beat the strongest dense model
WITH_GAIN = 29.0  # the fewest with which it did


def check_k(f: Facts) -> Iterator[Line]:
    """Whether models from scratch get as many tokens as in the study. Of pretrained seeds nothing is known.

    Nothing is said of the demo, where experts win with fewer: its domains are far apart.
    """
    if f.config is None or f.model is None or f.config.model.pretrained or f.config.cluster.k == 1:
        return
    if f.config.corpus.train == [corpus_files.DEMO]:
        return
    train = f.config.train
    found = train.steps * train.batch_size * train.seq_len / f.model.n_parameters
    about = f"cluster.k: {f.config.cluster.k} experts with {found:.2g} training tokens per parameter"
    if found >= WITH_GAIN:
        yield "ok", f"{about}, all experts together"
    else:
        yield (
            "warn",
            f"{about}, all experts together. Expected {WITH_GAIN:g} or more: with {WITHOUT_GAIN:g}, "
            "ensembles were no better than a dense model in our study (docs/which-k.md). "
            "Raise train.steps, or take a smaller model",
        )
