"""The one way to the Hugging Face hub: every model, tokenizer and encoder that has a name on it comes through here.

A name is either a local folder or a repository on the hub, at `revision` (a commit, tag or branch; None: its main
branch). What is complete in the local cache is never asked for again: `local_folder` and the functions `lacks_...`
decide that, for the pipeline and for `cbtm doctor` alike. Only safetensors weights are read, and no code that comes with
a model is ever run.
"""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cbtm_pipeline.base.cli import log
from cbtm_pipeline.base.errors import first_sentence

TIMEOUT_S = 4.0  # of one question to the hub; a download may take as long as it likes
WEIGHTS = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
WEIGHTS += ("model-*-of-*.safetensors",)
TOKENIZER = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER += ("vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.jinja")


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model on this machine: `name` itself, or where the cache has it; None if it has nothing of it."""
    import huggingface_hub  # takes half a second, and most commands do without

    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not there, or no possible name
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
    """The folder of a model, downloaded if the local one lacks anything. `key` is the config key that gives the name.

    `lacks` says what a folder lacks; `files` are the patterns to download; `expected` names in words what is needed.
    The hub is also asked for `optional` files that are not here: the repository may have them. Raises ValueError when
    the model cannot be had.
    """
    folder = local_folder(name, revision)
    unsure = folder is None or any(not (folder / file).exists() for file in optional)
    if not Path(name).is_dir() and (lacks(folder) or unsure):
        folder = _download(key, name, revision, files, folder, expected)
    if missing := lacks(folder):
        raise ValueError(
            f"{key}: {name}: {folder} lacks {', '.join(missing[:3])}. Expected {expected}. Complete it, or choose another one."
        )
    assert folder is not None
    return folder


def _download(
    key: str, name: str, revision: str | None, files: Sequence[str], folder: Path | None, expected: str
) -> Path:
    """Download the files. If the hub does not answer, what `folder` has must do; raises ValueError where it is None."""
    from huggingface_hub import HfApi, snapshot_download

    log.info("%s is not all downloaded, asking the hub", name)
    patterns = [pattern for file in files for pattern in (file, f"*/{file}")]
    at = f" --revision {revision}" if revision else ""
    try:
        # snapshot_download alone would wait for ever for a hub that does not answer
        HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=TIMEOUT_S)
        )
    except Exception as error:  # errors of the name, the network and the hub have no common type
        if folder is None:
            raise ValueError(
                f"{key}: {name}: not found ({first_sentence(error)}). Expected a folder or a name on the hub, with "
                f"{expected}. Check the name; if it is right, run hf download {name}{at} where there is a network."
            ) from error
        log.warning("%s: the hub does not answer (%s); using what is downloaded", name, first_sentence(error))
        return folder


def load(auto_class: Any, folder: Path, **options: Any) -> Any:
    """`auto_class.from_pretrained(folder)`: from local files only, and without running code that comes with the model."""
    return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


def lacks_weights(folder: Path | None) -> list[str]:
    """Files that a model needs and its folder does not have."""
    if folder is None:
        return ["the model"]
    index, single = folder / "model.safetensors.index.json", "model.safetensors"
    try:
        names = (
            set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.exists() else {single}
        )
    except (ValueError, KeyError, AttributeError):
        return [f"a whole {index.name}"]
    return [name for name in ["config.json", *sorted(names)] if not (folder / name).exists()]


def lacks_tokenizer(folder: Path | None) -> list[str]:
    """Files that a tokenizer needs and its folder does not have. It may be stored in several ways."""
    if folder is None:
        return ["the tokenizer"]
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
    return [] if any((folder / name).exists() for name in names) else [names[0]]


def cache() -> Path:
    """The folder in which downloads are kept."""
    import huggingface_hub

    return Path(huggingface_hub.constants.HF_HUB_CACHE)


def problem(name: str, revision: str | None = None) -> str | None:
    """Why a model cannot be had from the hub now; None if it can."""
    import huggingface_hub

    at = f"/revision/{revision}" if revision else ""
    url = f"{huggingface_hub.constants.ENDPOINT}/api/models/{name}{at}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        gone = f"no public {name}{f' at {revision}' if revision else ''}"
        return gone if error.code in (401, 403, 404) else f"{url} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"{huggingface_hub.constants.ENDPOINT} does not answer ({getattr(error, 'reason', error)})"
