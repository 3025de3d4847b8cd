"""Find and load an encoder, from a folder or the hub, with the files that sentence-transformers wrote.

This module and `sentence_modules` read those files themselves. The library imports classes that the files
name, from its own package and from torch, and it reads pickled weights where safetensors are missing. It
would also be one more dependency. Here, a fixed list of modules is known, weights must be safetensors, code
that comes with a model is never run, and no module's path may lead out of the folder. The tests compare every
pooling mode, Dense and Normalize with their formulas, computed in NumPy on one window at a time.

Without modules.json, the vector is the mean of the hidden states. This needs a model whose tokens see both
sides. A trial on one window decides whether it is such a model, not the model's config.

Shapes: B windows, T tokens, H hidden size, D dimensions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cbtm_pipeline.base import artifact, device, hub
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.base.errors import first_sentence
from cbtm_pipeline.base.lean import be_quiet
from cbtm_pipeline.corpus import encoding
from cbtm_pipeline.embedding import encoder, sentence_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# of a window, even if the model could read more: topics show early, and the cost of attention grows with the
# square
MAX_TOKENS = 512
FILES = (
    *("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    *("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "*.model"),
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json"),
)


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of an encoder given by its path or its name on the hub.

    Asks the hub only for what is not downloaded yet. Raises ValueError when the encoder cannot be had.
    """
    expected = "config.json, a tokenizer and safetensors weights"
    return hub.fetch("embed.encoder", name, revision, lacks, FILES, expected, ("modules.json",))


def lacks(folder: Path | None) -> list[str]:
    """Files that an encoder needs and that are not in its folder."""
    if folder is None:
        return ["the encoder"]
    (_, first), *others = sentence_modules.read(folder)
    missing = [*hub.lacks_weights(folder / first), *hub.lacks_tokenizer(folder / first)]
    return missing + sentence_modules.lacks(folder, others)


def hidden_size(folder: Path | None) -> int | None:
    """Numbers in a hidden state, about as many as in a vector; None if config.json does not give it."""
    if folder is None:
        return None
    config = sentence_modules.read_json(folder / sentence_modules.read(folder)[0][1] / "config.json")
    sizes = (config.get(key) for key in ("hidden_size", "d_model", "dim"))
    return next((size for size in sizes if isinstance(size, int)), None)


def load(name: str, n_windows: int, revision: str | None = None) -> encoder.Encoder:
    """The encoder in a folder or on the hub, on the GPU if there is one.

    It reads at most `n_windows` windows of a text. Raises ValueError for an encoder that is missing, whose
    files do not fit together, that needs code of its own, or that is no encoder of text.
    """
    where = f"embed.encoder: {name}"
    folder = fetch(name, revision)
    (_, first), *others = sentence_modules.read(folder)
    net, tokenizer = _load(folder / first, where)
    config_files = sorted((folder / first).glob("sentence_*_config.json"))
    config = next((sentence_modules.read_json(path) for path in config_files), {})
    pooling, heads = sentence_modules.load(folder, others, where)
    sentence_config = sentence_modules.read_json(folder / "config_sentence_transformers.json")
    if prompt := sentence_config.get("default_prompt_name"):
        log.warning("%s: its default prompt, %s, is left out", name, prompt)
    try:
        _check_vocabulary(net, tokenizer)
        before, after = _special(tokenizer)
        loaded = encoder.Encoder(
            name=name,
            commit=hub.commit(folder),
            identity=_identity(folder, ["", first, *(path for _, path in others)]),
            net=net,
            tokenizer=tokenizer,
            before=before,
            size=_size(net, tokenizer, config.get("max_seq_length"), len(before) + len(after)),
            after=after,
            n_windows=n_windows,
            lower=bool(config.get("do_lower_case")),
            pooling=pooling,
            heads=heads,
            n_components=0,
        )
        device.move(net)
        n_components = encoder.forward(loaded, encoder.tokenise(loaded, ["a"])).shape[1]
        if not others and not _sees_both_sides(loaded):
            raise ValueError("its tokens see one side only, and no modules.json defines the pooling")
    except Exception as error:  # each model class fails in its own way
        raise ValueError(
            f"{where}: does not run ({first_sentence(error)}). Expected an encoder of text. "
            "Choose another one."
        ) from error
    details = f"windows of {loaded.size} tokens, pooling {'+'.join(pooling)}, {n_components} components"
    log.info("%s: %s, on %s", name, details, net.device.type)
    return loaded._replace(n_components=n_components)


def _load(folder: Path, where: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model, in float32, and its tokenizer.

    Raises ValueError if transformers cannot load them, or misses weights.
    """
    from transformers import (
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForTextEncoding,
        AutoTokenizer,
    )

    be_quiet()
    try:
        config = hub.load(AutoConfig, folder)
        # the text encoding class of T5 leaves out its decoder
        has_own_class = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
        auto: Any = AutoModelForTextEncoding if has_own_class else AutoModel
        loaded = hub.load(auto, folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        tokenizer = hub.load(AutoTokenizer, folder)
        if tokenizer.is_fast:
            encoding.always_alike(tokenizer.backend_tokenizer)
    except Exception as error:  # transformers, its model classes and safetensors raise errors of their own
        raise ValueError(
            f"{where}: cannot be loaded ({first_sentence(error)}). Expected an encoder of text. "
            "Choose another one."
        ) from error
    net, info = loaded
    missing = [key for key in info["missing_keys"] if "pooler." not in key]
    wrong = sorted([*missing, *(key for key, *_ in info["mismatched_keys"])])
    if wrong:
        raise ValueError(
            f"{where}: no fitting weights for {', '.join(wrong[:3])}. Expected every weight. "
            "Check config.json."
        )
    return net.eval(), tokenizer


def _check_vocabulary(net: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ValueError if the tokenizer has more tokens than the model has embeddings."""
    embeddings: Any = net.get_input_embeddings()
    n = embeddings.weight.shape[0]
    if n < len(tokenizer):
        raise ValueError(f"a vocabulary of {n}, while its tokenizer has {len(tokenizer)} tokens")


def _sees_both_sides(loaded: encoder.Encoder) -> bool:
    """Whether the model's hidden state of a window's first token depends on the window's last token."""
    first = loaded._replace(pooling=("cls",))
    ids = list(range(min(8, loaded.size)))
    changed, same = encoder.forward(first, [ids, [*ids[:-1], 0]])
    return bool((changed - same).abs().max() > 1e-4 * same.abs().max())


def _size(
    net: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_seq_length: Any, n_special: int
) -> int:
    """Tokens of text in a window: the least of all limits, less the special tokens.

    Raises ValueError if none is left.
    """
    limits = [MAX_TOKENS, max_seq_length, tokenizer.model_max_length, *_n_positions(net)]
    size = min(n for n in limits if isinstance(n, int) and n > 0) - n_special
    if size < 1:
        raise ValueError(f"{n_special} special tokens leave no room for text")
    return size


def _n_positions(net: "PreTrainedModel") -> list[int]:
    """Numbers of tokens that the model has positions for, from its config and from its tables.

    RoBERTa's positions begin after the row of the padding.
    """
    tables = [
        m
        for name, m in net.named_modules()
        if isinstance(m, torch.nn.Embedding) and name.endswith("position_embeddings")
    ]
    usable = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1) for table in tables
    ]
    return [getattr(net.config.get_text_config(), "max_position_embeddings", None) or 0, *usable]


def _special(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    encoded: Any = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    return ids[: mask.index(0)], ids[len(ids) - mask[::-1].index(0) :]


def _identity(folder: Path, subfolders: Sequence[str]) -> str:
    """A hash of the names and contents of all files of an encoder that matter."""
    paths = {
        path for subfolder in subfolders for pattern in FILES for path in (folder / subfolder).glob(pattern)
    }
    return artifact.fingerprint({str(path.relative_to(folder)): artifact.identity(path) for path in paths})
