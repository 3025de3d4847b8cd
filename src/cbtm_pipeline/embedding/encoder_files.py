"""Where an encoder comes from: a folder or the hub, safetensors only, and no code that comes with a model is run.

modules.json and what it names tell how a window's hidden states become a vector, as sentence-transformers wrote them: Pooling, then Dense
and Normalize. Without that file it is their mean, provided that the model looks at both sides of a token: that is tried out, not believed.

Shapes: B windows, T tokens, H hidden size, D dimensions.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from cbtm_pipeline.base import artifact, device, hub
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.base.errors import first_sentence
from cbtm_pipeline.embedding import encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = (
    512  # of a window, where the model could read more: topics show early, and attention costs the square
)
FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "vocab.txt",
)
FILES += (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
)
FILES += ("modules.json", "sentence_*_config.json", "config_sentence_transformers.json")
NEEDED = {"Pooling": ["config.json"], "Dense": ["config.json", "model.safetensors"], "Normalize": []}
OLD_POOLING = (
    "cls_token",
    "max_tokens",
    "mean_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)  # as encoder.POOLING
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of an encoder given by its path or its name on the hub.

    The hub is asked only for what is not downloaded yet. Raises ValueError when the encoder cannot be had.
    """

    expected = "config.json, a tokenizer and safetensors weights"
    return hub.fetch("embed.encoder", name, revision, lacks, FILES, expected, ("modules.json",))


def lacks(folder: Path | None) -> list[str]:
    """Files that an encoder needs and that are not in its folder."""
    if folder is None:
        return ["the encoder"]
    (_, first), *others = _modules(folder)
    missing = [*hub.lacks_weights(folder / first), *hub.lacks_tokenizer(folder / first)]
    return missing + [
        f"{path}/{file}"
        for kind, path in others
        for file in NEEDED[kind]
        if not (folder / path / file).exists()
    ]


def hidden_size(folder: Path | None) -> int | None:
    """Numbers in a hidden state, about as many as in a vector; None where config.json is not there or does not say."""
    about = _json(folder / _modules(folder)[0][1] / "config.json") if folder else {}
    return next(
        (about[key] for key in ("hidden_size", "d_model", "dim") if isinstance(about.get(key), int)), None
    )


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(kind, subfolder) of each module of modules.json; without that file, one Transformer. Raises ValueError for kinds not known here."""
    path = folder / "modules.json"
    if not path.exists():
        return [("Transformer", "")]
    try:
        modules = [
            (str(module["type"]), str(module["path"])) for module in json.loads(path.read_text("utf-8"))
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a list of modules ({error}). Expected type and path of each. Get the encoder again."
        ) from error
    kinds = [module.rpartition(".")[2] for module, _ in modules]
    unknown = [
        module
        for (module, _), kind in zip(modules, kinds, strict=True)
        if not module.startswith("sentence_transformers.")
    ]
    unknown += [kind for kind in kinds[2:] if kind not in ("Dense", "Normalize")]
    if unknown or kinds[:2] != ["Transformer", "Pooling"]:
        raise ValueError(
            f"{path}: {', '.join(unknown or kinds)}. Expected Transformer and Pooling, then Dense and Normalize at most. "
            "Choose another encoder for embed.encoder."
        )
    return [(kind, subfolder) for kind, (_, subfolder) in zip(kinds, modules, strict=True)]


def load(name: str, n_windows: int, revision: str | None = None) -> encoder.Encoder:
    """The encoder of a folder or a name on the hub, on the GPU where there is one; of a text it reads `n_windows` windows at most.

    Raises ValueError for one that is not there, whose files do not fit together, that needs code of its own, or that is no encoder of text.
    """
    where = f"embed.encoder: {name}"
    folder = fetch(name, revision)
    (_, first), *others = _modules(folder)
    net, tokenizer = _load(folder / first, where)
    about = next((_json(path) for path in sorted((folder / first).glob("sentence_*_config.json"))), {})
    pooling, heads = ("mean",), []
    for kind, path in others:
        config = _json(folder / path / "config.json") if NEEDED[kind] else {}
        if kind == "Pooling":
            pooling = _pooling(config, where)
        else:
            heads.append(_dense(folder / path, config, where) if kind == "Dense" else normalize)
    if prompt := _json(folder / "config_sentence_transformers.json").get("default_prompt_name"):
        log.warning("%s: its default prompt, %s, is left out", name, prompt)
    limits = [MAX_TOKENS, about.get("max_seq_length"), tokenizer.model_max_length, *_n_positions(net)]
    try:
        embeddings: Any = net.get_input_embeddings()
        if embeddings.weight.shape[0] < len(tokenizer):
            raise ValueError(
                f"a vocabulary of {embeddings.weight.shape[0]}, while its tokenizer has {len(tokenizer)} tokens"
            )
        before, after = _special(tokenizer)
        size = min(n for n in limits if isinstance(n, int) and n > 0) - len(before) - len(after)
        if size < 1:
            raise ValueError(f"{len(before) + len(after)} special tokens leave no room for text")
        lower, identity = (
            bool(about.get("do_lower_case")),
            _identity(folder, ["", first, *(path for _, path in others)]),
        )
        loaded = encoder.Encoder(
            name,
            hub.commit(folder),
            identity,
            net,
            tokenizer,
            before,
            size,
            after,
            n_windows,
            lower,
            pooling,
            heads,
            0,
        )
        device.move(net)
        h_BD = encoder.forward(loaded, encoder.tokenise(loaded, ["a"]))
        if not others and not _looks_ahead(loaded):
            raise ValueError(
                "it looks at one side of a token only, and no modules.json says how it is pooled"
            )
    except Exception as error:  # models have as many ways to fail as there are of them
        raise ValueError(
            f"{where}: does not run ({first_sentence(error)}). Expected an encoder of text. Choose another one."
        ) from error
    log.info(
        "%s: windows of %d tokens, pooling %s, %d components, on %s",
        name,
        size,
        "+".join(pooling),
        h_BD.shape[1],
        net.device.type,
    )
    return loaded._replace(n_components=h_BD.shape[1])


def _load(folder: Path, where: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    from transformers import (
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForTextEncoding,
        AutoTokenizer,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        config = hub.load(AutoConfig, folder)
        auto: Any = (
            AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        )  # T5 without its decoder
        loaded = hub.load(auto, folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        tokenizer = hub.load(AutoTokenizer, folder)
    except Exception as error:  # transformers, its model classes and safetensors have errors of their own
        raise ValueError(
            f"{where}: cannot be loaded ({first_sentence(error)}). Expected an encoder of text. Choose another one."
        ) from error
    net, info = loaded
    wrong = sorted(
        [
            *(key for key in info["missing_keys"] if "pooler." not in key),
            *(key for key, *_ in info["mismatched_keys"]),
        ]
    )
    if wrong:
        raise ValueError(
            f"{where}: no fitting weights for {', '.join(wrong[:3])}. Expected every weight. Check config.json."
        )
    return net.eval(), tokenizer


def _looks_ahead(loaded: encoder.Encoder) -> bool:
    """Whether what the model says of a window's first token depends on its last one."""
    first = loaded._replace(pooling=("cls",))
    ids = list(range(min(8, loaded.size)))
    changed, same = encoder.forward(first, [ids, [*ids[:-1], 0]])
    return bool((changed - same).abs().max() > 1e-4 * same.abs().max())


def _n_positions(net: "PreTrainedModel") -> list[int]:
    """How many tokens the model has positions for, as its config says and its tables do: RoBERTa's begin behind the padding's row."""
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


def _pooling(config: dict[str, Any], where: str) -> tuple[str, ...]:
    """The ways of pooling that a Pooling module concatenates, in its order. Raises ValueError for an unknown one."""
    named = config.get("pooling_mode")
    old = [
        how
        for how, key in zip(encoder.POOLING, OLD_POOLING, strict=True)
        if config.get(f"pooling_mode_{key}")
    ] or ["mean"]
    found = tuple(old if named is None else [named] if isinstance(named, str) else named)
    if unknown := set(found) - set(encoder.POOLING):
        raise ValueError(
            f"{where}: pooling {', '.join(sorted(unknown))}. Expected {', '.join(encoder.POOLING)}. Choose another encoder."
        )
    return found


def _dense(folder: Path, config: dict[str, Any], where: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A Dense module: a linear layer and its activation. Raises ValueError for one that does more."""
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    weights = load_file(folder / "model.safetensors")
    if activation not in ACTIVATIONS or not {"linear.weight"} <= weights.keys() <= {
        "linear.weight",
        "linear.bias",
    }:
        found = f"{activation} of {', '.join(sorted(weights))}"
        raise ValueError(
            f"{where}: {folder.name} is {found}. Expected one linear layer and {', '.join(ACTIVATIONS)}. Choose another encoder."
        )
    linear = torch.nn.Linear(*weights["linear.weight"].shape[::-1], bias="linear.bias" in weights)
    linear.load_state_dict({key.removeprefix("linear."): value.float() for key, value in weights.items()})
    return torch.nn.Sequential(linear, getattr(torch.nn, activation)()).to(device.best()).eval()


def _identity(folder: Path, subfolders: Sequence[str]) -> str:
    paths = {
        path for subfolder in subfolders for pattern in FILES for path in (folder / subfolder).glob(pattern)
    }
    return artifact.fingerprint({str(path.relative_to(folder)): artifact.identity(path) for path in paths})


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that an encoder may lack."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: not a JSON object ({error}). Expected one. Get the encoder again."
        ) from error
