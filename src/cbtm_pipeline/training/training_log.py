"""How a training went and goes: metrics.jsonl with one row per step, log lines for people, TensorBoard events."""

import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.plan import TrainingPlan

Row = dict[str, Any]

_PLOTTED = (
    "loss",
    "valid_loss",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "mfu",
    "memory_bytes",
    "data_wait_s",
    "power_w",
)

# Dense bf16 operations per second of the tensor cores, from the vendor's data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Metrics:
    """metrics.jsonl while it grows. A resumed training keeps the rows of the steps that its state has, so none is lost or there twice."""

    def __init__(self, path: Path, step: int):
        rows = read(path)[:step] if path.exists() else []
        if [row.get("step") for row in rows] != list(range(1, step + 1)):
            raise ValueError(
                f"{path}: not the log of {step} steps. Expected one row for every step of the saved state. "
                f"Bring the file back, or delete {path.parent} to train this expert from the start."
            )
        with artifact.publish(path) as tmp:
            tmp.write_text("".join(_line(row) for row in rows), "utf-8")
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Row) -> None:
        """Append a row."""
        self._file.write(_line(row))

    def sync(self, durable: bool = True) -> None:
        """Let readers see every row; with `durable`, on the disk."""
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _line(row: Row) -> str:
    return json.dumps(row, sort_keys=True, allow_nan=False) + "\n"


def read(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, up to a line that is cut off or no row."""
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def history(path: Path, n: int) -> tuple[list[float], list[float]]:
    """The losses of the last n steps, and all validation losses, in order."""
    rows = read(path)
    return [row["loss"] for row in rows[-n:]], [row["valid_loss"] for row in rows if "valid_loss" in row]


def tracker(project: str | None, plan: TrainingPlan, fingerprint: str, folder: Path) -> Callable[[Row], Any]:
    """What takes each row to Weights & Biases, if run.wandb names a project; a training that goes on goes on there, too.

    Raises ValueError where that cannot be: before the first step, not after the last one.
    """
    if project is None:
        return lambda row: None
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"run.wandb: {project}, but the package wandb is missing. Expected it. Run pip install wandb."
        ) from error
    about: dict[str, Any] = {
        "project": project,
        "name": f"expert {plan.expert}",
        "id": fingerprint,
        "config": plan.content(),
    }
    try:
        run = wandb.init(
            **about, resume="allow", dir=folder, settings=wandb.Settings(console="off", silent=True)
        )
    except wandb.Error as error:
        found = " ".join(str(error).split())
        raise ValueError(
            f"run.wandb: {project} ({found}). Expected to be logged in. Run wandb login, or set WANDB_MODE=offline."
        ) from error
    return lambda row: run.log(row, step=row["step"])


class Progress:
    """What a step's row says besides the model's numbers, and a log line every few seconds."""

    def __init__(
        self, n_steps: int, step: int, n_tokens: int, flops_per_token: int, every_s: float, n_devices: int = 1
    ):
        self.n_steps, self.step, self.n_tokens, self.flops_per_token, self.every_s = (
            n_steps,
            step,
            n_tokens,
            flops_per_token,
            every_s,
        )
        self.said = self.completed = time.monotonic()
        self.waited_s = 0.0  # since the last line
        peak_flops = _peak_flops()
        self.peak_flops = peak_flops and n_devices * peak_flops

    def mfu(self, tokens_per_s: float) -> float | None:
        """The share of the devices' bf16 peak that this rate uses (Chowdhery et al. 2022, appendix B); None where the peak is not known."""
        return tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None

    def complete(self, row: Row) -> Row:
        """The row of a step that has just ended, with tokens, speed, memory (the most so far), power (for a line) and time."""
        now = time.monotonic()
        rate = self.n_tokens / max(now - self.completed, 1e-9)
        self.completed = now
        self.waited_s += row["data_wait_s"]
        more = {
            "n_tokens": row["step"] * self.n_tokens,
            "tokens_per_s": rate,
            "mfu": self.mfu(rate),
            "memory_bytes": memory_bytes(),
        }
        more |= {"power_w": watts} if self._due(row) and (watts := _power()) else {}
        return {**row, **more, "time": time.time()}

    def _due(self, row: Row) -> bool:
        return (
            self.completed - self.said >= self.every_s or row["step"] == self.n_steps or "valid_loss" in row
        )

    def say(self, row: Row) -> bool:
        """Say how far it is if the last line is old enough, or this step the last, or validated. True when a line was written."""
        if not self._due(row):
            return False
        step, seconds = row["step"], self.completed - self.said
        n = step - self.step
        rate = n * self.n_tokens / max(seconds, 1e-9)
        parts = [f"step {step}/{self.n_steps}", f"loss {row['loss']:.4f}"]
        parts += [f"validation {row['valid_loss']:.4f}"] if "valid_loss" in row else []
        parts += [f"lr {row['lr']:.2e}", f"{rate:.4g} tokens/s"]
        parts += [f"MFU {100 * share:.1f} %"] if (share := self.mfu(rate)) else []
        parts += [
            f"{row['memory_bytes'] / 1e9:.1f} GB",
            f"data wait {100 * self.waited_s / max(seconds, 1e-9):.0f} %",
        ]
        parts += [f"{row['power_w']:.0f} W"] if "power_w" in row else []
        log.info("  ".join([*parts, f"ETA {_clock((self.n_steps - step) * seconds / n)}"]))
        self.said, self.step, self.waited_s = self.completed, step, 0.0
        return True


def memory_bytes() -> int:
    """The most that was in use: of the GPU's memory by tensors, without a GPU by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _power() -> float | None:
    """Watts that the GPU draws, where its driver tells."""
    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.power_draw() / 1000
    except Exception:  # the bindings are optional, and their errors have no common type
        return None


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s"


def _peak_flops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def write_events(path: Path, rows: Sequence[Row]) -> None:
    """Write the numbers of the rows as one TensorBoard event file."""
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(
            Event(
                wall_time=rows[0]["time"] if rows else 0.0, file_version="brain.Event:2"
            ).SerializeToString()
        )
        for row in rows:
            values = [
                Summary.Value(tag=name, simple_value=row[name])
                for name in _PLOTTED
                if row.get(name) is not None
            ]
            event = Event(wall_time=row["time"], step=row["step"], summary=Summary(value=values))
            writer.write(event.SerializeToString())
        writer.flush()
