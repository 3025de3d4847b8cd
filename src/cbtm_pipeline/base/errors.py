"""Parts of error messages that several modules share."""

from pathlib import Path


def first_sentence(error: BaseException) -> str:
    """The first sentence of a library's error, at most 200 characters; the error's type if it has no text."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200] or type(error).__name__


def make_again(path: str | Path) -> str:
    """The advice for a file that does not belong to this run."""
    return f"Make it again: snakemake --cores 2 --force {path}"
