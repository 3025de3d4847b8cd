"""Finds and checks the tokens that an expert trains on, and the tokens that validate its training.

| data       | manifest                  | tokens                                     |
|------------|---------------------------|--------------------------------------------|
| `corpus`   | shards/manifest.json      | every training shard: the seed and dense   |
| `clusters` | assignments/manifest.json | group i of every file: expert i            |
| `random`   | random/manifest.json      | group i of every file: expert random-i     |
"""

from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import heldout, shard_files, token_files
from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.training import batches


class Data(NamedTuple):
    """The tokens that an expert reads, and where they come from.

    `made_from` goes into the expert's card; `corpus` is the identity of shards/manifest.json.
    """

    stream: batches.Stream
    validation: batches.Stream | None
    manifest: dict[str, Any]
    made_from: dict[str, str]
    corpus: str


def read(path: Path, plan: TrainingPlan) -> Data:
    """Map the tokens of an expert. `path` is the manifest that belongs to `plan.data`.

    Raises ValueError if a file is not the one that the manifest names.
    """
    manifest = artifact.read_json(path, "shards" if plan.data == "corpus" else "assignments")
    if plan.data != "corpus" and ("clusterer" in manifest["made_from"]) != (plan.data == "clusters"):
        expected = {"clusters": "assignments/manifest.json", "random": "random/manifest.json"}[plan.data]
        raise ValueError(f"{path}: other clusters. Expected {plan.data}. Give {expected}.")
    segments = []
    for entry in manifest["shards"]:
        if entry.get("split") == "eval":
            continue
        file = path.with_name(f"{entry['name']}.arrow")
        if token_files.read_meta(file)["made_from"] != manifest["made_from"]:
            raise ValueError(
                f"{file}: made from something else than its manifest. Expected both from one run. "
                f"Make {path} again."
            )
        segments.append(token_files.read(file, plan.group).values)
    stream = batches.Stream(segments)
    if plan.data == "corpus":
        expected = sum(s["n_tokens"] + s["n_documents"] for s in manifest["shards"] if s["split"] == "train")
    else:
        expected = manifest["n_tokens"][plan.group] + manifest["n_documents"][plan.group]
    if stream.n_tokens != expected:
        raise ValueError(
            f"{path}: {stream.n_tokens} tokens in its files. Expected {expected}. Make {path} again."
        )
    identity = artifact.identity(path)
    name = {"corpus": "shards", "clusters": "assignments", "random": "random"}[plan.data]
    corpus = identity if plan.data == "corpus" else manifest["made_from"]["shards"]
    return Data(stream, read_validation(path, manifest, plan), manifest, {name: identity}, corpus)


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
        file = path.with_name(heldout.VALIDATION_FILE)
        shard_files.check_file(file, manifest["identity_validation"], "assign")
        segments = [token_files.read(file, plan.group).values]
    return batches.Stream(segments) if any(len(segment) for segment in segments) else None
