"""Errors about a corpus, for commands that take options where a run has keys of its config."""

from collections.abc import Iterator
from contextlib import contextmanager

OPTIONS = {  # in this order: what stands in an error of a run, and what a command says
    "set corpus.id_field: null": "give --id-field null",
    "corpus.eval_fraction or set corpus.eval": "--eval-fraction or give more documents",
    "corpus.eval_fraction": "--eval-fraction",
    "corpus.max_bad_share": "--max-bad-share",
    "corpus.text_field": "--text-field",
    "corpus.id_field": "--id-field",
    "corpus.txt_documents": "--txt-documents",
    "train.steps": "--steps",
    "Change it in your config.": "Change it.",
}
FILES = ("corpus.train or corpus.eval", "corpus.train", "corpus.eval")


def with_options(text: str, files: str) -> str:
    """An error of a run in the words of a command that calls its documents `files`."""
    for key, option in OPTIONS.items():
        text = text.replace(key, option)
    for key in FILES:
        text = text.replace(key, files)
    return text.replace("corpus: ", f"{files}: ", 1) if text.startswith("corpus: ") else text


@contextmanager
def worded(files: str | None) -> Iterator[None]:
    """Reword each ValueError that comes through; None: leave it as it is."""
    try:
        yield
    except ValueError as error:
        if files is None:
            raise
        raise ValueError(with_options(str(error), files)) from error
