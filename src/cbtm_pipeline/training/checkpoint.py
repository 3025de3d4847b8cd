"""Resumable state of a training: one safetensors file per saved step, which is whole and of this training, or is not used.

A file holds the weights and the optimiser's tensors; its metadata says the step, the fingerprint of the training (plan, data, seed model)
and a hash of all this. There is no random state to save: every step draws from (rng_seed, step). The two newest files are kept, so that a
damaged one costs some steps and no more. What is saved only ever shortens a training: without it the same weights come out.
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
    """Tensors after `step` steps."""

    step: int
    tensors: Tensors


def capture(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, keep: bool = True
) -> Tensors:
    """A copy in the host's memory of weights, buffers and optimiser tensors by name; weights that layers share appear once.

    Of a sharded model all processes have to ask; those that do not `keep` it get nothing, and hold one whole tensor at a time.
    """
    tensors = {f"model.{name}": p for name, p in [*model.named_parameters(), *model.named_buffers()]}
    for index, values in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    copies = ((name, sharding.whole(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in copies if keep}


def restore(
    tensors: Iterable[tuple[str, torch.Tensor]], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put captured tensors back into a model and an optimiser of the same make, one after the other."""
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
    """Saves states while the training goes on, one at a time: the host's copy is made at once, hashing and writing are a thread's work."""

    def __init__(self) -> None:
        self._pool, self._running = ThreadPoolExecutor(1), None

    def save(self, folder: Path, step: int, fingerprint: str, tensors: Tensors) -> None:
        """Begin to save what `capture` gave, after the save before this one has ended. Raises what that one raised."""
        self.wait()
        self._running = self._pool.submit(save, folder, step, fingerprint, tensors)

    def wait(self) -> None:
        """Until what was begun is on the disk. Raises what saving raised."""
        running, self._running = self._running, None
        if running:
            running.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:  # else there is something worse to tell
                raise
        finally:
            self._pool.shutdown()


def save(folder: Path, step: int, fingerprint: str, tensors: Tensors) -> None:
    """Write the state after `step` steps and read it back; then remove all but the newest two.

    Raises OSError when what is read is not what was written; the states before are kept then.
    """
    about = {"format": artifact.FORMAT, "kind": "state", "step": step, "fingerprint": fingerprint}
    meta = json.dumps({**about, "hash": _hash(about, tensors)}, sort_keys=True)
    path = folder / f"step-{step:08d}.safetensors"
    with artifact.publish(path) as tmp:
        try:
            save_file(tensors, tmp, {"cbtm": meta})
        except SafetensorError as error:  # a full disk
            raise OSError(None, str(error)) from error
    try:
        _read(path)
    except ValueError as error:
        raise OSError(
            None, f"damaged as soon as it was written ({error}); the states before are kept", str(path)
        ) from error
    for old in candidates(folder)[KEPT:]:
        old.unlink()


def load(folder: Path, fingerprint: str) -> State | None:
    """The newest state that is whole, or None where nothing was saved or what was saved belongs to another training, which is then removed.

    Raises ValueError when there are saved states and every one is damaged: starting again is for people to decide.
    """
    damaged: dict[Path, str] = {}
    for path in candidates(folder):
        try:
            about, tensors = _read(path)
        except ValueError as error:
            log.warning("%s: damaged (%s), looking for the one before", path, error)
            damaged[path] = str(error)
            continue
        if about["fingerprint"] != fingerprint:
            log.info(
                "%s: the state of another training (its plan, data or seed model changed), training starts anew",
                folder,
            )
            discard(folder)
            return None
        for other in damaged:
            other.unlink()
        return State(about["step"], tensors)
    if damaged:
        path, reason = next(iter(damaged.items()))
        raise ValueError(
            f"{path}: damaged ({reason}), like every state in its folder. Expected at least one whole state. "
            f"Bring the files back, or delete {folder} to train this expert from the start."
        )
    return None


def discard(folder: Path) -> None:
    """Remove all state at once: after this, however it ends, none of it is seen again."""
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
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("cbtm", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if not isinstance(about, dict) or about.pop("hash", None) != _hash(about, tensors):
        raise ValueError("its hash is another")
    return artifact.check_meta(path, about, "state"), tensors


def _hash(about: Mapping, tensors: Tensors) -> str:
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
