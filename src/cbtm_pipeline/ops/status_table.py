"""The state of a run, or of all runs of a study, as aligned plain text, at most WIDTH columns wide."""

import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from cbtm_pipeline.base.duration import duration

WIDTH = 140
BAR = 8
COLOURS = {"done": "green", "running": "cyan", "stopped": "yellow", "failed": "bold red", "unknown": "yellow"}
STATES = ("done", "running", "waiting", "stopped", "failed", "unknown")  # status.py explains them
URGENT = (
    "failed",
    "unknown",
    "running",
    "stopped",
    "waiting",
    "done",
)  # from what needs attention most

State = Literal["done", "running", "waiting", "stopped", "failed", "unknown"]


class Row(NamedTuple):
    """A stage or an expert. None means: not known.

    `step` and `n_steps` count optimiser steps; for score_expert, experts that are scored.
    """

    kind: Literal["stage", "expert"]
    name: str
    state: State = "waiting"
    step: int | None = None
    n_steps: int | None = None
    loss: float | None = None  # nats per token, mean of the newest ten steps
    tokens_per_s: float | None = None
    mfu: float | None = None  # share of the GPU's peak
    eta_s: float | None = None
    saved_s: float | None = None  # age of the newest saved state
    job: str | None = None
    job_state: str | None = None
    reason: str | None = None  # why the job waits, or ended
    node: str | None = None
    n_restarts: int | None = None  # of its Slurm jobs
    error: str | None = None


class Status(NamedTuple):
    """A run: the process that holds its folder (`active`), its rows, and notes on what is unknown."""

    outdir: str
    active: str | None
    rows: list[Row]
    notes: list[str]


# Title, alignment, content of each column. A column that is empty in all rows is left out.
COLUMNS: list[tuple[str, str, Callable[[Row], str]]] = [
    ("expert", "<", lambda row: row.name),
    ("state", "<", lambda row: row.state),
    ("", "<", lambda row: bar(row.step, row.n_steps)),
    ("step", ">", lambda row: _steps(row)),
    ("loss", ">", lambda row: "" if row.loss is None else f"{row.loss:.3f}"),
    ("tokens/s", ">", lambda row: "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"),
    ("MFU", ">", lambda row: "" if row.mfu is None else f"{100 * row.mfu:.1f} %"),
    ("ETA", ">", lambda row: "" if row.eta_s is None else duration(row.eta_s)),
    ("saved", ">", lambda row: "" if row.saved_s is None else f"{duration(row.saved_s)} ago"),
    ("job", ">", lambda row: (row.job or "")[:10]),
    ("Slurm", "<", lambda row: " ".join(filter(None, [row.job_state, row.reason]))[:18]),
    ("node", "<", lambda row: (row.node or "")[:12]),
    ("restarts", ">", lambda row: "" if row.n_restarts is None else f"{row.n_restarts}"),
]

OF_STUDY: list[tuple[str, str, Callable[[Status], str]]] = [
    ("run", "<", lambda run: PurePath(run.outdir).name),
    ("state", "<", lambda run: state_of(run)),
    ("", "<", lambda run: bar(*_trained(run))),
    ("models", ">", lambda run: "{}/{}".format(*_models(run))),
    ("now", "<", lambda run: ", ".join(row.name for row in run.rows if row.state == "running")),
]


def render(status: Status) -> str:
    """The text for a run: its stages, a table of its experts, a summary, the errors, the notes."""
    stages = [row for row in status.rows if row.kind == "stage"]
    experts = [row for row in status.rows if row.kind == "expert"]
    lines = _title(status.outdir, status.active) if status.rows else []
    if stages:
        groups = [(state, [_stage(row) for row in stages if row.state == state]) for state in STATES]
        lines += [
            line for state, names in groups if names for line in _wrap(f"{state:<8} {', '.join(names)}")
        ]
    if experts:
        lines += ["", *_table(experts, COLUMNS), "", *_wrap(summary(experts))]
    for text in [*_errors(status), *status.notes]:
        lines += _wrap(text)
    return "".join(f"{line}\n" for line in lines)


def render_study(folder: str, runs: Sequence[Status]) -> str:
    """The text for a study: a row for each run, how many are done, the errors, the notes."""
    active = next((run.active for run in runs if run.active), None)
    counts = _counts(map(state_of, runs))
    lines = [*_title(folder, active), "", *_table(runs, OF_STUDY), "", f"{len(runs)} runs: {counts}"]
    errors = [f"{PurePath(run.outdir).name}: {text}" for run in runs for text in _errors(run)]
    for text in [*errors, *dict.fromkeys(note for run in runs for note in run.notes)]:
        lines += _wrap(text)
    return "".join(f"{line}\n" for line in lines)


def state_of(run: Status) -> State:
    """The state of a run as a whole: that of the row that needs attention most.

    Between two of its jobs, a run waits if Snakemake runs; else it has stopped. Its state is unknown if no
    config says which models it has.
    """
    states: set[State] = {row.state for row in run.rows}
    if not any(row.kind == "expert" for row in run.rows):
        return "unknown"
    if states == {"waiting", "done"} and not run.active:
        return "stopped"
    return min(states, key=URGENT.index)


def _models(run: Status) -> tuple[int, int]:
    """How many models are trained, and how many there are."""
    experts = [row for row in run.rows if row.kind == "expert"]
    return sum(row.state == "done" for row in experts), len(experts)


def _trained(run: Status) -> tuple[int, int]:
    """Steps of all models that are done, and all that there are; full only if all stages are done, too."""
    experts = [row for row in run.rows if row.kind == "expert"]
    n_done, n_all = (sum(getattr(row, name) or 0 for row in experts) for name in ("step", "n_steps"))
    return n_done, n_all + (state_of(run) != "done")


def _title(folder: str, active: str | None) -> list[str]:
    """Which folder it is, and the process that holds it."""
    return _wrap(f"{folder}: {f'snakemake runs ({active})' if active else 'no snakemake runs'}")


def _counts(states: Iterable[str]) -> str:
    """How many there are in each state."""
    n = Counter(states)
    return ", ".join(f"{n[state]} {state}" for state in STATES if n[state])


def _errors(status: Status) -> list[str]:
    """A text for each row that has failed."""
    return [
        f"failed: {'expert ' if row.kind == 'expert' else ''}{row.name}: {row.error}"
        for row in status.rows
        if row.error
    ]


def summary(experts: list[Row]) -> str:
    """How many experts are in each state, and in how much time the last of the running ones will be done."""
    n_done = sum(row.state == "done" for row in experts)
    etas = [row.eta_s for row in experts if row.eta_s is not None]
    which = "" if n_done + len(etas) == len(experts) else " of those that run"
    eta = f". ETA{which}: {duration(max(etas))}" if etas else ""
    return f"{len(experts)} experts: {_counts(row.state for row in experts)}{eta}"


def bar(step: int | None, n_steps: int | None) -> str:
    """Progress as BAR characters; it is full only at the last step."""
    if step is None or n_steps is None:
        return ""
    n = BAR if step >= n_steps else max(0, BAR * step // n_steps)
    return "#" * n + "." * (BAR - n)


def show(text: str) -> None:
    """Print the text, with colours on a terminal."""
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        coloured = Text(text, end="")
        for state, style in COLOURS.items():
            coloured.highlight_regex(rf"\b{state}\b", style)
        Console(highlight=False).print(coloured, soft_wrap=True)
        return
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stage(row: Row) -> str:
    count = f" {row.step}/{row.n_steps}" if row.n_steps and row.state != "done" else ""
    job = [row.job and f"job {row.job}", row.job_state, row.reason, row.node] if row.state != "done" else []
    words = " ".join(filter(None, job))
    return f"{row.name}{count}{f' ({words})' if words else ''}"


def _steps(row: Row) -> str:
    return "" if row.step is None else f"{row.step}" if row.n_steps is None else f"{row.step}/{row.n_steps}"


def _table(rows: Sequence[Any], columns: Sequence[tuple[str, str, Callable[[Any], str]]]) -> list[str]:
    filled = [(side, [title, *(content(row) for row in rows)]) for title, side, content in columns]
    kept = [(side, max(map(len, cells)), cells) for side, cells in filled if any(cells[1:])]
    lines = [
        "  ".join(f"{cells[i]:{side}{width}}" for side, width, cells in kept) for i in range(len(rows) + 1)
    ]
    return [line[:WIDTH].rstrip() for line in lines]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")
