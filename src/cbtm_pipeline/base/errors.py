"""Parts of error messages that several modules share."""

from pathlib import Path


def first_sentence(error: BaseException) -> str:
    """The first sentence of a library's error, at most 200 characters; the error's type if it has no text."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200] or type(error).__name__


def make_again(path: str | Path) -> str:
    """The advice for a file that does not belong to this run, or to its folder's request."""
    if any((folder / "request.json").is_file() for folder in Path(path).parents[:3]):
        return f"Remove {output_of(path)}, and type the same command again."
    return f"Make it again: snakemake --cores 2 --force {output_of(path)}"


def output_of(path: str | Path) -> Path:
    """The output of the workflow that a file comes with: a record, with a tokenizer or a model beside it."""
    path = Path(path)
    if path.name not in ("card.json", "files.json") or path.parent.name == "ensemble":
        return path
    return path.with_name("tokenizer.json" if path.parent.name == "tokenizer" else "model.safetensors")
