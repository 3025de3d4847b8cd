"""The only way to the Hugging Face hub: this module finds, downloads and loads pretrained models.

A name is either a local folder or a repository on the hub, at `revision` (a commit, tag or branch; None: its
main branch). A model that is complete in the local cache is not asked for again. `local_folder` and the
functions `lacks_...` decide that, for the pipeline and for `cbtm doctor` alike. Only safetensors weights are
read. Code that comes with a model is never run, and no file outside its folder is read because a file of the
model names it.
"""

import http.client
import json
import re
import shlex
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cbtm_pipeline.base import inside
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.base.errors import first_sentence

TIMEOUT_S = 4.0  # of one request to the hub; a download has no limit
INDEX = "model.safetensors.index.json"
WEIGHTS = ("config.json", "generation_config.json", "model.safetensors", INDEX)
WEIGHTS += ("model-*-of-*.safetensors",)
TOKENIZER = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZER += ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja")


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model on this machine: `name` itself, or its folder in the cache; else None."""
    import huggingface_hub  # takes half a second, and most commands do not need it

    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # it is not in the cache, or the name is not possible
        return None


def commit(folder: Path) -> str | None:
    """The commit of a repository whose folder lies in the cache; None for any other folder."""
    in_cache = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if in_cache else None


def fetch(
    key: str,
    name: str,
    revision: str | None,
    lacks: Callable[[Path | None], list[str]],
    files: Sequence[str],
    expected: str,
    optional: Sequence[str] = (),
) -> Path:
    """The folder of a model. Downloads the model first if the local folder lacks a file.

    `key` is the config key that holds the name, `expected` describes the needed files; both appear in errors.
    `lacks` lists the files that a folder lacks, `files` are the patterns to download. The hub is also asked
    if a file of `optional` is not here, because the repository may have it. Raises ValueError if the model
    cannot be had.
    """
    if not Path(name).is_dir() and not could_be_on_the_hub(name):
        raise ValueError(f"{key}: {name}: no such folder. Expected {expected} in it. Correct the path.")
    folder = local_folder(name, revision)
    unsure = folder is None or any(not (folder / file).exists() for file in optional)
    if not Path(name).is_dir() and (lacks(folder) or unsure):
        folder = _download(key, name, revision, files, folder, expected)
    if missing := lacks(folder):
        found = f"{key}: {name}: {folder} lacks {', '.join(missing[:3])}"
        todo = (
            "Complete it" if Path(name).is_dir() else f"Run {advice(name, revision)} where there is a network"
        )
        raise ValueError(f"{found}. Expected {expected}. {todo}, or choose another one.")
    assert folder is not None
    return folder


def _download(
    key: str, name: str, revision: str | None, files: Sequence[str], folder: Path | None, expected: str
) -> Path:
    """Download the files.

    If the hub does not answer, return the local `folder`; raise ValueError without one.
    """
    from huggingface_hub import HfApi, snapshot_download

    log.info("%s is not all downloaded, asking the hub", name)
    patterns = [pattern for file in files for pattern in (file, f"*/{file}")]
    try:
        # first a request with a time limit: snapshot_download alone may wait for ever for a hub that hangs
        HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=TIMEOUT_S)
        )
    except Exception as error:  # a wrong name, the network and the hub raise unrelated types
        if folder is None:
            todo = f"Check the name; if it is right, run {advice(name, revision)} where there is a network."
            raise ValueError(
                f"{key}: {name}: not found ({first_sentence(error)}). "
                f"Expected a folder or a name on the hub, with {expected}. {todo}"
            ) from error
        log.warning("%s: the hub does not answer (%s); using the local files", name, first_sentence(error))
        return folder


def could_be_on_the_hub(name: str) -> bool:
    """Whether a name has the form of a repository's: `model` or `owner/model`."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name, re.ASCII) is not None and not Path(name).exists()
    )


def advice(name: str, revision: str | None) -> str:
    """The command that downloads a model by hand."""
    offline = "env HF_HUB_OFFLINE=0 " if _is_offline() else ""
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    return f"{offline}hf download {shlex.quote(name)}{at}"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def load(auto_class: Any, folder: Path, **options: Any) -> Any:
    """`auto_class.from_pretrained(folder)` from local files only. Never runs code that comes with the model.

    Raises what transformers raises, also for a model that needs its own code; and ValueError for a model
    whose files lead out of the folder.
    """
    check(folder)
    return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


def check(folder: Path) -> None:
    """Raise ValueError for a model that would make transformers read or run what is not in its folder.

    An index of weights may name any file, an adapter names another model, and a name such as owner/kernel as
    its attention is code on the hub. A pipe or a device would be read for ever.
    """
    if outside := [name for name in _weights_in(folder) if not inside.is_inside(name)]:
        raise ValueError(f"{INDEX} names {outside[0]}, outside its folder. Expected weights in it")
    if strange := [path.name for path in folder.iterdir() if path.exists() and not _is_plain(path)]:
        raise ValueError(f"{strange[0]} is a pipe or a device. Expected files")
    if (folder / "adapter_config.json").exists():
        raise ValueError("an adapter, whose weights belong to another model. Expected a whole model")
    if kernel := _kernel(_json(folder / "config.json")):
        raise ValueError(f"its attention is {kernel}, code on the hub. Expected one of transformers")


def _is_plain(path: Path) -> bool:
    return path.is_file() or path.is_dir()


def is_quantized(folder: Path) -> bool:
    """Whether a model's config says that its weights are quantized."""
    config = _json(folder / "config.json")
    return isinstance(config, dict) and "quantization_config" in config


def _kernel(value: Any) -> str | None:
    """The name of code on the hub that a config gives for the attention, at any depth."""
    if isinstance(value, list):
        return next(filter(None, map(_kernel, value)), None)
    if not isinstance(value, dict):
        return None
    for key, inner in value.items():
        named = inner.values() if isinstance(inner, dict) else [inner]
        if "attn_implementation" in key and (found := [n for n in named if "/" in str(n)]):
            return str(found[0])
    return _kernel(list(value.values()))


def _weights_in(folder: Path) -> list[str]:
    """The files of weights that an index names, sorted; none without an index, or if it is none."""
    found = _json(folder / INDEX)
    names = found.get("weight_map") if isinstance(found, dict) else None
    return sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []


def _json(path: Path) -> Any:
    """The content of a JSON file; None if there is none, or if it is none."""
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def weights(folder: Path) -> list[str]:
    """The files of weights in a model's folder: those of its index, or the only one."""
    return _weights_in(folder) or ["model.safetensors"]


def lacks_weights(folder: Path | None) -> list[str]:
    """The files that a model needs and its folder does not have; empty if it is complete."""
    if folder is None:
        return ["the model"]
    names = _weights_in(folder) if (folder / INDEX).is_file() else ["model.safetensors"]
    if not names:
        return [f"a whole {INDEX}"]
    if not all(map(inside.is_inside, names)):
        return [f"a {INDEX} that names only files below it"]
    return [name for name in ["config.json", *names] if not (folder / name).is_file()]


def lacks_tokenizer(folder: Path | None) -> list[str]:
    """The files that a tokenizer needs and its folder does not have; any one of several formats is enough."""
    if folder is None:
        return ["the tokenizer"]
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    return [] if any((folder / name).is_file() for name in names) else [names[0]]


def cache() -> Path:
    """The folder of the local cache of downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def problem(name: str, revision: str | None = None) -> str | None:
    """The reason why a model cannot be had from the hub now; None if it can."""
    from huggingface_hub import constants

    if _is_offline():
        return "HF_HUB_OFFLINE is set"
    at = f"/revision/{urllib.parse.quote(revision, safe='')}" if revision else ""
    url = f"{constants.ENDPOINT}/api/models/{urllib.parse.quote(name)}{at}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        gone = f"no public {name}{f' at {revision}' if revision else ''}"
        return gone if error.code in (401, 403, 404) else f"{url} answers {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{constants.ENDPOINT} does not answer ({getattr(error, 'reason', error)})"
