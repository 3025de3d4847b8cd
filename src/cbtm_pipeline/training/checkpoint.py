"""The resumable state of a training: one safetensors file for each saved step.

A file holds the weights and the optimiser's tensors. Its metadata has the step, the fingerprint of the
training (plan, data, seed model), and a hash of all of it. A file is used only if it is whole and of this
training. No random state is saved, because every step draws from (rng_seed, step). The two newest files are
kept, so a damaged file costs some steps and no more. A saved state only shortens a training: without it, the
training ends with the same weights.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.training import sharding

KEPT = 2
Tensors = dict[str, torch.Tensor]


class State(NamedTuple):
    """The tensors after `step` steps."""

    step: int
    tensors: Tensors


def capture(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, keep: bool = True
) -> Tensors:
    """A copy of weights, buffers and optimiser tensors by name, in the host's memory.

    Weights that layers share appear once. For a sharded model, all processes must call this. A process that
    does not `keep` the copy gets an empty one, and holds one whole tensor at a time.
    """
    tensors = {f"model.{name}": p for name, p in [*model.named_parameters(), *model.named_buffers()]}
    for index, values in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    copies = ((name, sharding.whole(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in copies if keep}


def restore(
    tensors: Iterable[tuple[str, torch.Tensor]], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Copy captured tensors, one after the other, into a model and an optimiser of the same structure."""
    places = dict([*model.named_parameters(), *model.named_buffers()])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, Tensors] = {}
    for key, tensor in tensors:
        owner, _, name = key.partition(".")
        if owner == "model":
            with torch.no_grad():
                places[name].copy_(sharding.like(tensor, places[name]))
        else:
            index, _, name = name.partition(".")
            p = parameters[int(index)]
            state.setdefault(int(index), {})[name] = (
                sharding.like(tensor, p) if tensor.shape == p.shape else tensor.clone()
            )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Saver:
    """Saves states in a thread, one at a time, while the training goes on."""

    def __init__(self) -> None:
        self._pool, self._running = ThreadPoolExecutor(1), None

    def save(self, folder: Path, step: int, fingerprint: str, tensors: Tensors) -> None:
        """Begin to hash and write the tensors that `capture` gave.

        Waits first for the save before this one, and raises what that one raised.
        """
        self.wait()
        self._running = self._pool.submit(save, folder, step, fingerprint, tensors)

    def wait(self) -> None:
        """Wait until the state is on the disk. Raises what saving raised."""
        running, self._running = self._running, None
        if running:
            running.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:  # else the error of the training matters more
                raise
        finally:
            self._pool.shutdown()


def save(folder: Path, step: int, fingerprint: str, tensors: Tensors) -> None:
    """Write the state after `step` steps and read it back; then remove all but the newest two.

    Raises OSError if the file cannot be written, or does not read back as it was written. Then the earlier
    states are kept.
    """
    content = {"format": artifact.FORMAT, "kind": "state", "step": step, "fingerprint": fingerprint}
    meta = json.dumps({**content, "hash": _hash(content, tensors)}, sort_keys=True)
    path = folder / f"step-{step:08d}.safetensors"
    with artifact.publish(path) as tmp:
        try:
            save_file(tensors, tmp, {"cbtm": meta})
        except SafetensorError as error:  # a full disk
            raise OSError(None, str(error), str(path)) from error
    try:
        _read(path)
    except ValueError as error:
        raise OSError(
            None, f"damaged as soon as it was written ({error}); the earlier states are kept", str(path)
        ) from error
    for old in candidates(folder)[KEPT:]:
        old.unlink()


def load(folder: Path, fingerprint: str) -> State | None:
    """The newest whole state; None if there is no state of this training.

    The states of another training are removed. Raises ValueError if there are saved states and all of them
    are damaged: people have to decide whether to start again.
    """
    damaged: dict[Path, str] = {}
    for path in candidates(folder):
        try:
            meta, tensors = _read(path)
        except ValueError as error:
            log.warning("%s: damaged (%s), looking for the one before", path, error)
            damaged[path] = str(error)
            continue
        if meta["fingerprint"] != fingerprint:
            log.info(
                "%s: state of another training (the plan, data or seed model changed), training starts anew",
                folder,
            )
            discard(folder)
            return None
        for other in damaged:
            other.unlink()
        return State(meta["step"], tensors)
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise ValueError(
            f"{path}: damaged ({reason}), like every state in its folder. Expected at least one whole state. "
            f"Bring the files back, or delete {folder} to train this expert from the start."
        )
    return None


def discard(folder: Path) -> None:
    """Remove all states. The folder is renamed first, so a kill leaves all of them or none."""
    trash = folder.with_name(f".{folder.name}-discarded")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        folder.rename(trash)
        shutil.rmtree(trash)


def candidates(folder: Path) -> list[Path]:
    """Files of saved states, newest first."""
    return sorted(
        folder.glob("step-*.safetensors"), key=lambda path: int(path.stem.removeprefix("step-")), reverse=True
    )


def _read(path: Path) -> tuple[dict, Tensors]:
    """Metadata and tensors of a state. Raises ValueError if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("cbtm", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if not isinstance(meta, dict) or meta.pop("hash", None) != _hash(meta, tensors):
        raise ValueError("its hash does not fit")
    return artifact.check_meta(path, meta, "state"), tensors


def _hash(meta: Mapping, tensors: Tensors) -> str:
    """A hash of metadata, names, dtypes, shapes and values."""
    digest = hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
