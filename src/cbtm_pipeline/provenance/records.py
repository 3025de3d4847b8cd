"""Where each rule leaves its record: what it made, from what, with which plan. The outdir is its own record.

A record is the meta record of the rule's main artifact (base/artifact.py). Its entry `files` names the other
files that the rule left beside it.
"""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.provenance import expert_files


class Place(NamedTuple):
    """`record` and `outputs` are paths below the outdir; `outputs` are those that the workflow declares."""

    kind: str
    record: str
    outputs: tuple[str, ...]


DAMAGED = (ValueError, OSError, KeyError, TypeError, IndexError)  # what reading a strange record may raise
Read = Callable[..., dict[str, Any]]  # read(rule, expert) gives a record
DOCUMENTS = "eval/documents.parquet"
PLACES = {  # by rule, in the order of the data
    "tokenizer": Place(
        "tokenizer",
        "tokenizer/card.json",
        ("tokenizer/tokenizer.json", "tokenizer/card.json", "tokenizer/tokenizer_config.json"),
    ),
    "shard": Place("shards", "shards/manifest.json", ("shards/manifest.json", "shards/quarantine.jsonl")),
    "embed": Place("vectors", "embed/manifest.json", ("embed/manifest.json", "embed/embedder.npz")),
    "fit_kmeans": Place(
        "clusterer", "cluster/clusterer.npz", ("cluster/clusterer.npz", "cluster/top_terms.json")
    ),
    "assign": Place("assignments", "assignments/manifest.json", ("assignments/manifest.json",)),
    "assign_random": Place("assignments", "random/manifest.json", ("random/manifest.json",)),
    "train_expert": Place(
        "expert",
        "experts/{}/card.json",
        tuple(f"experts/{{}}/{name}" for name in (expert_files.WEIGHTS, *expert_files.BESIDE)),
    ),
    "score_training": Place("training_scores", "second/scores/{}.npz", ("second/scores/{}.npz",)),
    "second_round": Place(
        "assignments",
        "second/manifest.json",
        ("second/manifest.json", "second/clusterer.npz", "second/top_terms.json"),
    ),
    "choose": Place("choice", "search/{}.json", ("search/{}.json",)),
    "score_expert": Place("scores", "scores/{}.npz", ("scores/{}.npz",)),
    "route": Place("distances", "route/distances.npz", ("route/distances.npz",)),
    "eval_ensemble": Place(
        "metrics", "eval/metrics.json", ("eval/metrics.json", "eval/table.txt", DOCUMENTS)
    ),
    "report": Place("report", "report.html", ("report.html",)),
    "ensemble": Place("ensemble", "ensemble/files.json", ("ensemble/files.json",)),
    "eval_task": Place("task_results", "eval/tasks/{}.json", ("eval/tasks/{}.json",)),
    "tasks_table": Place("tasks", "eval/tasks.json", ("eval/tasks.json", "eval/tasks.txt")),
}


# Rules whose plans the report shows, too, besides those of its inputs. The plan is the same for all scores.
SHOWN = {"tokenizer": None, "embed": None, "fit_kmeans": None, "route": None, "score_expert": "seed"}


def rule_of(path: Path) -> str:
    """The rule whose record is at `path`. Raises ValueError if it is that of none."""
    for rule, place in PLACES.items():
        if re.fullmatch(rf"(.*/)?{re.escape(place.record)}".replace(re.escape("{}"), "[^/]+"), str(path)):
            return rule
    known = ", ".join(place.record for place in PLACES.values())
    raise ValueError(f"{path}: no record of a rule. Expected one of {known}. Leave it out.")


def read(outdir: Path, rule: str, expert: str | None = None) -> dict[str, Any]:
    """The record of a rule, or of its job for an expert. Raises OSError if it is missing, ValueError if it is
    damaged.
    """
    place = PLACES[rule]
    path = outdir / place.record.format(expert)
    return read_page(path) if place.kind == "report" else artifact.read_record(path, place.kind)


def missing(outdir: Path, rule: str, expert: str | None, record: dict[str, Any]) -> list[Path]:
    """The files of a rule that are not there."""
    place = PLACES[rule]
    files = [outdir / output.format(expert) for output in place.outputs]
    beside = (outdir / place.record.format(expert)).parent
    there = {path.name for path in beside.iterdir()} if beside.is_dir() else set()
    names = expert_files.names(beside) if place.kind == "expert" else record.get("files", [])
    return [
        *(path for path in files if not path.exists()),
        *(beside / name for name in names if name not in there and not (beside / name).exists()),
    ]


def check_beside(outdir: Path, rule: str, record: dict[str, Any]) -> None:
    """Raise ValueError if an output that lies beside the rule's record is damaged."""
    if rule == "embed":
        read_embedder(outdir)
    elif rule in ("fit_kmeans", "second_round"):
        read_top_terms(outdir, rule)
        if rule == "second_round":
            read_second_clusterer(outdir)
    elif rule == "eval_ensemble":
        for name, path in (("table", outdir / "eval/table.txt"), ("documents", outdir / DOCUMENTS)):
            if artifact.identity(path) != record.get(name):
                raise ValueError(
                    f"{path}: changed since it was written. Expected the one of eval/metrics.json. "
                    f"{make_again(path)}"
                )


def table(outdir: Path) -> str:
    """The table of the results; empty if there is none, or if it is not the one that was written."""
    return _table(outdir, "eval_ensemble")


def tasks_table(outdir: Path) -> str:
    """The table of the tasks, likewise."""
    return _table(outdir, "tasks_table")


def _table(outdir: Path, rule: str) -> str:
    path = outdir / PLACES[rule].outputs[1]
    try:
        whole = read(outdir, rule)["table"] == artifact.identity(path)
    except (OSError, ValueError):
        return ""
    return path.read_text("utf-8") if whole else ""


def with_record(page: str, record: dict[str, Any]) -> str:
    """An HTML page with its record in a `meta` element of its head. The seal covers both."""
    seal = artifact.hash_of(f"{artifact.compact(record)}\n{page}".encode())
    content = html.escape(artifact.compact({**record, "seal": seal}))
    return page.replace("<head>", f'<head><meta name="cbtm" content="{content}">', 1)


def read_page(path: Path) -> dict[str, Any]:
    """The record of an HTML page. Raises ValueError if the page is damaged or has none."""
    advice = make_again(path)
    try:
        text = path.read_bytes().decode()
        found = re.search(r'<head><meta name="cbtm" content="([^"]*)">', text)
        if not found:
            raise ValueError("it has no record")
        meta = artifact.from_compact(html.unescape(found[1]))
        page = f"{text[: found.start()]}<head>{text[found.end() :]}"
        whole = text == with_record(page, {key: v for key, v in meta.items() if key != "seal"})
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}). Expected a report. {advice}") from error
    if not whole:
        raise ValueError(f"{path}: changed since it was written. Expected it to fit its seal. {advice}")
    return artifact.check_meta(path, meta, "report")


def read_embedder(outdir: Path) -> dict[str, Any]:
    """The record of the embedder, an output of `embed` beside its record."""
    return artifact.read_record(outdir / "embed/embedder.npz", "embedder")


def read_top_terms(outdir: Path, rule: str = "fit_kmeans") -> dict[str, Any]:
    """The terms of the clusters, an output of `fit_kmeans` or `second_round` beside its record."""
    path = outdir / PLACES[rule].record
    return artifact.read_record(path.with_name("top_terms.json"), "top_terms")


def read_second_clusterer(outdir: Path) -> dict[str, Any]:
    """The record of the clusterer of the second round, an output of `second_round` beside its record."""
    return artifact.read_record(outdir / PLACES["second_round"].outputs[1], "clusterer")


def clusters(outdir: Path) -> tuple[Path, Path]:
    """The manifest of a run's clusters and their terms: of the second round, if there was one."""
    second, first = (outdir / PLACES[rule].record for rule in ("second_round", "assign"))
    if second.exists():
        return second, second.with_name("top_terms.json")
    return first, outdir / PLACES["fit_kmeans"].outputs[1]
