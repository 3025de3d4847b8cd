"""The results of tasks side by side: a row for each task and metric, a column for each model."""

from collections.abc import Mapping, Sequence
from typing import Any

from cbtm_pipeline.mixture import verdict

ABOUT = ("task", "metric", "n_shots", "n_examples")


def order(models: Sequence[str]) -> list[str]:
    """The models as they are shown: the seed, dense models, ensembles, then the experts in cluster order."""

    def place(name: str) -> tuple[int, int, str]:
        if name.isdecimal():
            return 3, int(name), name
        return (0 if name == "seed" else 1 if name.startswith("dense") else 2), 0, name

    return sorted(models, key=place)


def join(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all models joined. Entry `results`: (value, standard error or None) by model."""
    joined: dict[tuple[str, str], dict[str, Any]] = {}
    for name in order(list(results)):
        for row in results[name]:
            about = {key: row[key] for key in ABOUT}
            entry = joined.setdefault((row["task"], row["metric"]), {**about, "results": {}})
            entry["results"][name] = [row["value"], row["stderr"]]
    return list(joined.values())


def cell(value: float | None, stderr: float | None) -> str:
    """`0.512 ± 0.011`, a dash for no value."""
    if value is None:
        return "–"
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def header(models: Sequence[str]) -> list[str]:
    """The names of the columns. Experts have numbers as names."""
    names = [f"expert {name}" if name.isdecimal() else name for name in models]
    return ["task", "metric", "shots", "examples", *names]


def cells(row: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """The texts of a row."""
    about = [row["task"], row["metric"], *("–" if row[k] is None else str(row[k]) for k in ABOUT[2:])]
    return [*about, *(cell(*row["results"].get(name, (None, None))) for name in models)]


def text(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    """The table as aligned plain text."""
    lines = verdict.align([tuple(header(models)), *(tuple(cells(row, models)) for row in rows)])
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", "Tasks: value ± standard error."]) + "\n"
