"""How a training went and goes: metrics.jsonl with one row per step, log lines for people, TensorBoard events."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from cbtm_pipeline import artifact
from cbtm_pipeline.cli import log

Row = dict[str, Any]

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


class Progress:
    """A log line every few seconds: step, loss, rate, tokens/s, share of the GPU's peak, time to go."""

    def __init__(self, n_steps: int, step: int, flops_per_token: int, every_s: float, n_devices: int = 1):
        self.n_steps, self.step, self.flops_per_token, self.every_s = n_steps, step, flops_per_token, every_s
        self.n_tokens, self.said = 0, time.monotonic()
        peak_flops = _peak_flops()
        self.peak_flops = peak_flops and n_devices * peak_flops

    def mfu(self, tokens_per_s: float) -> float | None:
        """The share of the devices' bf16 peak that this rate uses (Chowdhery et al. 2022, appendix B); None where the peak is not known."""
        return tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None

    def add(self, n_tokens: int, row: Row) -> bool:
        """Count a step; say so if the last line is old enough or this step is the last. True when a line was written."""
        self.n_tokens += n_tokens
        now, step = time.monotonic(), row["step"]
        seconds = now - self.said
        if seconds < self.every_s and step < self.n_steps:
            return False
        rate = self.n_tokens / max(seconds, 1e-9)
        mfu = f"  MFU {100 * share:.1f} %" if (share := self.mfu(rate)) else ""
        to_go = (self.n_steps - step) * seconds / (step - self.step)
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  %.4g tokens/s%s  ETA %s", step, self.n_steps, row["loss"], row["lr"], rate, mfu, _clock(to_go)
        )
        self.n_tokens, self.said, self.step = 0, now, step
        return True


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
    """Write loss, lr, grad_norm and tokens_per_s as one TensorBoard event file, a function of the rows."""
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=rows[0]["time"] if rows else 0.0, file_version="brain.Event:2").SerializeToString())
        for row in rows:
            values = [Summary.Value(tag=name, simple_value=row[name]) for name in ("loss", "lr", "grad_norm", "tokens_per_s")]
            event = Event(wall_time=row["time"], step=row["step"], summary=Summary(value=values))
            writer.write(event.SerializeToString())
        writer.flush()
