"""The check of `cbtm doctor` that reads labels: whether rows have them, and enough for the clusters."""

from collections.abc import Iterator
from pathlib import Path

from cbtm_pipeline.config import Config
from cbtm_pipeline.corpus import blocks, labels, rows
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus.demo_sources import DOMAINS
from cbtm_pipeline.corpus.records import Fields
from cbtm_pipeline.ops.facts import Facts
from cbtm_pipeline.ops.finding import Line

LOOKED_BYTES = 1 << 28  # of corpus files, at most
_PART_BYTES = 1 << 20


def check_labels(f: Facts) -> Iterator[Line]:
    """Whether training documents have labels, and as many as clusters that follow them. Reads no further.

    Raises ValueError as the rules `shard` and `fit_kmeans` do.
    """
    if f.config is None or f.config.corpus.label_field is None:
        return
    field, cluster = f.config.corpus.label_field, f.config.cluster
    if corpus_files.DEMO in f.config.corpus.train and field in ("id", "text"):
        return  # as many values as documents
    needed = cluster.k if cluster.by == "label" else 1
    found, is_all = _look(f.config, needed)
    if len(found) >= needed:
        yield "ok", f"labels: {field} has {len(found)} values or more"
    elif not is_all:
        yield (
            "warn",
            f"corpus.label_field: {field} has {len(found)} values in the first {LOOKED_BYTES >> 20} MB. "
            f"Expected {needed} or more in all. Check corpus.label_field and cluster.k",
        )
    elif not found:
        yield "FAIL", labels.missing(field)
    else:
        from cbtm_pipeline.clustering import labelled  # only here: it imports torch

        labelled.check(len(found), needed)


def _look(config: Config, needed: int) -> tuple[set[str], bool]:
    """The labels of the corpus until `needed` are found, and whether all of it was read.

    Those of the demo are known before it is made.
    """
    c, n_read = config.corpus, 0
    has_demo = corpus_files.DEMO in c.train
    found = set(DOMAINS) if has_demo and c.label_field == "domain" else set[str]()
    fields = Fields(c.text_field, c.id_field, c.label_field)
    patterns = [pattern for pattern in c.train if pattern != corpus_files.DEMO]
    files = corpus_files.name(corpus_files.input_files(patterns, None, Path(config.outdir)))
    for part in blocks.parts(files, _PART_BYTES, fields, c.txt_documents):
        found |= {row.label for row in rows.read(part, fields) if isinstance(row, rows.Document)} - {""}
        n_read += part.n_read
        if len(found) >= needed or n_read > LOOKED_BYTES:
            return found, False
    return found, True
