"""Causal language models of transformers: from scratch, a folder or the hub; and the cost of a token.

Any model that `AutoModelForCausalLM` knows can be used if it is causal. A test on a few tokens decides that.
"""

import copy
import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from cbtm_pipeline.base import hub
from cbtm_pipeline.base.errors import first_sentence
from cbtm_pipeline.base.lean import assume_unpacked_sequences, lean_imports
from cbtm_pipeline.corpus import tokenizer_config
from cbtm_pipeline.training import sparse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def scratch(
    keys: Mapping[str, Any], vocab_size: int, separator_id: int, seq_len: int, rng_seed: int
) -> "PreTrainedModel":
    """An untrained model (float32) from section model.scratch: the keys of the class that `model_type` names.

    If `keys` leave them out, the vocabulary, the separator (as begin and end of text) and the number of
    positions are filled in, and dropout is 0. The weights are a function of the config and rng_seed. Raises
    ValueError for keys that the class does not have, and for values that do not make a model.
    """
    with lean_imports():
        assume_unpacked_sequences()
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        keys = copy.deepcopy(dict(keys))
        model_type = _check_model_type(keys.pop("model_type", None))
        config_class = CONFIG_MAPPING[model_type]
        fields = {field.name: field.default for field in dataclasses.fields(config_class)}
        taken = _check_keys(keys, fields, config_class)
        filled_in = _filled_in(fields, vocab_size, separator_id, seq_len)
        own_names = {
            config_class.attribute_map.get(name, name): value
            for name, value in [*filled_in.items(), *keys.items()]  # a later name of the same field counts
        }
        torch.manual_seed(rng_seed % 2**63)
        try:
            config = config_class(**{name: value for name, value in own_names.items() if name in taken})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:  # the type of the error depends on the model
            raise ValueError(
                f"model.scratch: no {model_type} model ({first_sentence(error)}). Expected sizes that fit "
                "together. Change model.scratch."
            ) from error
        check(model, "model.scratch", vocab_size, seq_len)
        return model


def _check_model_type(model_type: Any) -> str:
    """The model type. Raises ValueError if transformers has no causal language model of this type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 1) or ["llama"]
        raise ValueError(
            f"model.scratch.model_type: {model_type}. Expected a causal language model of transformers. "
            f"Did you mean {near[0]}?"
        )
    return model_type


def _check_keys(keys: Mapping[str, Any], fields: Mapping[str, Any], config_class: Any) -> set[str]:
    """The names that the class takes: its fields, and those of `keys` that it takes without declaring them.

    Raises ValueError for a key that is neither of these nor another name of a field.
    """
    known, more = dict(fields) | dict.fromkeys(config_class.attribute_map), set()
    for key, value in keys.items():
        if key not in known and _is_taken(key, value, config_class):
            more.add(key)
        elif key not in known:
            near = difflib.get_close_matches(key, known, 1, 0)[0]
            raise ValueError(
                f"model.scratch.{key}: unknown key. Expected a key of {config_class.__name__} in "
                f"transformers. Did you mean {near}?"
            )
    return {*fields, *more}


def _is_taken(key: str, value: Any, config_class: Any) -> bool:
    """Whether a key has an effect although the class does not declare it.

    Either the model's source reads it from the config, or the class turns it into the value of a field.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    source = Path(inspect.getfile(model_class)).read_text("utf-8")
    name = re.escape(key)
    if re.search(rf"config\.{name}\b|config, ['\"]{name}['\"]", source):
        return True
    try:
        with_key, without = config_class(**{key: value}).to_dict(), config_class().to_dict()
    except Exception:  # the type of the error depends on the class; building the model says what is wrong
        return False
    return any(with_key.get(field) != without.get(field) for field in without)


def _filled_in(fields: Mapping[str, Any], vocab_size: int, separator_id: int, seq_len: int) -> dict[str, Any]:
    """The values of the keys that people need not give."""
    values: dict[str, Any] = {
        name: 0.0 for name, default in fields.items() if "drop" in name and isinstance(default, float)
    }
    return values | {
        "vocab_size": vocab_size,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "pad_token_id": None,
        "max_position_embeddings": seq_len,
    }


def pretrained(
    name: str, revision: str | None, vocab_size: int, seq_len: int
) -> tuple["PreTrainedModel", str | None]:
    """A model (float32) from a local folder or the hub, and its commit on the hub (None for a folder).

    Raises ValueError if the model is not there, is damaged, or does not fit the tokenizer and seq_len.
    """
    where = f"model.pretrained: {name}"
    with lean_imports():
        expected = "config.json and safetensors weights"
        folder = hub.fetch("model.pretrained", name, revision, hub.lacks_weights, hub.WEIGHTS, expected)
        model = load_whole(folder, where)
        check(model, where, vocab_size, seq_len)
        return model, hub.commit(folder)


def load(folder: Path, whole: bool = False) -> "PreTrainedModel":
    """The model (float32) in an expert's folder. Raises ValueError if it cannot be loaded.

    With `whole`, weights for which its config has no place are an error, too.
    """
    with lean_imports():
        return load_whole(folder, str(folder), whole)


def load_whole(folder: Path, where: str, whole: bool = False, **more: Any) -> "PreTrainedModel":
    """Load a model (float32), with `more` options of `from_pretrained`.

    Raises ValueError, which names `where`, if it is damaged or lacks a weight. With `whole`, all weights have
    to be used.
    """
    from transformers import AutoModelForCausalLM

    assume_unpacked_sequences()
    options: Any = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True, **more}
    options["ignore_mismatched_sizes"] = True  # they are in `info`, and refused below
    try:
        _check_size(folder)
        model, info = hub.load(AutoModelForCausalLM, folder, **options)
    except Exception as error:  # transformers, its model classes and safetensors raise errors of their own
        todo = (
            "Choose the model that it was made from"
            if hub.is_quantized(folder)
            else "Save or download it again"
        )
        raise ValueError(
            f"{where}: cannot be loaded ({first_sentence(error)}). Expected a causal language model. {todo}."
        ) from error
    if rounded := next((n for n, p in model.named_parameters() if not p.dtype.is_floating_point), None):
        raise ValueError(
            f"{where}: {rounded} is quantized, and cannot be trained. Expected weights of floating point. "
            "Choose the model that it was made from."
        )
    wrong = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if wrong:
        raise ValueError(
            f"{where}: no fitting weights for {', '.join(wrong[:3])}. Expected every weight. "
            "Check config.json."
        )
    if whole and (left := sorted(info["unexpected_keys"])):
        raise ValueError(
            f"{where}: config.json has no place for {', '.join(left[:3])}. Expected it to fit the weights. "
            "Save the model again."
        )
    return model


def _check_size(folder: Path) -> None:
    """Raise ValueError for weights that are less than half of the model of config.json.

    transformers would make up the rest, which may be more than the memory holds: a config that leaves out the
    sizes is that of a model of 7 B parameters.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    files = [folder / name for name in hub.weights(folder)]
    if hub.is_quantized(folder) or not all(file.is_file() for file in files):
        return
    n_there = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            n_there += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    with torch.device("meta"):
        n_expected = n_parameters(AutoModelForCausalLM.from_config(hub.load(AutoConfig, folder)))
    if n_there < n_expected / 2:
        raise ValueError(f"its weights are {n_there} numbers, and those of its config.json {n_expected}")


def check(model: "PreTrainedModel", where: str, vocab_size: int, seq_len: int) -> None:
    """Raise ValueError unless the model takes the tokenizer's ids and seq_len tokens, and is causal."""
    embeddings: Any = model.get_input_embeddings()
    n_rows = embeddings.weight.shape[0]
    if n_rows < vocab_size:
        raise ValueError(
            f"{where}: a vocabulary of {n_rows}. Expected room for the tokenizer's {vocab_size} tokens. "
            "Use the model's own tokenizer: leave tokenizer.pretrained out, or name the same model there. If "
            "it is that, give the model rows for all tokens, with transformers' "
            f"resize_token_embeddings({vocab_size})."
        )
    n_positions = tokenizer_config.n_positions(model.config.get_text_config())
    if n_positions is not None and n_positions < seq_len:
        raise ValueError(
            f"{where}: {n_positions} positions. Expected at least train.seq_len, {seq_len}. "
            "Lower train.seq_len."
        )
    check_runs(model, where, vocab_size, seq_len)


def check_runs(model: "PreTrainedModel", where: str, vocab_size: int, seq_len: int) -> None:
    """Raise ValueError, which names `where`, unless the model's weights are finite, it runs and is causal.

    It is causal if two texts that differ only in their last token get the same logits before it.
    """
    _check_finite(model, where)
    ids_2T = torch.arange(min(seq_len, 8)).repeat(2, 1) % vocab_size
    ids_2T[1, -1] = (ids_2T[1, -1] + 1) % vocab_size
    was_training = model.training
    try:
        with torch.inference_mode():
            logits = [model.eval()(input_ids=ids[None], use_cache=False).logits[0].float() for ids in ids_2T]
    except Exception as error:
        raise ValueError(
            f"{where}: does not run ({first_sentence(error)}). Expected sizes that fit together. Change them."
        ) from error
    model.train(was_training)
    sparse.router_loss_weight(model, where)
    if logits[0].is_meta:  # a model on the meta device runs, but its logits have no values to compare
        return
    changed_T = (logits[0] - logits[1]).abs().amax(1)
    if not changed_T[:-1].max() <= 1e-4 * changed_T[-1]:
        raise ValueError(
            f"{where}: its predictions depend on later tokens. Expected a causal language model. "
            "Choose another one."
        )


def _check_finite(model: "PreTrainedModel", where: str) -> None:
    """Raise ValueError that names the first tensor with NaN or infinity, and how many more have some.

    A buffer may hold infinity on purpose, as a mask does, so it may not hold NaN only.
    """
    wrong = [name for name, p in model.named_parameters() if not p.is_meta and not bool(p.isfinite().all())]
    wrong += [name for name, b in model.named_buffers() if not b.is_meta and bool(b.isnan().any())]
    if wrong:
        more = f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
        raise ValueError(
            f"{where}: NaN or infinity in {wrong[0]}{more} of its weights. Expected finite numbers. Choose "
            "another model, or train it again with a lower learning rate."
        )


def layers(model: "PreTrainedModel") -> torch.nn.ModuleList:
    """The model's layers, from the first to the last. Raises ValueError for a model without such a list."""
    n = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n)
    if (found := next(lists, None)) is None:
        raise ValueError(
            f"model: {type(model).__name__} has no list of its {n} layers. Expected a decoder of layers that "
            "follow one another. Choose another model."
        )
    return found


FEED_FORWARD = ("mlp", "feed_forward", "ffn", "fc1", "fc2")  # what models call it in a layer


def train_feed_forwards_only(model: "PreTrainedModel") -> None:
    """Freeze all parameters but those of the layers' feed-forwards.

    Raises ValueError for a model whose layers have none that this module knows.
    """
    model.requires_grad_(False)
    blocks = [
        part for layer in layers(model) for name, part in layer.named_children() if name in FEED_FORWARD
    ]
    if not blocks:
        raise ValueError(
            f"train.only: feed-forward, but a layer of {type(model).__name__} has none that is known. "
            f"Expected one named {', '.join(FEED_FORWARD)}. Set train.only to all."
        )
    for block in blocks:
        block.requires_grad_(True)


def n_parameters(model: "PreTrainedModel") -> int:
    """The number of parameters. Those that layers share count once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: "PreTrainedModel", seq_len: int) -> int:
    """Training FLOPs of one token: 6 N + 12 L d T (Chowdhery et al. 2022, appendix B).

    N counts the parameters but for embedding tables that are only looked up (tokens and positions). A token
    table that is also the output layer counts. Of the experts in a layer of a mixture-of-experts model, those
    count that read a token. L is the number of layers, d the hidden size, T is seq_len. A forward pass alone
    takes a third of this.
    """
    head = model.get_output_embeddings()
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables -= {head.weight} if head is not None else set()
    n = n_parameters(model) - sum(table.numel() for table in tables) - sparse.n_idle_parameters(model)
    config = model.config.get_text_config()
    return 6 * n + 12 * config.num_hidden_layers * config.hidden_size * seq_len
