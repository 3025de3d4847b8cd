"""The checks of `cbtm doctor` that read tokenizer, seed model and text as the rules will.

So what a rule would refuse after hours is refused before anything is computed, in the same words.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cbtm_pipeline import plan
from cbtm_pipeline.base import hub
from cbtm_pipeline.config import Config
from cbtm_pipeline.corpus import blocks, encoding, heldout, rows
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus.records import Fields
from cbtm_pipeline.ops.facts import Facts, Tokens
from cbtm_pipeline.ops.finding import Line
from cbtm_pipeline.ops.run_checks import Pretrained, pretrained

LOOKED_BYTES = 1 << 28  # of corpus files, at most: enough unless hardly anything is held out
_PART_BYTES = 1 << 20


def check_tokenizer(f: Facts) -> Iterator[Line]:
    """Whether the rule `tokenizer` can use the tokenizer, where that is pretrained and here."""
    source = pretrained(f.config)[1] if f.config else None
    if f.config is None or source is None or hub.lacks_tokenizer(source.folder):
        return
    f.tokens = _tokens(f.config, source)
    yield "ok", f"tokenizer: {f.tokens.vocab_size} tokens, documents are separated by {f.tokens.separator_id}"


def _tokens(config: Config, source: Pretrained) -> Tokens:
    """Load a tokenizer. Raises ValueError as the rule `tokenizer` does."""
    from cbtm_pipeline.corpus import pretrained_tokenizer

    assert source.folder is not None
    key = "tokenizer.pretrained" if config.tokenizer.pretrained else "model.pretrained"
    found = pretrained_tokenizer.load(key, source.name, source.folder)
    separator_id = pretrained_tokenizer.separators(found)[0]
    n_ids = encoding.n_ids(found.backend_tokenizer, separator_id)
    return Tokens(pretrained_tokenizer.vocab_size(found), separator_id, n_ids)


def check_seed(f: Facts) -> Iterator[Line]:
    """Whether the seed model can be loaded, fits the tokenizer, runs, is causal and can be trained."""
    if f.config is None or f.model is None:  # it is not here, or check_model has refused it
        return
    from cbtm_pipeline.training import examine  # imports torch

    source, seq_len, only = pretrained(f.config)[0], f.config.train.seq_len, f.config.train.only
    if pretrained(f.config)[1] and f.tokens is None:
        return  # its tokenizer is not here, or is none
    if source is None:
        vocab_size = f.tokens.vocab_size if f.tokens else f.config.tokenizer.vocab_size
        separator_id = f.tokens.separator_id if f.tokens else 0
        examine.scratch(plan.scratch(f.config), vocab_size, separator_id, seq_len, only)
        return
    if f.tokens is None or source.folder is None or hub.lacks_weights(source.folder):
        return
    is_whole = examine.pretrained(source.folder, source.name, f.tokens.n_ids, seq_len, only)
    found = "runs" if is_whole else "has its weights, but is too large to be run here"
    yield "ok", f"seed: {source.name} {found}"


def check_held_out(f: Facts) -> Iterator[Line]:
    """Whether enough documents will be held out for a result. Reads the corpus until there are."""
    if f.config is None or corpus_files.DEMO in [*f.config.corpus.train, *(f.config.corpus.eval or [])]:
        return
    share = f.config.route.calibration_share
    enough = next(n for n in range(2, 10_000) if heldout.warning(n, share) is None)
    seen = _look(f.config, enough)
    if not seen.n_held_out + seen.n_train and seen.reason:
        yield (
            "FAIL",
            f"corpus: no row can be used: {seen.reason}. Expected documents. Mend them or correct corpus",
        )
    elif seen.is_all:
        heldout.check_enough(seen.n_held_out)
        if not seen.n_train:
            yield "FAIL", "corpus: no document is left to train on. Expected some. Add some to corpus.train"
    few = heldout.warning(seen.n_held_out, share) if seen.n_held_out >= heldout.MIN_DOCUMENTS else None
    if seen.is_all and few:
        yield "warn", few
    elif not seen.is_all and seen.n_held_out < enough:
        what = f"{seen.n_held_out} of the first {seen.n_held_out + seen.n_train} documents are held out"
        yield "warn", f"corpus: {what}. Expected {enough} or more in all. Raise corpus.eval_fraction"


class Seen(NamedTuple):
    """How many documents were found, why the first bad row is bad, and whether the whole corpus was read."""

    n_held_out: int
    n_train: int
    reason: str
    is_all: bool


def _look(config: Config, enough: int) -> Seen:
    """Read the corpus, until `enough` documents are held out and one is not."""
    c = config.corpus
    fields = Fields(c.text_field, c.id_field)
    n, reason, ids, n_read = {"eval": 0, "train": 0}, "", set(), 0
    sources = [("eval", c.eval or [], 2.0), ("train", c.train, 0.0 if c.eval else c.eval_fraction)]
    for split, patterns, fraction in sources:
        files = corpus_files.name(corpus_files.input_files(patterns, None, Path(config.outdir)))
        for part in blocks.parts(files, _PART_BYTES, fields, c.txt_documents):
            for row in rows.read(part, fields):
                if isinstance(row, rows.BadRow):
                    reason = reason or row.reason
                elif row.id not in ids:
                    ids.add(row.id)
                    n["eval" if rows.uniform(rows.text_hash(row.text)) < fraction else "train"] += 1
            n_read += part.n_read
            if n["eval"] >= enough and (split == "eval" or n["train"]):
                break
            if n_read > LOOKED_BYTES:
                return Seen(n["eval"], n["train"], reason, False)
    return Seen(n["eval"], n["train"], reason, True)
