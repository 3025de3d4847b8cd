"""What each rule's artifact is made from: the identities of its inputs, kept in its record as `made_from`.

The rules write these, and a start of the workflow compares them (`stale.py`). Identity is content: neither
the path nor the time of a file counts. An artifact's identity is its seal (base/artifact.py). Where a rule
reads only a part, the identity is of that part:

| part                                             | read by                         |
|--------------------------------------------------|---------------------------------|
| training documents: `identity_train` of shards   | embed, assign, assign_random    |
| held-out documents: `identity_eval` of shards    | score_expert, route, assign     |
| tokens of one expert, from all files             | train_expert                    |
| labels of the documents, if they are read        | fit_kmeans, assign, eval_ensemble |
| weights and configuration: `identity` of a card  | train_expert, score_expert      |

So new held-out text trains nothing again, and a new clustering trains only the experts whose documents it
changes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cbtm_pipeline.base import artifact
from cbtm_pipeline.plan import TrainingPlan

Record = Mapping[str, Any]  # the meta record of an artifact, with its seal
Identities = dict[str, str]
CONFIG = "config.json"  # of an ensemble
TEXTS = ("README.md", "card.json", "top_terms.json")  # files of an ensemble that compute nothing


def embed(shards: Record) -> Identities:
    """Of embed/embedder.npz. That of embed/manifest.json names the embedder, too."""
    return {"shards": shards["identity_train"]}


def vectors(shards: Record, embedder: Record) -> Identities:
    """Of embed/manifest.json."""
    return {"shards": shards["identity_train"], "embedder": embedder["seal"]}


def fit_kmeans(vectors: Record, shards: Record | None = None) -> Identities:
    """Of cluster/clusterer.npz. `shards`: where labels are read."""
    of_labels = labels(shards, "train") if shards else {}
    return {"vectors": vectors["seal"], "embedder": vectors["made_from"]["embedder"], **of_labels}


def assign(shards: Record, clusterer: Record) -> Identities:
    """Of assignments/manifest.json. The validation documents are held-out documents."""
    return {**assign_random(shards), "clusterer": clusterer["seal"], **labels(shards, "train")}


def assign_random(shards: Record) -> Identities:
    """Of random/manifest.json. Trainings compare its tokenizer with their own."""
    tokenizer = shards["made_from"]["tokenizer"]
    return {"shards": shards["identity_train"], "held_out": shards["identity_eval"], "tokenizer": tokenizer}


def score_training(card: Record, shards: Record) -> Identities:
    """Of second/scores/<expert>.npz."""
    return {"expert": card["identity"], "shards": shards["identity_train"]}


def second_clusterer(vectors: Record, first: Record, scores: Mapping[str, Record]) -> Identities:
    """Of second/clusterer.npz. `first`: the manifest of the first round; its held-out text does not count."""
    scored = {f"scores-{name}": record["seal"] for name, record in scores.items()}
    return {**fit_kmeans(vectors), "first": artifact.fingerprint(first["identity_groups"]), **scored}


def second_round(shards: Record, clusterer: Record) -> Identities:
    """Of second/manifest.json. It names what its clusterer, which lies beside it, was made from, too."""
    return {**assign(shards, clusterer), **clusterer["made_from"]}


def labels(shards: Record, split: str) -> Identities:
    """The labels of the `train` or `eval` documents, for rules that read them. Nothing if there are none."""
    from cbtm_pipeline.corpus import (
        shard_files,
    )  # only here: it imports pyarrow

    identity = shard_files.identity_labels([entry for entry in shards["shards"] if entry["split"] == split])
    return {"labels": identity} if identity else {}


def tokens(groups: Sequence[int], data: Record) -> str:
    """Identity of the tokens that a training reads: some groups of the files that `data` lists."""
    if data["kind"] == "assignments":
        return _of_groups(groups, data["identity_groups"])
    entries = [entry for entry in data["shards"] if entry["split"] == "train"]
    return artifact.fingerprint([entry["identity_groups"][0] for entry in entries])


def _of_groups(groups: Sequence[int], identities: Sequence[str]) -> str:
    found = [identities[j] for j in groups]
    return found[0] if len(found) == 1 else artifact.fingerprint(found)


def validation(plan: TrainingPlan, data: Record) -> str | None:
    """Identity of the tokens that validate a training; None if it has none."""
    if not plan.validations or not plan.validation_share:
        return None
    if plan.data == "corpus":
        return artifact.fingerprint([data["identity_eval"], plan.validation_share, plan.rng_seed])
    identities = data["identity_validation"]
    return _of_groups(plan.groups, identities) if identities else None


def train_expert(plan: TrainingPlan, data: Record, tokenizer: Record, seed: Record | None) -> Identities:
    """Of an expert's card. `seed` is the card of the model that it begins as; None without one.

    The validation text is left out where it decides nothing. A training with `patience` depends on it, and a
    candidate, because its validation loss decides about the learning rate.
    """
    found = {"tokens": tokens(plan.groups, data), "tokenizer": tokenizer["identity"]}
    if seed is not None:
        found["seed"] = seed["identity"]
    if (plan.patience is not None or plan.candidate) and (identity := validation(plan, data)):
        found["validation"] = identity
    return found


def choose(cards: Mapping[str, Record]) -> Identities:
    """Of search/<kind>.json. `cards` are those of the candidates, by id."""
    return {name: card["seal"] for name, card in cards.items()}


def score_expert(card: Record, shards: Record) -> Identities:
    """Of scores/<expert>.npz."""
    return {"expert": card["identity"], "held_out": shards["identity_eval"]}


def route(shards: Record, clusterer: Record) -> Identities:
    """Of route/distances.npz."""
    return {
        "held_out": shards["identity_eval"],
        "embedder": clusterer["made_from"]["embedder"],
        "clusterer": clusterer["seal"],
    }


def route_by_ensemble(shards: Record, ensemble: Record) -> Identities:
    """Of distances to the centres of an ensemble's folder."""
    return {"held_out": shards["identity_eval"], "ensemble": ensemble["seal"]}


def eval_ensemble(
    distances: Record,
    scores: Mapping[str, Record],
    choices: Mapping[str, Record] | None = None,
    shards: Record | None = None,
) -> Identities:
    """Of eval/metrics.json. `scores` are the records by expert, `choices` those of searched rates by kind.

    `shards`: where labels are read.
    """
    chosen = {f"choice-{kind}": record["seal"] for kind, record in (choices or {}).items()}
    scored = {f"scores-{name}": record["seal"] for name, record in scores.items()}
    of_labels = [labels(shards, split) for split in ("train", "eval")] if shards else None
    labelled = {"labels": artifact.fingerprint(of_labels)} if of_labels else {}
    return {"distances": distances["seal"], **scored, **chosen, **labelled}


def ensemble(
    metrics: Record, clusterer: Record, top_terms: Record, tokenizer: Record, cards: Mapping[str, Record]
) -> Identities:
    """Of ensemble/files.json. `cards` are those of the cluster experts, by expert."""
    return {
        "metrics": metrics["seal"],
        "clusterer": clusterer["seal"],
        "embedder": clusterer["made_from"]["embedder"],
        "top_terms": top_terms["seal"],
        "tokenizer": tokenizer["identity"],
        **{f"expert-{name}": card["identity"] for name, card in cards.items()},
    }


def eval_task(model: Record, tasks: Identities) -> Identities:
    """Of eval/tasks/<model>.json. `model` is the card of an expert, or the record of the ensemble.

    `tasks` are the identities of task files. What an ensemble says does not depend on texts about it.
    """
    if model["kind"] == "expert":
        return {"model": model["identity"], **tasks}
    return {"model": model["computes"], **tasks}


def computes(config: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The identity of what an ensemble says: of its config but the tags, and of all files but texts about it.

    `files`: the hashes of the files of its folder.
    """
    about = {key: value for key, value in config.items() if key != "tags"}
    kept = {name: h for name, h in files.items() if name != CONFIG and not name.endswith(TEXTS)}
    return artifact.fingerprint({"config": about, "files": kept})


def tasks_table(results: Mapping[str, Record]) -> Identities:
    """Of eval/tasks.json. `results` are the records of eval_task by model."""
    return {f"tasks-{name}": record["seal"] for name, record in results.items()}


def report(
    metrics: Record,
    top_terms: Record,
    assignments: Record,
    shards: Record,
    others: Mapping[str, Record],
    tasks: Record | None = None,
) -> Identities:
    """Of report.html. `others`: further records by job, whose plans the page shows."""
    named = {"metrics": metrics, "top_terms": top_terms, "assignments": assignments, "shards": shards}
    named |= {"tasks": tasks} if tasks else {}
    plans = {job: record["made_with"] for job, record in others.items()}
    return {**{name: record["seal"] for name, record in named.items()}, "plans": artifact.fingerprint(plans)}
