"""The state of a run as aligned plain text, at most WIDTH columns wide."""

import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

from cbtm_pipeline.base.duration import duration

WIDTH = 140
BAR = 8
COLOURS = {"done": "green", "running": "cyan", "stopped": "yellow", "failed": "bold red", "unknown": "yellow"}
STATES = ("done", "running", "waiting", "stopped", "failed", "unknown")  # status.py explains them

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


# Title, alignment, content of each column. A column that is empty for all experts is left out.
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


def render(status: Status) -> str:
    """The text for a run: its stages, a table of its experts, a summary, the errors, the notes."""
    stages = [row for row in status.rows if row.kind == "stage"]
    experts = [row for row in status.rows if row.kind == "expert"]
    who = f"snakemake runs ({status.active})" if status.active else "no snakemake runs"
    lines = _wrap(f"{status.outdir}: {who}") if status.rows else []
    if stages:
        groups = [(state, [_stage(row) for row in stages if row.state == state]) for state in STATES]
        lines += [
            line for state, names in groups if names for line in _wrap(f"{state:<8} {', '.join(names)}")
        ]
    if experts:
        lines += ["", *_table(experts), "", *_wrap(summary(experts))]
    for row in status.rows:
        if row.error:
            lines += _wrap(f"failed: {'expert ' if row.kind == 'expert' else ''}{row.name}: {row.error}")
    for note in status.notes:
        lines += _wrap(note)
    return "".join(f"{line}\n" for line in lines)


def summary(experts: list[Row]) -> str:
    """How many experts are in each state, and in how much time the last of the running ones will be done."""
    n = Counter(row.state for row in experts)
    etas = [row.eta_s for row in experts if row.eta_s is not None]
    which = "" if n["done"] + len(etas) == len(experts) else " of those that run"
    eta = f". ETA{which}: {duration(max(etas))}" if etas else ""
    return f"{len(experts)} experts: {', '.join(f'{n[state]} {state}' for state in STATES if n[state])}{eta}"


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


def _table(experts: list[Row]) -> list[str]:
    columns = [[title, *(content(row) for row in experts)] for title, _, content in COLUMNS]
    sides = [side for _, side, _ in COLUMNS]
    kept = [
        (cells, side, max(map(len, cells)))
        for cells, side in zip(columns, sides, strict=True)
        if any(cells[1:])
    ]
    lines = [
        "  ".join(f"{cells[i]:{side}{width}}" for cells, side, width in kept) for i in range(len(experts) + 1)
    ]
    return [line[:WIDTH].rstrip() for line in lines]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")
