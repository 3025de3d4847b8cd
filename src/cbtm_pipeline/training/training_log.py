"""The log of a training: metrics.jsonl with one row for each step, log lines, and TensorBoard events."""

import json
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from cbtm_pipeline import __version__
from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.base.duration import duration
from cbtm_pipeline.base.publish import open_file
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

# Dense bf16 operations per second of the tensor cores, from the vendor's data sheets. The first name that is
# part of the GPU's name counts.
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
    """metrics.jsonl during a training that starts after `step` steps.

    Keeps the rows of these steps only, so a resumed training has each row once. Raises ValueError if one of
    them is missing.
    """

    def __init__(self, path: Path, step: int):
        rows = read(path)[:step] if path.exists() else []
        if [row.get("step") for row in rows] != list(range(1, step + 1)):
            raise ValueError(
                f"{path}: not the log of {step} steps. Expected one row for every step of the saved state. "
                f"Bring the file back, or delete {path.parent} to train this expert from the start."
            )
        with artifact.publish(path) as tmp:
            tmp.write_text("".join(_line(row) for row in rows), "utf-8")
        self.path = path
        self._file = os.fdopen(open_file(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")

    def add(self, row: Row) -> None:
        """Append a row."""
        with self._named():
            self._file.write(_line(row))

    def sync(self, durable: bool = True) -> None:
        """Let readers see every row. With `durable`, wait until the rows are on the disk."""
        with self._named():
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._named():
            self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the file in an error: of a full disk, the system does not say it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _line(row: Row) -> str:
    return json.dumps(row, sort_keys=True, allow_nan=False) + "\n"


def read(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, up to the first line that is not a complete row."""
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
    """The losses of the last n steps, and all validation losses (nats per token), in order."""
    rows = read(path)
    return [row["loss"] for row in rows[-n:]], [row["valid_loss"] for row in rows if "valid_loss" in row]


def tracker(project: str | None, plan: TrainingPlan, fingerprint: str, folder: Path) -> Callable[[Row], Any]:
    """A function that sends a row to Weights & Biases; it does nothing if `project` (run.wandb) is None.

    A resumed training continues its run there. Raises ValueError, before the first step, if the package is
    missing or nobody is logged in.
    """
    if project is None:
        return lambda row: None
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"run.wandb: {project}, but the package wandb is missing. Expected it. Run pip install wandb."
        ) from error
    try:
        run = wandb.init(
            project=project,
            name=f"expert {plan.expert}",
            id=fingerprint,
            config=plan.content(),
            resume="allow",
            dir=folder,
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.Error as error:
        found = " ".join(str(error).split())
        raise ValueError(
            f"run.wandb: {project} ({found}). Expected to be logged in. "
            "Run wandb login, or set WANDB_MODE=offline."
        ) from error
    return lambda row: run.log(row, step=row["step"])


class TrainingProgress:
    """Adds speed, memory and power to the row of each step, and logs a line every `every_s` seconds.

    `step` steps are done already; each has `n_tokens` tokens.
    """

    def __init__(
        self, n_steps: int, step: int, n_tokens: int, flops_per_token: int, every_s: float, n_devices: int = 1
    ):
        self.n_steps, self.n_tokens, self.flops_per_token = n_steps, n_tokens, flops_per_token
        self.every_s = every_s
        self.logged_step = step
        self.logged_at = self.completed_at = time.monotonic()
        self.waited_s = 0.0  # for data, since the last line
        peak_flops = _peak_flops()
        self.peak_flops = peak_flops and n_devices * peak_flops
        self.where: Row | None = where_it_runs(n_devices)  # until the first row has it

    def mfu(self, tokens_per_s: float) -> float | None:
        """The share of the devices' bf16 peak that this rate uses (Chowdhery et al. 2022, appendix B).

        None if the peak is not known.
        """
        return tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None

    def complete(self, row: Row) -> Row:
        """The row of a step that has just ended, with tokens so far, tokens/s, MFU, peak memory and time.

        Also with power (watts), if the row gets a log line. The first row of a start says where it runs.
        """
        now = time.monotonic()
        rate = self.n_tokens / max(now - self.completed_at, 1e-9)
        self.completed_at = now
        self.waited_s += row["data_wait_s"]
        more = {
            "n_tokens": row["step"] * self.n_tokens,
            "tokens_per_s": rate,
            "mfu": self.mfu(rate),
            "memory_bytes": memory_bytes(),
        }
        more |= {"power_w": watts} if self._due(row) and (watts := _power()) else {}
        more |= self.where or {}
        self.where = None
        return {**row, **more, "time": time.time()}

    def _due(self, row: Row) -> bool:
        is_late = self.completed_at - self.logged_at >= self.every_s
        return is_late or row["step"] == self.n_steps or "valid_loss" in row

    def say(self, row: Row) -> bool:
        """Log a line if the last one is old enough, or this step is the last or validated; return whether."""
        if not self._due(row):
            return False
        step, seconds = row["step"], self.completed_at - self.logged_at
        n = step - self.logged_step
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
        log.info("  ".join([*parts, f"ETA {duration((self.n_steps - step) * seconds / n)}"]))
        self.logged_at, self.logged_step, self.waited_s = self.completed_at, step, 0.0
        return True


def where_it_runs(n_devices: int) -> Row:
    """The machine (`2 x NVIDIA H100`, or the processor with threads), and the versions of the software."""
    if torch.cuda.is_available():
        machine = f"{n_devices} x {torch.cuda.get_device_name()}"
    else:
        threads = torch.get_num_threads()
        machine = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
        machine += f" in each of {n_devices} processes" if n_devices > 1 else ""
    return {"machine": machine, "version": f"cbtm-pipeline {__version__}, torch {torch.__version__}"}


def _processor() -> str:
    """The name of the processor, as far as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def memory_bytes() -> int:
    """The most memory (bytes) in use so far: by tensors on the GPU, or by the process if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _power() -> float | None:
    """The watts that the GPU draws; None if its driver does not say."""
    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.power_draw() / 1000
    except Exception:  # the bindings are optional, and their errors have no common type
        return None


def _peak_flops() -> float | None:
    """The bf16 operations per second of this GPU; None if they are not known."""
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
        start = rows[0]["time"] if rows else 0.0
        writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
        for row in rows:
            plotted = [name for name in _PLOTTED if row.get(name) is not None]
            values = [Summary.Value(tag=name, simple_value=row[name]) for name in plotted]
            event = Event(wall_time=row["time"], step=row["step"], summary=Summary(value=values))
            writer.write(event.SerializeToString())
        writer.flush()
