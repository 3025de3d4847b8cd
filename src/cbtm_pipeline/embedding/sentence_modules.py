"""The modules of a sentence-transformers model: modules.json, and the folders that it names.

The first module is the Transformer. Pooling makes one vector of its hidden states. Dense and Normalize may
follow. Each module is made from its config.json and, for Dense, from model.safetensors. No class is imported
by its name.

Shapes: B windows, D dimensions.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from cbtm_pipeline.base import device
from cbtm_pipeline.base.inside import is_inside
from cbtm_pipeline.embedding import encoder

NEEDED = {"Pooling": ["config.json"], "Dense": ["config.json", "model.safetensors"], "Normalize": []}
OLD_POOLING = (  # keys pooling_mode_... of older files, in the order of encoder.POOLING
    "cls_token",
    "max_tokens",
    "mean_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")

Head = Callable[[torch.Tensor], torch.Tensor]


def read(folder: Path) -> list[tuple[str, str]]:
    """(kind, subfolder) of each module in modules.json; without that file, one Transformer in the folder.

    Raises ValueError for other modules than those above, and for a path that leads out of the folder.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return [("Transformer", "")]
    try:
        modules = [
            (str(module["type"]), str(module["path"])) for module in json.loads(path.read_text("utf-8"))
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a list of modules ({error}). Expected type and path of each. Get the encoder again."
        ) from error
    kinds = [name.rpartition(".")[2] for name, _ in modules]
    unknown = [name for name, _ in modules if not name.startswith("sentence_transformers.")]
    unknown += [kind for kind in kinds[2:] if kind not in ("Dense", "Normalize")]
    if unknown or kinds[:2] != ["Transformer", "Pooling"]:
        raise ValueError(
            f"{path}: {', '.join(unknown or kinds)}. Expected Transformer and Pooling, then Dense and "
            "Normalize at most. Choose another encoder for embed.encoder."
        )
    for _, subfolder in modules:
        if not is_inside(subfolder):
            raise ValueError(
                f"{path}: path {subfolder}. Expected a subfolder. Choose another encoder for embed.encoder."
            )
    return [(kind, subfolder) for kind, (_, subfolder) in zip(kinds, modules, strict=True)]


def lacks(folder: Path, modules: list[tuple[str, str]]) -> list[str]:
    """Files that the modules need and that are missing."""
    files = [f"{subfolder}/{file}" for kind, subfolder in modules for file in NEEDED[kind]]
    return [file for file in files if not (folder / file).is_file()]


def load(folder: Path, modules: list[tuple[str, str]], where: str) -> tuple[tuple[str, ...], list[Head]]:
    """The pooling modes, and the functions (B, D) -> (B, D) that follow; the mean alone without modules.

    `where` begins the error messages. Raises ValueError for a module that cannot be made.
    """
    pooling, heads = ("mean",), []
    for kind, subfolder in modules:
        if kind == "Pooling":
            pooling = _pooling(read_json(folder / subfolder / "config.json"), where)
        elif kind == "Dense":
            heads.append(_dense(folder / subfolder, where))
        else:
            heads.append(normalize)
    return pooling, heads


def _pooling(config: dict[str, Any], where: str) -> tuple[str, ...]:
    """The modes that a Pooling module concatenates, in its order. Raises ValueError for an unknown one."""
    named = config.get("pooling_mode")
    if named is None:
        pairs = zip(encoder.POOLING, OLD_POOLING, strict=True)
        found = tuple(mode for mode, key in pairs if config.get(f"pooling_mode_{key}")) or ("mean",)
    else:
        found = (named,) if isinstance(named, str) else tuple(named)
    if unknown := set(found) - set(encoder.POOLING):
        raise ValueError(
            f"{where}: pooling {', '.join(sorted(unknown))}. Expected {', '.join(encoder.POOLING)}. "
            "Choose another encoder."
        )
    return found


def _dense(folder: Path, where: str) -> Head:
    """A Dense module: a linear layer and its activation. Raises ValueError for any other layers."""
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    weights = load_file(folder / "model.safetensors")
    is_linear = {"linear.weight"} <= weights.keys() <= {"linear.weight", "linear.bias"}
    if activation not in ACTIVATIONS or not is_linear:
        found = f"{activation} of {', '.join(sorted(weights))}"
        raise ValueError(
            f"{where}: {folder.name} is {found}. Expected one linear layer and {', '.join(ACTIVATIONS)}. "
            "Choose another encoder."
        )
    linear = torch.nn.Linear(*weights["linear.weight"].shape[::-1], bias="linear.bias" in weights)
    linear.load_state_dict({key.removeprefix("linear."): value.float() for key, value in weights.items()})
    return torch.nn.Sequential(linear, getattr(torch.nn, activation)()).to(device.best()).eval()


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is no such file. Raises ValueError for other content."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: not a JSON object ({error}). Expected one. Get the encoder again."
        ) from error
