"""Finds and checks the tokens that an expert trains on, and the tokens that validate its training.

| data       | manifest                  | tokens                                     |
|------------|---------------------------|--------------------------------------------|
| `corpus`   | shards/manifest.json      | every training shard: the seed and dense   |
| `clusters` | assignments/manifest.json | group i of every file: expert i            |
| `parents`  | assignments/manifest.json | groups of the experts that begin as it: parent-i |
| `first`    | assignments/manifest.json | group i of every file: expert first-i      |
| `random`   | random/manifest.json      | group i of every file: expert random-i     |

With cluster.second_round, expert i reads group i of the files of second/manifest.json.
"""

from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import heldout, token_files
from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.training import batches


class Data(NamedTuple):
    """The tokens that an expert reads. `manifest` is the record that lists their files."""

    stream: batches.Stream
    validation: batches.Stream | None
    manifest: dict[str, Any]


def read(path: Path, plan: TrainingPlan) -> Data:
    """Map the tokens of an expert. `path` is the manifest that belongs to `plan.data`.

    Raises ValueError if a file is not the one that the manifest names.
    """
    manifest = artifact.read_sealed(path, "shards" if plan.data == "corpus" else "assignments")
    if plan.data != "corpus" and ("clusterer" in manifest["made_from"]) != (plan.data != "random"):
        expected = "random/manifest.json" if plan.data == "random" else "assignments/manifest.json"
        raise ValueError(f"{path}: other clusters. Expected {plan.data}. Give {expected}.")
    segments = []
    for entry in manifest["shards"]:
        file = path.with_name(f"{entry['name']}.arrow")
        if plan.data == "corpus":
            identities = entry["identity_groups"] if entry["split"] == "train" else None
        else:
            identities = token_files.read_identities(file, entry["identity"])
        if identities is not None:
            segments += [token_files.read(file, j, identities[j]).values for j in plan.groups]
    return Data(batches.Stream(segments), read_validation(path, manifest, plan), manifest)


def read_validation(path: Path, manifest: dict[str, Any], plan: TrainingPlan) -> batches.Stream | None:
    """The tokens that validate a training; None if the plan asks for none, or the cluster has none.

    `path` and `manifest` are those of the training's data. Raises ValueError if a file is not the one that
    the manifest names.
    """
    if not plan.validations or not plan.validation_share:
        return None
    if plan.data == "corpus":
        selection = heldout.select_validation(path, manifest, plan.validation_share, plan.rng_seed)
        segments = [documents.values for documents in heldout.read_validation(path, selection)]
    elif manifest["identity_validation"] is None:
        segments = []
    else:
        file, identities = path.with_name(heldout.VALIDATION_FILE), manifest["identity_validation"]
        segments = [token_files.read(file, j, identities[j]).values for j in plan.groups]
    return batches.Stream(segments) if any(len(segment) for segment in segments) else None
