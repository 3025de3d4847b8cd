"""Pack the result of a run as one model: a folder that transformers loads, with everything it needs inside.

    config.json, modeling_cbtm.py     what the ensemble is, and its code (auto_map)
    router.safetensors                term vectors and centres
    experts/<id>/                     each expert as a folder of transformers, for any other use
    top_terms.json                    what sets each expert's cluster apart
    tokenizer files, generation_config.json, README.md
    files.json                        the record, with the hash of every file

Weights of the run are hard links where the file system has them, so the folder costs almost no space. All
other files are its own. No file knows where it lies: the folder can be moved and copied.
"""

import shutil
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from cbtm_pipeline.base import artifact, inside
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.base.publish import link_or_copy
from cbtm_pipeline.corpus import tokenizer_config
from cbtm_pipeline.provenance import made_from

CODE = "modeling_cbtm.py"
CONFIG = "config.json"
FILES = "files.json"
TERMS = "top_terms.json"
MODEL_TYPE = "cbtm"
AGAIN = "Export or make it again."  # the advice for a file of an ensemble that is not what it was
# An expert's README.md stays behind: people may edit it, and the ensemble's own describes every expert.
EXPERT_FILES = (CONFIG, "generation_config.json", "model.safetensors", "card.json")

SIZES = {  # what tools ask a model for, and how models call it
    "hidden_size": ("n_embd", "hidden_size"),
    "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    "num_attention_heads": ("n_head", "num_attention_heads"),
    "max_position_embeddings": ("n_positions", "max_position_embeddings"),
    "dtype": ("dtype",),
}


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
    top_terms: Path | None = None  # cluster/top_terms.json


def write(parts: Parts, out: Path, meta: dict[str, Any], link: bool = True) -> None:
    """Write the folder of `out`, and `out` (files.json, the record) last. An ensemble that is there goes.

    `meta` gets the entries `files`, the hash of each file, and `computes`, the identity of what the model
    says. Raises ValueError for a folder that holds something else.
    """
    folder = out.parent
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    artifact.write_json(folder / CONFIG, config(parts))
    for name, source in parts.experts.items():
        for file in EXPERT_FILES:
            if (source / file).exists():
                place(source / file, folder / "experts" / name / file, link)
    for path in tokenizer_files(parts.tokenizer):
        place(path, folder / path.name, link=False)
    n_positions = tokenizer_config.n_positions(config(parts))
    tokenizer_config.write(folder, n_positions, _n_rows(parts), parts.separator_id)
    if parts.top_terms:
        place(parts.top_terms, folder / TERMS, link=False)
    tensors = {"embedding": parts.embedding_VD, "centres": parts.centres_KD}
    with artifact.publish(folder / "router.safetensors") as tmp:
        tmp.write_bytes(save({k: np.ascontiguousarray(value, np.float32) for k, value in tensors.items()}))
    artifact.write_json(folder / "generation_config.json", _generation(parts.separator_id))
    for name, text in ((CODE, code()), ("README.md", parts.readme)):
        with artifact.publish(folder / name) as tmp:
            tmp.write_text(text, "utf-8")
    hashes = {str(path.relative_to(folder)): artifact.identity(path) for path in files(folder)}
    computes = made_from.computes(config(parts), hashes)
    artifact.write_sealed(out, {**meta, "files": hashes, "computes": computes})


def code() -> str:
    """The model's own source, which travels with it."""
    return resources.files("cbtm_pipeline.inference").joinpath(CODE).read_text("utf-8")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer: those that its card names, if it has one."""
    card = folder / "card.json"
    if card.exists():
        names = sorted(artifact.read_sealed(card, "tokenizer")["files"])
        inside.check(card, names, make_again(card))
        return [folder / name for name in names]
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def config(parts: Parts) -> dict[str, Any]:
    """The content of config.json. Sizes that tools ask a model for are those of the first expert."""
    first = artifact.read_json(next(iter(parts.experts.values())) / CONFIG)
    sizes = {name: first[own] for name, names in SIZES.items() for own in names if own in first}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["CBTMForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE[:-3]}.CBTMConfig",
            "AutoModelForCausalLM": f"{CODE[:-3]}.CBTMForCausalLM",
        },
        "experts": list(parts.experts),
        "n_components": parts.embedding_VD.shape[1],
        "vocab_size": parts.vocab_size,
        **_roles(parts.separator_id),
        **sizes,
        **parts.settings,
    }


def _n_rows(parts: Parts) -> int:
    """The rows of the experts' embeddings: fewer than the tokenizer has tokens, where some have none."""
    first = artifact.read_json(next(iter(parts.experts.values())) / CONFIG)
    return first.get("vocab_size", parts.vocab_size)


def _roles(separator_id: int) -> dict[str, int]:
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), separator_id)


def _generation(separator_id: int) -> dict[str, Any]:
    return {"_from_model_config": False, **_roles(separator_id)}


def files(folder: Path) -> list[Path]:
    """All files of the folder but its record and hidden ones, sorted."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in found if path != folder / FILES)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an ensemble's folder. Raises ValueError if there is none, or if it is damaged."""
    if not (folder / FILES).is_file():
        _refuse_model(folder)
        raise ValueError(
            f"{folder}: no ensemble. Expected {FILES}, which a run writes into <outdir>/ensemble. "
            "Finish a run, or name the folder of an ensemble."
        )
    if artifact.read_json(folder / FILES).get("kind") == "expert_files":
        _refuse_model(folder)
    record = artifact.read_sealed(folder / FILES, "ensemble")
    inside.check(folder / FILES, record["files"], AGAIN)
    return record


def _refuse_model(folder: Path) -> None:
    """Raise ValueError if the folder is that of one model, such as an expert."""
    try:
        found = artifact.read_json(folder / CONFIG)
    except (OSError, ValueError):
        return
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind not in (None, MODEL_TYPE):
        what = "an expert" if (folder / "card.json").is_file() else f"one model ({kind})"
        todo = "Name the folder of an ensemble, such as results/ensemble"
        raise ValueError(f"{folder}: {what}. Expected an ensemble. {todo}.")


def check_there(folder: Path, name: str) -> None:
    """Raise ValueError if a file that the record of the folder names is missing."""
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: missing. Expected the file that {FILES} names. {AGAIN}")


def check_file(folder: Path, record: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless this file of an ensemble is there, as it was written."""
    check_there(folder, name)
    artifact.check_file(folder / name, record["files"][name], AGAIN)


def verify(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """The record of a folder whose files, those that are `wanted`, are as they were written.

    Raises ValueError otherwise.
    """
    record = read_record(folder)
    for name in record["files"]:
        if wanted(name):
            check_file(folder, record, name)
    return record


def expert_identity(record: Mapping[str, Any], name: str) -> str:
    """The identity of an expert of an ensemble: of all its files there."""
    own = f"experts/{name}/"
    return artifact.fingerprint({file: h for file, h in record["files"].items() if file.startswith(own)})


def copy(folder: Path, to: Path) -> None:
    """Copy the folder, verified, with modes that everybody can read; the record comes last.

    Raises ValueError if `to` is not empty or lies in the folder, or if a file has changed.
    """
    check_new(to, folder)
    record = verify(folder)
    for name in [*record["files"], FILES]:
        with artifact.publish(to / name) as tmp:
            shutil.copyfile(folder / name, tmp)
            tmp.chmod(0o644)
    for path in [to, *(path for path in to.rglob("*") if path.is_dir())]:
        path.chmod(0o755)


def check_new(to: Path, folder: Path) -> None:
    """Raise ValueError if `to` is not empty or lies in the folder."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to}: not empty. Expected a new folder. Give another name.")
    if to.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{to}: within {folder}. Expected a folder elsewhere. Give another name.")


def _clear(folder: Path) -> None:
    """Remove an earlier ensemble; config.json, which says that it is one, last.

    Raises ValueError if the folder holds something else.
    """
    entries = sorted(folder.iterdir(), key=lambda path: path.name == CONFIG)
    if entries and not _is_ours(folder):
        raise ValueError(
            f"{folder}: holds no ensemble, but other files. Expected a folder of its own. Name another one."
        )
    for path in entries:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_ours(folder: Path) -> bool:
    """Whether config.json is there and that of an ensemble."""
    try:
        found = artifact.read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("model_type") == MODEL_TYPE


def place(path: Path, to: Path, link: bool) -> None:
    """Put a hard link to a file of weights at `to`, or a copy.

    Other files are always copied: transformers writes JSON in place, and would change both ends of a link.
    """
    with artifact.publish(to) as tmp:
        (link_or_copy if link and path.suffix == ".safetensors" else shutil.copyfile)(path, tmp)
