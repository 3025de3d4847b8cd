"""Pack the result of a run as one model: a folder that transformers loads, with everything it needs inside.

    config.json, modeling_cbtm.py     what the ensemble is, and its code (auto_map)
    router.safetensors                term vectors and centres
    experts/<id>/                     each expert as a folder of transformers, for any other use
    tokenizer files, generation_config.json, README.md, files.json (the hash of every file)

Files of the run are hard links where the file system has them, so the folder costs no space.
"""

import json
import os
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from cbtm_pipeline.base import artifact

CODE = "modeling_cbtm.py"
FILES = "files.json"
EXPERT_FILES = ("config.json", "generation_config.json", "model.safetensors", "card.json", "README.md")
NO_TOKENIZER = {"card.json"}


class Parts(NamedTuple):
    """What an ensemble is made of. `experts`: folders by name, in the order of the rows of `centres_KD`."""

    embedding_VD: np.ndarray
    centres_KD: np.ndarray
    experts: Mapping[str, Path]
    tokenizer: Path  # folder
    separator_id: int
    vocab_size: int
    settings: Mapping[str, Any]  # further keys of CBTMConfig
    readme: str


def write(parts: Parts, out: Path, meta: dict[str, Any], link: bool = True) -> None:
    """Write the folder beside `out`, and `out` (files.json, the record) last.

    `meta` gets the entry `files`, the hash of each file.
    """
    folder = out.parent
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    for name, source in parts.experts.items():
        for file in EXPERT_FILES:
            if (source / file).exists():
                _place(source / file, folder / "experts" / name / file, link)
    for path in sorted(parts.tokenizer.iterdir()):
        if path.is_file() and path.name not in NO_TOKENIZER and not path.name.startswith("."):
            _place(path, folder / path.name, link=False)
    tensors = {"embedding": parts.embedding_VD, "centres": parts.centres_KD}
    with artifact.publish(folder / "router.safetensors") as tmp:
        save_file({name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}, tmp)
    artifact.write_json(folder / "config.json", config(parts))
    artifact.write_json(folder / "generation_config.json", _generation(parts.separator_id))
    code = resources.files("cbtm_pipeline.inference").joinpath(CODE).read_text("utf-8")
    for name, text in ((CODE, code), ("README.md", parts.readme)):
        with artifact.publish(folder / name) as tmp:
            tmp.write_text(text, "utf-8")
    hashes = {str(path.relative_to(folder)): artifact.identity(path) for path in files(folder)}
    artifact.write_sealed(out, {**meta, "files": hashes})


def config(parts: Parts) -> dict[str, Any]:
    """The content of config.json. Sizes that tools ask a model for are those of the first expert."""
    first = json.loads((next(iter(parts.experts.values())) / "config.json").read_text("utf-8"))
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "dtype")
    return {
        "model_type": "cbtm",
        "architectures": ["CBTMForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE[:-3]}.CBTMConfig",
            "AutoModelForCausalLM": f"{CODE[:-3]}.CBTMForCausalLM",
        },
        "experts": list(parts.experts),
        "n_components": parts.embedding_VD.shape[1],
        "vocab_size": parts.vocab_size,
        **_roles(parts.separator_id),
        **{name: first[name] for name in sizes if name in first},
        **parts.settings,
    }


def _roles(separator_id: int) -> dict[str, int]:
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), separator_id)


def _generation(separator_id: int) -> dict[str, Any]:
    return {"_from_model_config": False, **_roles(separator_id)}


def files(folder: Path) -> list[Path]:
    """All files of the folder but its record, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILES)


def verify(folder: Path) -> dict[str, Any]:
    """The record of a folder all of whose files are as they were written. Raises ValueError otherwise."""
    record = artifact.read_sealed(folder / FILES, "ensemble")
    for name, expected in record["files"].items():
        artifact.check_file(folder / name, expected, "Export it again.")
    return record


def copy(folder: Path, to: Path) -> None:
    """Copy the folder, verified, for everybody to read. Raises ValueError if `to` is not empty."""
    verify(folder)
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"{to}: not empty. Expected a new folder. Give another name.")
    for path in [*files(folder), folder / FILES]:
        target = to / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with artifact.publish(target) as tmp:
            shutil.copyfile(path, tmp)
            tmp.chmod(0o644)
    for path in [to, *(path for path in to.rglob("*") if path.is_dir())]:
        path.chmod(0o755)


def _clear(folder: Path) -> None:
    """Remove what an earlier run left."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _place(path: Path, to: Path, link: bool) -> None:
    """A hard link to the file, or a copy."""
    with artifact.publish(to) as tmp:
        try:
            if not link:
                raise OSError
            os.link(path, tmp)
        except OSError:
            shutil.copyfile(path, tmp)
