"""Parts of error messages that several modules share."""

from pathlib import Path


def first_sentence(error: BaseException) -> str:
    """What a library's error says, on one line: its first sentence, at most 200 characters."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200] or type(error).__name__


def make_again(path: str | Path) -> str:
    """The advice for a file that does not belong to this run."""
    return f"Make it again: snakemake --cores 2 --force {path}"
