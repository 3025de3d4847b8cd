"""Whether a seed model could be trained, looked at before anything is computed: for `cbtm doctor`."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from cbtm_pipeline.base.lean import lean_imports
from cbtm_pipeline.training import model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE_BYTES = 1 << 31  # of weights: up to so many, a model is loaded and run


def pretrained(folder: Path, name: str, vocab_size: int, seq_len: int, only: str) -> bool:
    """Whether the model in a folder was run. Raises ValueError, as a training does, if it cannot be trained.

    A model of more than WHOLE_BYTES is not run, and its weights are not read: only their names and shapes.
    Where accelerate is missing, only the heads of their files are.
    """
    where = f"model.pretrained: {name}"
    files = sorted(folder.glob("*.safetensors"))
    with lean_imports():
        if sum(path.stat().st_size for path in files) <= WHOLE_BYTES:
            net = model.load_whole(folder, where)
            model.check(net, where, vocab_size, seq_len)
            _check_layers(net, only)
            return True
        for path in files:
            _check_head(path)
        if importlib.util.find_spec("accelerate"):
            net = model.load_whole(folder, where, device_map="meta")
            with torch.device("meta"):
                model.check(net, where, vocab_size, seq_len)
            _check_layers(net, only)
        return False


def scratch(keys: Mapping[str, Any], vocab_size: int, separator_id: int, seq_len: int, only: str) -> None:
    """Raise ValueError, as a training does, for a model that cannot be trained. A large one is not run."""
    with torch.device("meta"):
        net = model.scratch(keys, vocab_size, separator_id, seq_len, 0)
    if 4 * model.n_parameters(net) <= WHOLE_BYTES:
        net = model.scratch(keys, vocab_size, separator_id, seq_len, 0)
    _check_layers(net, only)


def _check_layers(net: "PreTrainedModel", only: str) -> None:
    model.layers(net)
    if only == "feed-forward":
        model.train_feed_forwards_only(net)


def _check_head(path: Path) -> None:
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}). Expected safetensors. Download it again.") from error
