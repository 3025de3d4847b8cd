"""A pretrained tokenizer, loaded from its folder and checked. The rule and `cbtm doctor` both ask here."""

import importlib
import re
from pathlib import Path
from typing import Any

from cbtm_pipeline.base import hub
from cbtm_pipeline.base.errors import first_sentence
from cbtm_pipeline.corpus import encoding

# What reads a vocabulary that is not tokenizer.json: the modules to import, and the packages that have them.
_READERS = {
    "sentencepiece": (("sentencepiece", "sentencepiece.sentencepiece_model_pb2"), "sentencepiece protobuf"),
    "tiktoken": (("tiktoken",), "tiktoken"),
}
_TIKTOKEN = re.compile(
    rb"[A-Za-z0-9+/]+=* \d+\r?\n"
)  # a line of tiktoken's files: a token in base 64, its id


def load(key: str, source: str, folder: Path) -> Any:
    """The tokenizer in a folder, as `AutoTokenizer` loads it, but without what draws numbers.

    `key` is the config key that gives the name `source`. Raises ValueError for a tokenizer that cannot be
    loaded, is not fast, or has neither a bos nor an eos token.
    """
    from transformers import AutoTokenizer  # takes seconds, which a trained tokenizer does not need

    try:
        tokenizer = hub.load(AutoTokenizer, folder)
    except Exception as error:  # format errors have many types
        _refuse_unreadable(key, source, folder)
        raise ValueError(
            f"{key}: {source} cannot be loaded ({first_sentence(error)}). "
            "Expected a folder or a repository with tokenizer.json. Choose another one."
        ) from error
    if not tokenizer.is_fast:
        _refuse_unreadable(key, source, folder)
        raise ValueError(
            f"{key}: {source} has no tokenizer.json. Expected a fast tokenizer. "
            "Convert it, or choose another."
        )
    if not separators(tokenizer):
        raise ValueError(
            f"{key}: {source} has neither a bos nor an eos token. Expected one to separate documents. "
            "Set bos_token in its tokenizer_config.json."
        )
    encoding.always_alike(tokenizer.backend_tokenizer)
    return tokenizer


def separators(tokenizer: Any) -> list[int]:
    """The ids that may separate documents, the best first: bos, eos."""
    return [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]


def vocab_size(tokenizer: Any) -> int:
    """One more than the largest id that the tokenizer knows."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def _refuse_unreadable(key: str, source: str, folder: Path) -> None:
    """Raise ValueError for a tokenizer that only another library could read, if that library is not here."""
    found = sorted(folder.glob("*.model"))
    if (folder / "tokenizer.json").exists() or not found:
        return
    with found[0].open("rb") as file:
        kind = "tiktoken" if _TIKTOKEN.match(file.read(4096)) else "sentencepiece"
    modules, packages = _READERS[kind]
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # missing, or of a version that does not fit another package's
            raise ValueError(
                f"{key}: {source} has only {found[0].name}, a vocabulary of {kind}, which cannot be read "
                f"here ({first_sentence(error)}). Expected tokenizer.json, or what reads {found[0].name}. "
                f"Run pip install --upgrade {packages} and start again."
            ) from error
