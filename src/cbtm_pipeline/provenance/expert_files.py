"""The files of a finished expert, and what says that they are as they were published.

card.json identifies the model and holds the hash of the weights. files.json holds those of all other files.
"""

from functools import partial
from pathlib import Path
from typing import Any

from cbtm_pipeline.base import artifact, inside
from cbtm_pipeline.base.errors import make_again

WEIGHTS = "model.safetensors"
FILES = "files.json"
# Besides the weights, the files that the workflow declares: every training writes them. README.md and
# tensorboard/ are for people: if one of them is deleted, nothing may be trained again.
BESIDE = ("card.json", "config.json", FILES, "generation_config.json", "metrics.jsonl")
BESIDE += ("tokenizer.json", "tokenizer_config.json")
STAGING = ".staging"  # where a training writes all files before it moves them; a kill may leave it


def is_read(name: str) -> bool:
    """Whether the pipeline reads this file of an expert. The others are for people, who may edit them."""
    return name != "README.md" and not name.startswith("tensorboard/")


def all_files(folder: Path) -> list[Path]:
    """All files of an expert's folder but those of a training that is under way. The weights come last."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    found = [path for path in found if STAGING not in path.parts]
    return [folder / path for path in sorted(found, key=lambda path: (path.name == WEIGHTS, path))]


def names(folder: Path) -> list[str]:
    """The files of an expert that something reads, but its weights; their list comes first.

    Raises ValueError if the list is damaged.
    """
    path = folder / FILES
    if not path.exists():
        return [FILES]
    found = artifact.read_sealed(path, "expert_files")["files"]
    inside.check(path, found, partial(make_again, path))
    return [FILES, *filter(is_read, found)]


def read_card(weights: Path) -> dict[str, Any]:
    """The card of an expert, whose files are as they were published; those for people are not read.

    Raises ValueError if a file has changed, OSError if one is missing.
    """
    card = artifact.read_sealed(weights.with_name("card.json"), "expert")
    artifact.check_file(weights, card["weights"], partial(make_again, weights))
    beside = partial(make_again, weights.with_name(FILES))
    for name, expected in _hashes(weights, card).items():
        if is_read(name):
            artifact.check_file(weights.parent / name, expected, beside)
    return card


def check_file(path: Path, card: dict[str, Any]) -> None:
    """Raise ValueError unless this file of an expert's folder is as it was published."""
    weights = path.with_name(WEIGHTS)
    advice = partial(make_again, weights.with_name(FILES))
    artifact.check_file(path, _hashes(weights, card)[path.name], advice)


def _hashes(weights: Path, card: dict[str, Any]) -> dict[str, str]:
    """The hashes of all files but the weights, by their path in the folder."""
    path = weights.with_name(FILES)
    record = artifact.read_sealed(path, "expert_files")
    inside.check(path, record["files"], partial(make_again, path))
    artifact.check_made_from(path, record, "expert", card["identity"])
    return record["files"]
