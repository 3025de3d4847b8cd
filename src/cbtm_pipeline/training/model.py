"""Causal language models through transformers: from scratch, from a folder or the hub, and what a token costs.

Any model that `AutoModelForCausalLM` knows will do, as long as it is causal: that is tried out, not believed.
"""

import copy
import dataclasses
import difflib
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cbtm_pipeline.base.cli import log

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def _lean_imports() -> Iterator[None]:
    """Import transformers without SciPy, scikit-learn and pandas, and without collecting garbage meanwhile.

    It loads them, where it finds them, for the losses of object detection, for assisted generation and for table questions: a quarter of
    the start of every job, for nothing. What was imported before stays visible, and all of it can be imported again afterwards.
    """
    hidden = {name for name in ("scipy", "sklearn", "pandas") if name not in sys.modules}
    modules: dict[str, Any] = sys.modules
    collecting = gc.isenabled()
    gc.disable()
    modules.update(dict.fromkeys(hidden))  # find_spec finds nothing where None stands
    try:
        from transformers import masking_utils
        from transformers.utils import logging

        # whether several texts are packed into a sequence is asked in each forward pass, and the host waits for the answer: they never are
        masking_utils.find_packed_sequence_indices = lambda position_ids: None  # pyright: ignore[reportAttributeAccessIssue]
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        getLogger("huggingface_hub").setLevel("ERROR")  # one message in the end says what five retries would
        yield
    finally:
        for name in hidden:
            del modules[name]
        gc.freeze()  # modules live as long as the process
        if collecting:
            gc.enable()


def scratch(keys: Mapping[str, Any], vocab_size: int, separator_id: int, seq_len: int, rng_seed: int) -> "PreTrainedModel":
    """An untrained model (float32) from the keys of section model.scratch: those of the configuration class of `model_type`.

    Vocabulary, separator (as begin and end of text) and positions are filled in where `keys` leaves them out, dropout is 0. The weights are
    a function of the config and rng_seed. Raises ValueError for keys that the class does not know and values that make no model.
    """
    with _lean_imports():
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        keys = copy.deepcopy(dict(keys))
        model_type = keys.pop("model_type", None)
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            near = difflib.get_close_matches(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 1) or ["llama"]
            raise ValueError(
                f"model.scratch.model_type: {model_type}. Expected a causal language model of transformers. Did you mean {near[0]}?"
            )
        config_class = CONFIG_MAPPING[model_type]
        fields = {field.name: field.default for field in dataclasses.fields(config_class)}
        known = fields | dict.fromkeys(config_class.attribute_map)
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0)[0]
                raise ValueError(
                    f"model.scratch.{key}: unknown key. Expected a key of {config_class.__name__} in transformers. Did you mean {near}?"
                )
        filled_in: dict[str, Any] = {name: 0.0 for name, default in fields.items() if "drop" in name and isinstance(default, float)}
        filled_in |= {"vocab_size": vocab_size, "bos_token_id": separator_id, "eos_token_id": separator_id, "pad_token_id": None}
        filled_in |= {"max_position_embeddings": seq_len}
        own_names = {config_class.attribute_map.get(name, name): value for name, value in [*filled_in.items(), *keys.items()]}
        torch.manual_seed(rng_seed % 2**63)
        try:
            config = config_class(**{name: value for name, value in own_names.items() if name in fields})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:  # what a wrong size or type ends in depends on the model
            raise ValueError(
                f"model.scratch: no {model_type} model ({_first_sentence(error)}). Expected sizes that fit together. Change model.scratch."
            ) from error
        _check(model, "model.scratch", vocab_size, seq_len)
        return model


def pretrained(name: str, vocab_size: int, seq_len: int) -> "PreTrainedModel":
    """A model (float32) from a local folder or the hub, safetensors only. Raises ValueError when it is not there or does not fit."""
    where = f"model.pretrained: {name}"
    with _lean_imports():
        try:
            model = _from_pretrained(name, where, local_files_only=True)
        except FileNotFoundError:
            log.info("%s is neither a folder nor downloaded, looking for it on the hub", name)
            try:
                model = _from_pretrained(name, where)
            except FileNotFoundError as error:
                raise ValueError(error) from error
        _check(model, where, vocab_size, seq_len)
        return model


def load(folder: Path) -> "PreTrainedModel":
    """The model (float32) of an expert's folder."""
    with _lean_imports():
        return _from_pretrained(str(folder), str(folder), local_files_only=True)


def _from_pretrained(name: str, where: str, **how: Any) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **how
        )
    except OSError as error:
        message = (
            f"{where}: not found ({_first_sentence(error)}). Expected a folder or a model of the hub, with config.json and safetensors "
            "weights. Check the name, and the network if it is on the hub."
        )
        raise (ValueError if Path(name).is_dir() else FileNotFoundError)(message) from error
    except Exception as error:  # transformers, its model classes and safetensors have errors of their own
        raise ValueError(
            f"{where}: cannot be loaded ({_first_sentence(error)}). Expected a causal language model. Get it again."
        ) from error
    model, info = loaded
    wrong = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if wrong:
        raise ValueError(f"{where}: no fitting weights for {', '.join(wrong[:3])}. Expected every weight. Check config.json.")
    return model


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200] or type(error).__name__


def _check(model: "PreTrainedModel", where: str, vocab_size: int, seq_len: int) -> None:
    """Raise ValueError unless the model takes the tokenizer's ids and seq_len tokens, and does not look ahead."""
    embeddings: Any = model.get_input_embeddings()
    n_rows = embeddings.weight.shape[0]
    if n_rows < vocab_size:
        raise ValueError(
            f"{where}: a vocabulary of {n_rows}. Expected room for the tokenizer's {vocab_size} tokens. "
            "Use the model's own tokenizer: leave tokenizer.pretrained out, or name the same model there."
        )
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if n_positions is not None and n_positions < seq_len:
        raise ValueError(f"{where}: {n_positions} positions. Expected at least train.seq_len, {seq_len}. Lower train.seq_len.")
    ids_2T = torch.arange(min(seq_len, 8)).repeat(2, 1) % vocab_size
    ids_2T[1, -1] = (ids_2T[1, -1] + 1) % vocab_size
    was_training = model.training
    try:
        with torch.inference_mode():
            logits = [model.eval()(input_ids=ids[None], use_cache=False).logits[0].float() for ids in ids_2T]
    except Exception as error:
        raise ValueError(f"{where}: does not run ({_first_sentence(error)}). Expected sizes that fit together. Change it.") from error
    model.train(was_training)
    if embeddings.weight.is_meta:  # a model without numbers runs, but predicts nothing that could be compared
        return
    changed_T = (logits[0] - logits[1]).abs().amax(1)
    if not changed_T[:-1].max() <= 1e-4 * changed_T[-1]:
        raise ValueError(f"{where}: its predictions depend on later tokens. Expected a causal language model. Choose another one.")


def layers(model: "PreTrainedModel") -> torch.nn.ModuleList:
    """The model's layers, from the first to the last."""
    n = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n)


def to_device(model: "PreTrainedModel") -> torch.device:
    """Move the model to the GPU where there is one; return where it is now."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device)
    return device


def n_parameters(model: "PreTrainedModel") -> int:
    """All parameters, those shared between layers counted once."""
    return sum(p.numel() for p in model.parameters())


def flops_per_token(model: "PreTrainedModel", seq_len: int) -> int:
    """Training FLOPs of one token: 6 N + 12 L d T (Chowdhery et al. 2022, appendix B); a forward pass alone is a third.

    N leaves out embedding tables that are only looked up (tokens and positions); a token table that is also the output layer counts.
    """
    head = model.get_output_embeddings()
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)} - ({head.weight} if head is not None else set())
    n = n_parameters(model) - sum(table.numel() for table in tables)
    config = model.config.get_text_config()
    return 6 * n + 12 * config.num_hidden_layers * config.hidden_size * seq_len
