"""A sparse ensemble of expert language models as one causal language model (C-BTM, Gururangan et al. 2023).

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The logits are the logarithm of the mixture's probabilities, so their softmax is the mixture:

    logits(t) = log sum_j w_j(t) p_j(. | x_<t)

The weights w depend on the text before t alone. A linear tf-idf embedding of the prefix, compared with the
experts' centres, gives the paper's weights. The filter corrects them with what each active expert said of the
text so far (fixed share, Herbster and Warmuth 1998). Only the `n_active` experts of largest weight run. An
expert that becomes active first catches up on what it has not seen, in one forward pass.

This file needs torch, transformers and safetensors. Its folder holds router.safetensors, and the experts as
folders of transformers.

Shapes: B sequences, T new columns, C columns of a block, K experts, D dimensions of the embedding, V tokens.
"""

import contextlib
import copy
import difflib
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

BLOCK = 128  # columns that are mixed at once: bounds the memory of a long text
FIRST_BLOCKS = (8, 64)  # ends of the first blocks: a text's first weights change fast, and waste little there
ROUTER, RECORD, TERMS = "router.safetensors", "files.json", "top_terms.json"
NO_EVIDENCE = 1.0  # squared distance of a prefix without a usable term: equally far from all centres
MERGED = -1  # the number under which a cache keeps the merged model
FAR = 0.2  # experts whose spread is larger do not average: those of a young seed lie 0.5 to 0.7 away
OF_EXPERTS = ("dtype", "attn_implementation", "device_map")  # arguments that each expert gets
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")
# arguments of transformers that a folder of safetensors needs not, or that have done their work before
PASSED_OVER = ("trust_remote_code", "code_revision", "low_cpu_mem_usage", "adapter_kwargs", "_commit_hash")
PASSED_OVER += ("_from_auto", "_from_pipeline", "tqdm_class", "weights_only")
# arguments of transformers that the ensemble does not have, and what they are where they ask for nothing
REFUSED: dict[str, tuple[Any, ...]] = {
    **{"use_safetensors": (True,), "adapter_name": ("default",), "gguf_file": ()},
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "quantization_config", "subfolder", "state_dict"), ()),
    **dict.fromkeys(("output_loading_info", "ignore_mismatched_sizes", "variant", "key_mapping"), ()),
    **dict.fromkeys(("max_memory", "offload_folder", "offload_buffers", "offload_state_dict", "mirror"), ()),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config", "fusion_config"), ()),
    **dict.fromkeys(("use_kernels", "kernel_config", "allow_all_kernels", "disable_mmap", "proxies"), ()),
    **dict.fromkeys(("from_tf", "from_flax", "use_flash_attention_2", "experts_implementation"), ()),
}
SAVING = ("max_shard_size", "safe_serialization", "token", "save_peft_format", "save_original_format")
NOT_SAVING = ("state_dict", "push_to_hub", "variant", "distributed_checkpoint", "save_function")
NOT_READ = ("position_ids", "token_type_ids", "inputs_embeds", "cache")  # looked at, but no input
NOT_GIVEN = ("output_attentions", "output_hidden_states", "num_items_in_batch", "cache_position")
NO_MODEL = "Expected nothing: the ensemble does not have it. Leave it out."
log = logging.getLogger("cbtm")
# transformers 5.24 has renamed the argument
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class CBTMConfig(PretrainedConfig):
    """What the ensemble is, and how it is run.

    `experts` are the names of their folders, `exclude` those that are left out, by name or as
    `tag:licence=cc-by` (a text, a list, a set, or None); `tags` has the tags of each expert. Router `paper`
    weighs by the prefix alone, `filter` also by what the experts said of it. `n_active` experts run for each
    token; None is all. `hysteresis`: an active expert is replaced only by one that weighs more than so many
    times as much.
    `route="once"` fixes the active experts at the end of the prompt, `fix_after` after so many tokens behind
    the first. `max_loaded` experts stay in memory; None is no bound. The least recently used goes first, and
    what it has read is forgotten unless it is active.
    """

    model_type = "cbtm"

    def __init__(
        self,
        experts: Sequence[str] = (),
        exclude: Sequence[str] | set[str] | str | None = (),
        n_components: int = 0,
        vocab_size: int = 0,
        router: str = "filter",
        n_active: int | None = None,
        router_temperature: float = 0.1,
        epsilon: float = 0.03,
        beta: float = 0.5,
        hysteresis: float = 1.0,
        route: str = "token",
        fix_after: int | None = None,
        mode: str = "ensemble",
        max_loaded: int | None = None,
        tags: dict[str, dict[str, str]] | None = None,
        **kwargs: Any,
    ):
        self.experts, self.tags = list(experts), dict(tags or {})
        self.exclude = exclude
        self.n_components, self.vocab_size = n_components, vocab_size
        self.router, self.n_active, self.router_temperature = router, n_active, router_temperature
        self.epsilon, self.beta, self.hysteresis = epsilon, beta, hysteresis
        self.route, self.fix_after, self.mode, self.max_loaded = route, fix_after, mode, max_loaded
        self.check()
        super().__init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _listed(value) if name == "exclude" else value)

    def check(self) -> None:
        """Raise ValueError, with one line, for a value that the ensemble cannot run with."""
        choices = {
            "router": ("paper", "filter"),
            "route": ("token", "once"),
            "mode": ("ensemble", "merge"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(_wrong(name, getattr(self, name), " or ".join(known)))
        for name in self.experts:
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
                raise ValueError(_wrong("experts", name, "names of folders below experts/"))
        for name, least in (("n_active", 1), ("max_loaded", 1), ("fix_after", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(_wrong(name, value, f"null or a whole number of at least {least}"))
        for name, low, high, expected in (
            ("router_temperature", 1e-9, math.inf, "a number above 0"),
            ("epsilon", 0, 1, "a number from 0 to 1"),
            ("beta", 0, math.inf, "a number of at least 0"),
            ("hysteresis", 1, math.inf, "a number of at least 1"),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                raise ValueError(_wrong(name, value, expected))
        self.excluded()

    def excluded(self) -> set[str]:
        """The experts that `exclude` leaves out. Raises ValueError if it names none, or leaves none."""
        wanted = set(cast(list[str], self.exclude))
        tags = {name: self.tags.get(name, {}).items() for name in self.experts}
        own = {name: {name, *(f"tag:{key}={value}" for key, value in tags[name])} for name in self.experts}
        known = list(dict.fromkeys([*self.experts, *sorted(set().union(*own.values()) - set(self.experts))]))
        if unknown := wanted - set(known):  # an opt-out that is misspelt must not be passed over
            raise ValueError(_wrong("exclude", ", ".join(sorted(unknown)), ", ".join(known)))
        found = {name for name in self.experts if own[name] & wanted}
        if self.experts and len(found) == len(self.experts):
            raise ValueError(_wrong("exclude", "every expert", "at least one to be left"))
        return found


def _wrong(name: str, found: Any, expected: str) -> str:
    return f"{name}: {found}. Expected {expected}. Change it."


def _listed(exclude: Any) -> list[str]:
    """The names that `exclude` gives. Raises ValueError for what gives none."""
    if exclude is None or isinstance(exclude, str):
        return [] if exclude is None else [exclude]
    is_list = isinstance(exclude, list | tuple | set | frozenset)
    if not is_list or not all(isinstance(name, str) or type(name) is int for name in exclude):
        raise ValueError(_wrong("exclude", repr(exclude), "a list of names of experts"))
    names = [str(name) for name in exclude]
    return sorted(names) if isinstance(exclude, set | frozenset) else names


def _unexpected(function: str, name: str, known: Iterable[str]) -> TypeError:
    """As Python itself says it, with the name that was meant."""
    near = difflib.get_close_matches(name, sorted(known), 1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return TypeError(f"CBTMForCausalLM.{function}() got an unexpected keyword argument {name!r}{hint}")


def _refuse(name: str, value: Any, harmless: Sequence[Any] = ()) -> None:
    """Raise ValueError for an argument of transformers, unless its value asks for nothing."""
    asks_nothing = value in harmless if harmless else isinstance(value, bool | str | dict) and not value
    if value is None or asks_nothing:
        return
    shown = repr(value) if isinstance(value, bool | str | int | float) else f"a {type(value).__name__}"
    raise ValueError(f"{name}: {shown}. {NO_MODEL}")


@dataclass
class CBTMOutput(CausalLMOutputWithPast):
    """The usual output, and the logarithm of each expert's weight, (B, T, K), in the order of `model.names`.

    It is -inf for an expert that did not run.
    """

    router_log_weights: torch.Tensor | None = None


class State:
    """What the router knows of the text so far (float64); a row is a sequence. The formulas are in `Router`.

    `trail_BCK2` has for each column the belief, and the logarithm of the weights (-inf: not active).
    """

    def __init__(self, batch_size: int, n_components: int, n_experts: int):
        self.sum_BD = np.zeros((batch_size, n_components))
        self.n_B = np.zeros(batch_size, int)  # columns so far, padding not counted
        self.last_B = np.full(batch_size, -1)  # the last column with a token; -1 before there is one
        self.trail_BCK2 = np.empty((batch_size, 64, n_experts, 2))

    def before(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        """The belief and the weights (logarithms) after the column before this one, (B, K) each."""
        if column == 0:
            shape = self.trail_BCK2[:, 0, :, 0].shape
            return np.zeros(shape), np.full(shape, -np.inf)
        return self.trail_BCK2[:, column - 1, :, 0], self.trail_BCK2[:, column - 1, :, 1]

    def reserve(self, n_columns: int) -> None:
        """Make room for so many columns."""
        if (now := self.trail_BCK2.shape[1]) < n_columns:
            more = np.empty((len(self.n_B), max(now, n_columns - now), *self.trail_BCK2.shape[2:]))
            self.trail_BCK2 = np.concatenate([self.trail_BCK2, more], 1)

    def take(self, rows: np.ndarray) -> None:
        """Keep these sequences, in this order."""
        self.sum_BD, self.n_B, self.trail_BCK2 = self.sum_BD[rows], self.n_B[rows], self.trail_BCK2[rows]
        self.last_B = self.last_B[rows]


class CBTMCache(Cache):
    """The text so far, the router's state, and one KV cache per expert that has run.

    `n_seen[j]` columns have gone through expert j; `tail[j]` has its log-probabilities after the last token
    among them, (B, V). `n_prompt`: columns of the prompt; None: those of the first call.
    """

    def __init__(self, n_prompt: int | None = None):
        super().__init__(layers=[])
        self.n_prompt = n_prompt
        self.ids = torch.zeros(0, 0, dtype=torch.long)
        self.mask: torch.Tensor | None = None  # None: no padding
        self.state: State | None = None
        self.kv: dict[int, DynamicCache] = {}
        self.n_seen: dict[int, int] = {}
        self.tail: dict[int, torch.Tensor] = {}
        self.merged: tuple[PreTrainedModel, np.ndarray] | None = None  # and the experts' logw_K

    def joined(
        self, ids: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids and mask with new columns (None: no padding). `mask` covers all columns, or the new ones."""
        whole = self.mask
        if mask is not None:
            mask = mask[:, -ids.shape[1] :].to(ids.device, torch.long)
        if self.mask is not None or (mask is not None and not bool(mask.all())):
            old = torch.ones_like(self.ids) if self.mask is None else self.mask
            whole = _joined(old, torch.ones_like(ids) if mask is None else mask)
        return _joined(self.ids, ids), whole

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.ids.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length
    is_compileable = property(lambda self: False)
    is_croppable = property(lambda self: True)
    is_initialized = property(lambda self: self.get_seq_length() > 0)
    is_linear = is_sliding = is_dummy = property(lambda self: [False])
    batch_size = property(lambda self: len(self.ids) or -1)

    def activate_past_recording(self) -> None:
        """The text is recorded anyway."""

    def reset(self) -> None:
        self.crop(-self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take these sequences, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is None:
            return
        self.state.take(indices.cpu().numpy())
        self.ids = self.ids[indices.to(self.ids.device)]
        self.mask = None if self.mask is None else self.mask[indices.to(self.mask.device)]
        self.tail = {j: tail[indices.to(tail.device)] for j, tail in self.tail.items()}
        for cache in self.kv.values():
            cache.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.ids)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns back: so many if 0 or negative, else all but so many."""
        last, given = self.get_seq_length(), int(tokens_to_remove)
        n = max(last + given, 0) if given <= 0 else min(given, last)
        if n == last or self.state is None:
            return
        self.ids, self.mask = self.ids[:, :n], None if self.mask is None else self.mask[:, :n]
        self.state.n_B[:] = -1 if n else 0  # forward counts again
        self.state.sum_BD = np.zeros_like(self.state.sum_BD)
        self.state.last_B[:] = -1
        if self.n_prompt is not None and n < self.n_prompt:
            self.n_prompt = None
        last_B = _last_columns(self.mask) if self.mask is not None and n else np.array([n - 1])
        again = int(last_B[last_B >= 0].min(initial=n))
        for j, n_seen in list(self.n_seen.items()):
            if n_seen > again:  # what it said after this column is needed again
                self.n_seen[j] = again
                self.tail.pop(j, None)
                try:
                    self.kv[j].crop(self.n_seen[j] - n_seen)
                except (RuntimeError, ValueError, NotImplementedError):
                    self.n_seen[j] = 0  # a sliding window has forgotten: it reads all again
                if not self.n_seen[j]:
                    self.drop(j)

    def drop(self, j: int) -> None:
        """Forget what expert j has read."""
        for table in (self.kv, self.n_seen, self.tail):
            table.pop(j, None)


def _last_columns(mask: torch.Tensor) -> np.ndarray:
    """The last column of each sequence that has a token, (B); -1 without one."""
    has_BC = mask.cpu().numpy() > 0
    return np.where(has_BC, np.arange(has_BC.shape[1]), -1).max(1)


def _joined(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.cat([old.to(new.device), new], 1) if old.numel() else new


class Router:
    """The weights of the experts after each prefix. `embedding` and `centres` come from the clustering.

    The definition is that of cbtm_pipeline.mixture.ensemble, here by column instead of by document.
    """

    def __init__(self, config: CBTMConfig, embedding_VD: np.ndarray, centres_KD: np.ndarray):
        self.config, self.embedding, self.centres = config, embedding_VD, centres_KD
        self.centres64_KD = centres_KD.astype(np.float64)
        self.norms_K = np.square(self.centres64_KD).sum(1)

    @property
    def n_active(self) -> int:
        """Experts that run for each token."""
        return min(self.config.n_active or len(self.centres), len(self.centres))

    @property
    def listens(self) -> bool:
        """Whether weights depend on what experts said. They share anew what a single one keeps to itself."""
        return self.config.router == "filter" and self.n_active > 1

    def sums(self, state: State, ids_BC: np.ndarray, mask_BC: np.ndarray | None) -> np.ndarray:
        """Sum of the term vectors up to each column, float64 (B, C, D); `state.sum_BD` is moved on."""
        sum_BCD = self.embedding[ids_BC].astype(np.float64)
        if mask_BC is not None:
            sum_BCD[mask_BC == 0] = 0
        sum_BCD[:, 0] += state.sum_BD
        if sum_BCD.shape[1] > 1:
            np.cumsum(sum_BCD, axis=1, out=sum_BCD)
        state.sum_BD = sum_BCD[:, -1]
        return sum_BCD

    def log_prior(self, sum_BCD: np.ndarray) -> np.ndarray:
        """The paper's weights over all experts, (B, C, K): the softmax of -d2 / T (section 2.3)."""
        length_BC1 = np.sqrt(np.square(sum_BCD).sum(-1, keepdims=True))
        is_known_BC1 = length_BC1 > 0
        h_BCD = sum_BCD / (length_BC1 if is_known_BC1.all() else np.where(is_known_BC1, length_BC1, 1))
        h_BCD = h_BCD.astype(np.float32).astype(np.float64)
        d2_BCK = self.norms_K - 2 * (h_BCD @ self.centres64_KD.T) + np.square(h_BCD).sum(-1, keepdims=True)
        d2_BCK = np.maximum(d2_BCK, 0, dtype=np.float32, casting="same_kind").astype(np.float64)
        if not is_known_BC1.all():
            d2_BCK[~is_known_BC1[..., 0]] = NO_EVIDENCE
        nearness_BCK = (d2_BCK.min(-1, keepdims=True) - d2_BCK) / self.config.router_temperature
        return nearness_BCK - _log_sum_exp(nearness_BCK)

    def block(self, state: State, begin: int, logprior_BCK: np.ndarray, fixed_from: float) -> np.ndarray:
        """As `step` for all columns of a block, (B, C, K): where nobody listens, nothing is padded or sticky.

        Columns from `fixed_from` on keep the active set.
        """
        config, end = self.config, begin + logprior_BCK.shape[1]
        logb_BK, before_BK = state.before(begin)
        value_BCK = logprior_BCK
        if config.router == "filter":
            value_BCK, log_stay = np.log(config.epsilon) + logprior_BCK, np.log1p(-config.epsilon)
            logb_BK = logb_BK if begin else logprior_BCK[:, 0]
            for c in range(end - begin):
                logb_BK = np.logaddexp(log_stay + logb_BK, value_BCK[:, c], out=value_BCK[:, c])
        active_BCK = self._largest(value_BCK)
        if end > (fixed_from := max(fixed_from, 1)):
            c = int(fixed_from) - begin
            active_BCK[:, max(c, 0) :] = active_BCK[:, c - 1 : c] if c > 0 else before_BK[:, None] > -np.inf
        logw_BCK = np.where(active_BCK, value_BCK, -np.inf)
        logw_BCK -= _log_sum_exp(logw_BCK)
        state.trail_BCK2[:, begin:end, :, 0], state.trail_BCK2[:, begin:end, :, 1] = value_BCK, logw_BCK
        state.n_B += end - begin
        return logw_BCK

    def step(
        self,
        state: State,
        column: int,
        logprior_BK: np.ndarray,
        gain_BK: np.ndarray | None,
        here_B: np.ndarray | None,
        fixed: bool,
    ) -> np.ndarray:
        """Move the state on by a column; returns the logarithm of the weights, (B, K).

        `gain_BK` has the log-probability that each active expert gave the column's token, after the token
        before it. `here_B`: which sequences have a token there (bool); None: all have.
        """
        config, (logb_BK, before_BK) = self.config, state.before(column)
        started_B1 = (state.n_B > 0)[:, None]
        value_BK = logprior_BK
        if config.router == "filter":
            if gain_BK is not None:
                logb_BK = np.where(started_B1, self._credited(logb_BK, before_BK, gain_BK), logb_BK)
            logb_BK = np.where(started_B1, logb_BK, logprior_BK)
            value_BK = _log_add(np.log1p(-config.epsilon) + logb_BK, np.log(config.epsilon) + logprior_BK)
        fix_after = math.inf if config.fix_after is None else config.fix_after
        fixed_B1 = started_B1 & (fixed | (state.n_B > fix_after)[:, None])
        active_BK = self._active(value_BK, before_BK > -np.inf, started_B1, fixed_B1)
        logw_BK = np.where(active_BK, value_BK, -np.inf)
        logw_BK -= _log_sum_exp(logw_BK)
        new_BK2 = state.trail_BCK2[:, column]
        new_BK2[..., 0], new_BK2[..., 1] = value_BK, logw_BK
        if here_B is None:
            state.n_B += 1
            return logw_BK
        new_BK2[~here_B] = np.stack(state.before(column), 2)[~here_B]  # padding changes nothing
        state.n_B += here_B
        return np.where(here_B[:, None], logw_BK, -np.inf)

    def _credited(self, logb_BK: np.ndarray, logw_BK: np.ndarray, gain_BK: np.ndarray) -> np.ndarray:
        """The belief after a token that expert j gave the log-probability `gain_BK`.

        Active experts share their total weight anew, in proportion to w_j p_j^beta. The others keep theirs.
        """
        active_BK = logw_BK > -np.inf
        credit_BK = np.where(active_BK, logw_BK + self.config.beta * gain_BK, -np.inf)
        total_B1 = _log_sum_exp(np.where(active_BK, logb_BK, -np.inf))
        return np.where(active_BK, credit_BK - _log_sum_exp(credit_BK) + total_B1, logb_BK)

    def _active(
        self, value_BK: np.ndarray, before_BK: np.ndarray, started_B1: np.ndarray, fixed_B1: np.ndarray
    ) -> np.ndarray:
        """The experts that run, bool (B, K): the largest values, or nearly those that ran before."""
        if fixed_B1.all():
            return before_BK
        if self.config.hysteresis == 1 or self.n_active == value_BK.shape[1]:
            found_BK = self._largest(value_BK)
        elif started_B1.all():
            found_BK = self._sticky(value_BK, before_BK)
        else:
            found_BK = np.where(started_B1, self._sticky(value_BK, before_BK), self._largest(value_BK))
        return np.where(fixed_B1, before_BK, found_BK) if fixed_B1.any() else found_BK

    def _largest(self, value_: np.ndarray) -> np.ndarray:
        """The `n_active` largest values of the last axis (bool); of equals, the lowest index comes first."""
        if self.n_active == value_.shape[-1]:
            return np.ones(value_.shape, bool)
        found_, rest_ = np.zeros(value_.shape, bool), value_
        for _ in range(self.n_active):
            found_ |= rest_.argmax(-1)[..., None] == np.arange(value_.shape[-1])
            rest_ = np.where(found_, -np.inf, value_)
        return found_

    def _sticky(self, value_BK: np.ndarray, before_BK: np.ndarray) -> np.ndarray:
        """The active set, where the heaviest other expert replaces the lightest active one if it weighs more
        than `hysteresis` times as much; at most n_active times.
        """
        active_BK, factor = before_BK.copy(), math.log(self.config.hysteresis)
        for _ in range(self.n_active):
            lightest_B = np.where(active_BK, value_BK, np.inf).argmin(1)
            heaviest_B = np.where(active_BK, -np.inf, value_BK).argmax(1)
            rows = np.arange(len(value_BK))
            swap_B = value_BK[rows, heaviest_B] > value_BK[rows, lightest_B] + factor
            if not swap_B.any():
                break
            rows = rows[swap_B]
            active_BK[rows, lightest_B[rows]], active_BK[rows, heaviest_B[rows]] = False, True
        return active_BK


def _log_sum_exp(value_: np.ndarray) -> np.ndarray:
    """log(sum(exp(value))) over the last axis, which stays; exact for a single finite value."""
    largest_1 = value_.max(-1, keepdims=True)
    return largest_1 + np.log(np.exp(value_ - largest_1).sum(-1, keepdims=True))


def _log_add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """log(exp(a) + exp(b)). Not both may be -inf."""
    return np.maximum(a, b) + np.log1p(np.exp(-np.abs(a - b)))


def _active(logw_: np.ndarray) -> list[int]:
    """The experts that run for one of the sequences; they lie along the last axis."""
    return np.flatnonzero((logw_ > -np.inf).reshape(-1, logw_.shape[-1]).any(0)).tolist()


def _of_tokens(logprob_BCV: torch.Tensor, ids_BC: torch.Tensor) -> np.ndarray:
    """The values of these tokens, (B, C)."""
    return logprob_BCV.gather(2, ids_BC[..., None].to(logprob_BCV.device))[..., 0].cpu().numpy()


@functools.cache
def _arguments(kind: type) -> frozenset[str]:
    """The names of the arguments of a model's forward."""
    return frozenset(inspect.signature(kind.forward).parameters)  # pyright: ignore


class _Heard:
    """What experts said of the tokens of a block: `gain_BCK`, log-probabilities, -inf where one said nothing.

    A token's prediction stands at the token before it, which is not the column before where padding lies
    between. `first`: the first column whose prediction is needed. `goes_on_B`: which sequences have begun and
    have a token in the block; None: all.
    """

    def __init__(self, cache: CBTMCache, begin: int, end: int, n_experts: int):
        self.cache, self.begin, self.end = cache, begin, end
        self.ids_BC = cache.ids[:, begin:end]
        self.gain_BCK = np.full((*self.ids_BC.shape, n_experts), -np.inf)
        self.first, self.goes_on_B, self.before_BC = max(begin - 1, 0), None, None
        state = cast(State, cache.state)
        if cache.mask is None:
            state.last_B = np.full(len(self.ids_BC), end - 1)
            return
        here_BC = cache.mask[:, begin:end].cpu().numpy() > 0
        own_BC = np.where(here_BC, np.arange(begin, end), -1)
        last_BC = np.maximum.accumulate(np.concatenate([state.last_B[:, None], own_BC], 1), 1)
        self.before_BC, state.last_B = last_BC[:, :-1], last_BC[:, -1]
        self.next_B = here_BC.argmax(1)  # the first token of each sequence in the block
        has_begun_B = self.before_BC[:, 0] >= 0
        self.goes_on_B = has_begun_B & here_BC.any(1)
        self.first = int(self.before_BC[has_begun_B, 0].min(initial=self.first))

    def from_tail(self, j: int) -> None:
        """Take what expert j said before the block of the first token in it."""
        tail_B1V = self.cache.tail[j][:, None]
        if self.goes_on_B is None:
            self.gain_BCK[:, 0, j] = _of_tokens(tail_B1V, self.ids_BC[:, :1])[:, 0]
            return
        rows_B, next_B = np.arange(len(self.next_B)), self.next_B
        ids_B1 = self.ids_BC.gather(1, torch.from_numpy(next_B[:, None]).to(self.ids_BC.device))
        gain_B = _of_tokens(tail_B1V, ids_B1)[:, 0]
        self.gain_BCK[rows_B, next_B, j] = np.where(self.goes_on_B, gain_B, -np.inf)

    def listen(self, j: int, logits_BCV: torch.Tensor, said_BCV: torch.Tensor) -> None:
        """Take what expert j said in its last columns up to `end`; its tail moves on."""
        cache, start = self.cache, self.end - logits_BCV.shape[1]
        if self.before_BC is None:
            heard_BCV = logits_BCV[:, :-1]
            if start + 1 < self.end:
                gain_BC = _of_tokens(heard_BCV, cache.ids[:, start + 1 : self.end])
                gain_BC -= heard_BCV.logsumexp(-1).cpu().numpy()
                self.gain_BCK[:, start + 1 - self.begin :, j] = gain_BC
            cache.tail[j] = said_BCV[:, -1].clone() if said_BCV.shape[1] > 1 else said_BCV[:, -1]
            return
        if j in cache.tail:
            self.from_tail(j)
        device = logits_BCV.device
        rows_B1 = torch.arange(len(logits_BCV), device=device)[:, None]
        at_BC = torch.from_numpy(np.maximum(self.before_BC - start, 0)).to(device)
        gain_BC = (
            logits_BCV[rows_B1, at_BC, self.ids_BC.to(device)] - logits_BCV.logsumexp(-1)[rows_B1, at_BC]
        )
        is_new_BC = self.before_BC >= start
        self.gain_BCK[..., j] = np.where(is_new_BC, gain_BC.cpu().numpy(), self.gain_BCK[..., j])
        last_B = torch.from_numpy(cast(State, cache.state).last_B).to(device)[:, None]
        tail_BV = logits_BCV[rows_B1, (last_B - start).clamp_min(0)][:, 0].log_softmax(-1)
        if j in cache.tail:  # of a sequence that has no token here, what was said before stays
            tail_BV = torch.where(last_B >= start, tail_BV, cache.tail[j])
        cache.tail[j] = tail_BV


class CBTMForCausalLM(PreTrainedModel, GenerationMixin):
    """The ensemble. `names` are its experts, in the order of the router's centres."""

    config: CBTMConfig
    config_class = CBTMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_cache_class = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        config: CBTMConfig,
        folder: str | Path | None = None,
        dtype: Any = None,
        attn_implementation: Any = None,
        device_map: Any = None,
    ):
        config.check()
        super().__init__(config)
        excluded = config.excluded()
        self.names = [name for name in config.experts if name not in excluded]
        self.folder = Path(folder or config._name_or_path).resolve()
        given = {"dtype": _checked_dtype(dtype), "attn_implementation": attn_implementation}
        self.expert_kwargs = {name: value for name, value in given.items() if value is not None}
        self.device_map = _checked_map(device_map, config.experts)
        self.router: Router | None = None
        # they show where `to` has moved the model; of one dtype, that it has cast it, too
        self.register_buffer("anchor", torch.empty(0), persistent=False)
        self.register_buffer("anchor16", torch.empty(0, dtype=torch.float16), persistent=False)
        self.experts = nn.ModuleDict()  # those in memory, the least recently used first
        self.latest = ""  # the name of the last
        self.spread = 0.0  # of the experts that were merged last
        self.n_passes = 0  # columns that went through an expert, over all sequences, since loading: the cost
        self._about = {name: _about(self.folder / "experts" / name) for name in self.names}
        self._record = _read_json(self.folder / RECORD)  # as it is now: the folder may be replaced later
        self.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, config: Any = None, **kwargs: Any
    ) -> "CBTMForCausalLM":
        """Load the router; experts load when they first run, from the folder as it is now.

        Further arguments: those of CBTMConfig, which replace those of `config` or of the folder; and for the
        experts `dtype`, `attn_implementation` and `device_map`, which is a device, `auto` (all GPUs in turn),
        or a device for each expert's name. Raises TypeError for an argument that nobody knows, and
        ValueError, with one line, for one of transformers that the ensemble does not have.
        """
        if args:
            raise TypeError("CBTMForCausalLM.from_pretrained() takes 1 positional argument: name the others")
        for_experts, hub, settings, generation = _sorted_out(kwargs)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(folder), **hub))
        config = _configured(folder if config is None else config, settings)
        config._name_or_path = str(pretrained_model_name_or_path)
        if (chosen := config._attn_implementation) is not None:  # AutoModelForCausalLM puts it there
            for_experts.setdefault("attn_implementation", chosen)
        config.check()
        tensors, known = load_file(folder / ROUTER), _read_json(folder / "config.json").get("experts") or []
        if config.experts != known or tensors["centres"].shape != (len(known), config.n_components):
            raise ValueError(_wrong("experts", ", ".join(config.experts), f"those of {folder}/config.json"))
        model = cls(config, folder, **for_experts)
        rows = [config.experts.index(name) for name in model.names]
        model.router = Router(config, tensors["embedding"].numpy(), tensors["centres"][rows].numpy())
        if generation is not None:
            model.generation_config = generation
        elif (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.to(model._devices()[0])  # pyright: ignore[reportArgumentType]

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Copy the ensemble's folder, with this config, the experts that are not excluded, and a record.

        The record (files.json) is written if the folder that was loaded has one. Raises ValueError if an
        expert in memory has other weights than its folder: they would be lost.
        """
        for name, value in kwargs.items():
            if name in NOT_SAVING:
                _refuse(name, value)
            elif name not in SAVING:
                raise _unexpected("save_pretrained", name, (*SAVING, *NOT_SAVING))
        to = Path(save_directory).resolve()
        self._check_target(to)
        for name in self.names:
            self._check_files(name)
            if name in self.experts and not self._is_unchanged(name):
                expected = "those of its folder, as nothing trains in an ensemble"
                raise ValueError(
                    f"experts.{name}: other weights than its folder has. Expected {expected}. Save the "
                    f"expert itself: model.experts[{name!r}].save_pretrained(FOLDER)."
                )
        if is_main_process:
            self._save(to)

    def _check_target(self, to: Path) -> None:
        """Raise ValueError for a folder that the ensemble cannot be saved into."""
        if to != self.folder and to.is_relative_to(self.folder):
            raise ValueError(f"{to}: within {self.folder}. Expected a folder elsewhere. Give another name.")
        if to.exists() and not to.is_dir():
            raise ValueError(f"{to}: a file. Expected a folder. Give another name.")
        others = sorted(path.name for path in to.glob("experts/*") if path.name not in self.names)
        if others:  # what was left out must not be shipped after all
            found = f"{to}: holds experts that are not saved ({', '.join(others)})"
            raise ValueError(f"{found}. Expected a new folder. Give another name.")

    def _is_unchanged(self, name: str) -> bool:
        """Whether an expert in memory has the weights of its folder."""
        now = cast(nn.Module, self.experts[name]).state_dict()
        before = self._read(self.names.index(name)).state_dict()
        return now.keys() == before.keys() and all(
            torch.equal(now[key].cpu(), before[key].cpu()) for key in now
        )

    def _save(self, to: Path) -> None:
        """Write the folder, the record last."""
        config, excluded = copy.deepcopy(self.config), sorted(self.config.excluded())
        known: dict[str, str] = self._record.get("files", {})
        hashes: dict[str, str | None] = dict(known)
        if to != self.folder:
            hashes = {name: known.get(name) for name in self._copy(to)}
        if excluded:
            hashes |= dict.fromkeys(self._leave_out(to, config))
        if hasattr(config, "auto_map"):  # the code is in the folder, wherever it came from
            config.auto_map = {kind: name.rpartition("--")[2] for kind, name in config.auto_map.items()}
        with _new_file(to / "config.json") as file:
            file.write(config.to_json_string().encode())
        if not self._record:
            return
        hashes["config.json"] = None
        before = self._record["seal"]
        own = {"tokenizer", *(f"expert-{name}" for name in self.names)}
        origin = {name: value for name, value in self._record["made_from"].items() if name in own}
        change = {"saved": config.experts, "excluded": excluded, "from": before}
        record = {
            **{
                "format": self._record["format"],
                "kind": "ensemble",
                "made_from": {**origin, "ensemble": before},
            },
            "changes": [*self._record.get("changes", []), change],
            # what is copied has the hash that it had: damage shows where it is read, there as here
            "files": {name: found or _hash(to / name) for name, found in hashes.items()},
        }
        _write_sealed(to / RECORD, record)
        if to == self.folder:
            self._record = _read_json(to / RECORD)

    def _copy(self, to: Path) -> list[str]:
        """Copy the files of the folder, but for the record and experts that are left out. Returns names."""
        names = []
        for path in sorted(self.folder.rglob("*")):
            inner = path.relative_to(self.folder)
            is_left_out = (
                len(inner.parts) > 1 and inner.parts[0] == "experts" and inner.parts[1] not in self.names
            )
            is_hidden = any(part.startswith(".") for part in inner.parts)
            if path.is_file() and not is_left_out and not is_hidden and inner != Path(RECORD):
                with _new_file(to / inner) as file, path.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 24)
                names.append(inner.as_posix())
        return names

    def _leave_out(self, to: Path, config: CBTMConfig) -> list[str]:
        """Take excluded experts out of the config, the router and the terms. Returns names of files."""
        rows, router = [config.experts.index(name) for name in self.names], self._router()
        config.experts, config.exclude = list(self.names), []
        config.tags = {name: own for name, own in config.tags.items() if name in self.names}
        tensors = {"embedding": router.embedding, "centres": router.centres}
        with _new_file(to / ROUTER) as file:
            file.write(save({name: torch.from_numpy(value) for name, value in tensors.items()}))
        terms = _read_json(to / TERMS)
        if len(terms.get("top_terms", ())) <= max(rows):
            return [ROUTER]
        _write_sealed(to / TERMS, {**terms, "top_terms": [terms["top_terms"][row] for row in rows]})
        return [ROUTER, TERMS]

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cast(torch.Tensor, self.anchor).device

    @property
    def dtype(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleMethodOverride]
        """That of the logits."""
        return torch.float32

    def _devices(self) -> list[torch.device]:
        """The device of each expert."""
        where = self.device_map
        if isinstance(where, dict):
            return [torch.device(where.get(name, where.get("", self.device))) for name in self.names]
        if where in ("auto", "balanced"):
            n_gpus = torch.cuda.device_count()
            return [
                torch.device("cuda", j % n_gpus) if n_gpus else self.device for j in range(len(self.names))
            ]
        return [self.device if where is None else torch.device(where)] * len(self.names)

    def expert(self, j: int, active: Sequence[int] = ()) -> PreTrainedModel:
        """Expert j, from memory or from its folder. The least recently used inactive one makes room.

        Raises ValueError if the folder is another one than when the ensemble was loaded.
        """
        name = self.names[j]
        if name in self.experts:
            if name != self.latest:
                self.experts[name] = self.experts.pop(name)
            self.latest = name
            return cast(PreTrainedModel, self.experts[name])
        self._check_files(name)
        limit = self.config.max_loaded
        while limit is not None and len(self.experts) >= limit:
            needed = {self.names[i] for i in active}
            del self.experts[min(self.experts, key=lambda other: other in needed)]  # min takes the first
        self.experts[name] = expert = self._read(j)
        self.latest = name
        return expert

    def _read(self, j: int) -> PreTrainedModel:
        """Expert j from its folder, where and in what dtype it belongs."""
        # an expert is one of transformers' own models: no code of its folder is run, nor is anybody asked
        options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        folder = self.folder / "experts" / self.names[j]
        expert: Any = AutoModelForCausalLM.from_pretrained(folder, **options, **self.expert_kwargs)
        anchors = cast(torch.Tensor, self.anchor), cast(torch.Tensor, self.anchor16)
        if anchors[0].dtype == anchors[1].dtype:  # the whole model was cast
            expert = expert.to(anchors[0].dtype)
        return expert.to(self._devices()[j]).eval()

    def _check_files(self, name: str) -> None:
        """Raise ValueError unless an expert's files are those of the time when the ensemble was loaded.

        Sizes, times and inodes are compared; files where they differ are hashed and compared with the record.
        """
        folder, known = self.folder / "experts" / name, self._record.get("files", {})
        now, before = _about(folder), self._about[name]
        for file in sorted(now.keys() | before.keys()):
            if now.get(file) == before.get(file):
                continue
            expected = known.get(f"experts/{name}/{file}")
            if file not in now or expected is None or _hash(folder / file) != expected:
                found = f"{folder / file}: {'another file than' if file in now else 'missing, but not'}"
                raise ValueError(
                    f"{found} when the ensemble was loaded. Expected the same. Load the ensemble again."
                )
        self._about[name] = now

    def _run(self, net: Any, cache: CBTMCache, j: int, end: int, n_keep: int) -> torch.Tensor:
        """Let expert j read columns up to `end`. Returns its last logits, float32 (B, <= n_keep, V)."""
        first, names = cache.n_seen.get(j, 0), _arguments(type(net))
        if j not in cache.kv:
            cache.kv[j] = DynamicCache(config=net.config)
        inputs: dict[str, Any] = {"input_ids": cache.ids[:, first:end]}
        if cache.mask is None:
            position = torch.arange(first, end, device=cache.ids.device).expand(len(cache.ids), -1)
        else:
            inputs["attention_mask"] = cache.mask[:, :end]
            position = (cache.mask[:, :end].cumsum(1) - 1).clamp_min(0)[:, first:]
        if "position_ids" in names:
            inputs["position_ids"] = position
        device = next(net.parameters()).device
        if device != cache.ids.device:
            inputs = {name: value.to(device) for name, value in inputs.items()}
        if "logits_to_keep" in names:
            inputs["logits_to_keep"] = min(n_keep, end - first)
        logits = net(**inputs, **{CACHE: cache.kv[j]}, use_cache=True).logits
        self.n_passes += (end - first) * len(cache.ids)
        cache.n_seen[j] = end
        return logits[:, -n_keep:].float()

    def _mix(self, cache: CBTMCache, begin: int, end: int, keep_from: int) -> tuple[torch.Tensor, np.ndarray]:
        """Mix columns `begin` to `end`: log-probabilities from `keep_from` on, and all weights (B, C, K)."""
        router, state = self._router(), cast(State, cache.state)
        ids_BC = cache.ids[:, begin:end].cpu().numpy()
        here_BC = None if cache.mask is None else cache.mask[:, begin:end].cpu().numpy() > 0
        logprior_BCK = router.log_prior(router.sums(state, ids_BC, here_BC))
        logw_BCK = np.empty_like(logprior_BCK)
        heard = _Heard(cache, begin, end, len(self.names))
        said: dict[int, torch.Tensor] = {}  # by expert: the log-probabilities that end at column `end`
        first = max(begin, keep_from)
        heard_from = heard.first if router.listens else first

        def run(j: int, active: Sequence[int]) -> None:
            net = self.expert(j, active)
            if self.config.max_loaded is not None:  # it bounds the KV caches, too
                kept = {*active, *(i for i, name in enumerate(self.names) if name in self.experts)}
                for i in set(cache.kv) - kept:
                    cache.drop(i)
            logits_BCV = self._run(net, cache, j, end, end - heard_from)
            said[j] = logits_BCV[:, -max(end - first, 1) :].log_softmax(-1)
            if router.listens:
                heard.listen(j, logits_BCV, said[j])

        if router.listens and begin:
            logw_BK = state.before(begin)[1]
            active = _active(logw_BK if heard.goes_on_B is None else logw_BK[heard.goes_on_B])
            for j in active:
                if j in cache.tail and cache.n_seen[j] == begin:
                    heard.from_tail(j)
                else:  # after a crop, it has to speak again
                    run(j, active)
        fixed_from = math.inf if self.config.route == "token" or cache.n_prompt is None else cache.n_prompt
        if here_BC is None and not router.listens and self.config.hysteresis == 1:
            after = math.inf if self.config.fix_after is None else self.config.fix_after + 1
            logw_BCK = router.block(state, begin, logprior_BCK, min(fixed_from, after))
            active = _active(logw_BCK[:, first - begin :])
            for j in active:
                run(j, active)
            return self._mixed(cache, said, logw_BCK[:, first - begin :], end), logw_BCK
        for c, column in enumerate(range(begin, end)):
            gain_BK = heard.gain_BCK[:, c] if router.listens and column else None
            here_B, fixed = None if here_BC is None else here_BC[:, c], column >= fixed_from
            logw_BCK[:, c] = router.step(state, column, logprior_BCK[:, c], gain_BK, here_B, fixed)
            if router.listens or column >= keep_from:
                active = _active(logw_BCK[:, c])
                for j in active:
                    if j not in said:
                        run(j, active)
        return self._mixed(cache, said, logw_BCK[:, first - begin :], end), logw_BCK

    def _mixed(
        self, cache: CBTMCache, said: dict[int, torch.Tensor], logw_BCK: np.ndarray, end: int
    ) -> torch.Tensor:
        """The logarithm of sum_j w_j p_j after the last C columns before `end`, (B, C, V)."""
        n_columns, mixed_BCV = logw_BCK.shape[1], None
        for j in sorted(said) if n_columns else ():
            own_BCV, logw_BC = said[j][:, -n_columns:], logw_BCK[..., j]
            if logw_BC.any():  # not all zero: it is not alone
                if np.isneginf(logw_BC).all():
                    continue
                own_BCV = own_BCV + torch.from_numpy(logw_BC[..., None]).float().to(own_BCV.device)
            own_BCV = own_BCV.to(cache.ids.device)
            mixed_BCV = own_BCV if mixed_BCV is None else torch.logaddexp(mixed_BCV, own_BCV)
        if mixed_BCV is None:
            shape = (len(cache.ids), n_columns, self.config.vocab_size)
            return torch.full(shape, -math.log(self.config.vocab_size), device=cache.ids.device)
        if cache.mask is not None:
            padding_BC1 = cache.mask[:, end - n_columns : end, None] == 0
            mixed_BCV = mixed_BCV.masked_fill(padding_BC1, -math.log(mixed_BCV.shape[2]))
        return mixed_BCV

    def _router(self) -> Router:
        if self.router is None:
            raise ValueError(
                f"{ROUTER}: not loaded. Expected a folder. Load the ensemble with from_pretrained."
            )
        return self.router

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Begin and end of the blocks in which columns are mixed."""
        while first < last:
            ends = [end for end in FIRST_BLOCKS if end > first] if self._router().listens else []
            end = min([last, first + BLOCK, *ends])
            yield first, end
            first = end

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_weights: bool = False,
        prompt_length: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CBTMOutput | tuple[Any, ...]:
        """Log-probabilities of the next token, (B, T, V), after the last `logits_to_keep` columns (0: all).

        A tensor of `logits_to_keep` has the numbers of the columns. `attention_mask` (1: a token) has the
        shape of `input_ids`, or of all columns so far. `past_key_values` is the cache of the call before. An
        empty one, as `generate` makes it, is left out. `prompt_length`: the columns at whose end
        `route="once"` fixes the experts, for calls without a cache. Raises ValueError, with one line, for
        input that the ensemble does not take, and TypeError for an argument that nobody knows.
        """
        given = kwargs.get("cache") if past_key_values is None else past_key_values
        _refuse_embeddings(kwargs)
        _check_ids(input_ids)
        input_ids, n_new = cast(torch.Tensor, input_ids).long(), cast(torch.Tensor, input_ids).shape[1]
        columns, n_keep = _kept(logits_to_keep, n_new)
        cache = self._begin(given, input_ids, attention_mask, labels, prompt_length, kwargs)
        last = cache.get_seq_length()
        first = last - n_new
        keep_from = first if labels is not None else last - n_keep
        if self.config.mode == "merge":
            logits, logw_BTK = self._merged(cache, first, last - keep_from)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):  # of sequences that have not begun
                parts = [self._mix(cache, begin, end, keep_from) for begin, end in self._blocks(first, last)]
            logits = (
                parts[0][0]
                if len(parts) == 1
                else torch.cat([part[0] for part in parts if part[0].numel()], 1)
            )
            logw_BTK = np.concatenate([part[1] for part in parts], 1) if output_router_weights else None
        cache.n_prompt = last if cache.n_prompt is None else cache.n_prompt
        loss = None
        if labels is not None:
            target_BT = labels[:, 1:].to(logits.device)
            loss = nn.functional.nll_loss(
                logits[:, :-1].flatten(0, 1), target_BT.flatten(), ignore_index=-100
            )
            logits = logits[:, -n_keep:]
        if columns is not None:
            logits = logits[:, (columns - (n_new - n_keep)).to(logits.device)]
        output = CBTMOutput(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,  # pyright: ignore[reportArgumentType]
            router_log_weights=torch.from_numpy(logw_BTK).to(logits.device)
            if output_router_weights
            else None,
            **{CACHE: cache if use_cache is None or use_cache else None},  # pyright: ignore[reportArgumentType]
        )
        return output.to_tuple() if return_dict is False else output

    def _begin(
        self,
        given: Any,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        prompt_length: int | None,
        more: Mapping[str, Any],
    ) -> CBTMCache:
        """The cache with the new columns. Raises before it changes if the input is not what it takes."""
        if not isinstance(given, CBTMCache):
            _check_new(given)
        cache = given if isinstance(given, CBTMCache) else CBTMCache(prompt_length)
        first, shape = cache.get_seq_length(), tuple(input_ids.shape)
        _check_arguments(more, _arguments(type(self)))
        if first and len(cache.ids) != shape[0]:
            expected = f"{len(cache.ids)}, as its cache has"
            raise ValueError(_wrong("input_ids", f"{shape[0]} sequences", expected))
        if (largest := int(input_ids.max())) >= (n := len(self._router().embedding)):
            raise ValueError(_wrong("input_ids", largest, f"ids below {n}"))
        _check_mask(mask, shape, first)
        if labels is not None and tuple(labels.shape) != shape:
            raise ValueError(_wrong("labels", f"shape {tuple(labels.shape)}", f"that of input_ids, {shape}"))
        ids, whole = cache.joined(input_ids, mask)
        _check_positions(more.get("position_ids"), whole, first, ids.shape[1])
        cache.ids, cache.mask = ids, whole
        if cache.state is None:
            cache.state = State(len(ids), self.config.n_components, len(self.names))
        cache.state.reserve(ids.shape[1])
        if first and cache.state.n_B[0] < 0:
            self._recount(cache, first)
        return cache

    def _recount(self, cache: CBTMCache, n: int) -> None:
        """The router's sums and counts over the first n columns, after a crop."""
        state = cast(State, cache.state)
        for begin in range(0, n, BLOCK):
            ids_BC = cache.ids[:, begin : min(begin + BLOCK, n)].cpu().numpy()
            mask = (
                None if cache.mask is None else cache.mask[:, begin : begin + ids_BC.shape[1]].cpu().numpy()
            )
            self._router().sums(state, ids_BC, mask)
        state.n_B[:] = n if cache.mask is None else cache.mask[:, :n].sum(1).cpu().numpy()
        state.last_B[:] = n - 1 if cache.mask is None else _last_columns(cache.mask[:, :n])

    def _merged(self, cache: CBTMCache, first: int, n_keep: int) -> tuple[torch.Tensor, np.ndarray]:
        """The same with one model: the mean of the experts' weights by the prompt's router weights (TTMM).

        The sequences of a batch have one prompt. Raises ValueError for several.
        """
        router, n_columns = self._router(), cache.get_seq_length() - first
        if cache.merged is None or not first:
            n_prompt = min(cache.n_prompt or n_columns, n_columns)
            tables = [table[:, :n_prompt] for table in (cache.ids, cache.mask) if table is not None]
            if not all(bool((table == table[:1]).all()) for table in tables):
                found = f"{len(cache.ids)} sequences"
                raise ValueError(_wrong("mode merge", found, "one prompt, as each has its own model"))
            self._recount(cache, n_prompt)
            logprior_K = router.log_prior(cast(State, cache.state).sum_BD[:1, None])[0, 0]
            largest_K = np.argsort(-logprior_K, kind="stable")[: router.n_active]
            logw_K = np.full_like(logprior_K, -np.inf)
            logw_K[largest_K] = logprior_K[largest_K]
            logw_K -= _log_sum_exp(logw_K)
            cache.merged = self.merge(np.exp(logw_K)), logw_K
        net, logw_K = cast(tuple[PreTrainedModel, np.ndarray], cache.merged)
        logits = self._run(net, cache, MERGED, first + n_columns, n_keep).log_softmax(-1)
        return logits.to(cache.ids.device), np.tile(logw_K, (len(cache.ids), n_columns, 1))

    @torch.no_grad()
    def merge(self, weight_K: Sequence[float] | np.ndarray) -> PreTrainedModel:
        """A model whose weights are the mean of the experts' with these weights (TTMM, arXiv 2505.14136).

        A line is logged if the experts are too far apart to average: their root mean square distance from
        the mean, divided by its norm, is `spread`.
        """
        mean: dict[str, torch.Tensor] = {}
        merged, square = None, 0.0
        for j in np.flatnonzero(weight_K).tolist():  # one expert after the other: few have to be in memory
            net = self.expert(j)
            merged = copy.deepcopy(net) if merged is None else merged
            for name, tensor in net.named_parameters():
                part = float(weight_K[j]) * tensor.float()
                square += float((part * tensor).sum())
                mean[name] = mean[name] + part.to(mean[name].device) if name in mean else part
        if merged is None:
            raise ValueError(_wrong("weight_K", "no expert", "at least one weight above 0"))
        norm2 = sum(float(tensor.square().sum()) for tensor in mean.values())
        self.spread = math.sqrt(max(square - norm2, 0) / max(norm2, 1e-30))
        if self.spread > FAR:
            found = f"experts {self.spread:.2f} of their mean's norm away from it"
            log.warning(_wrong("mode merge", found, f"at most {FAR}, or their average predicts badly"))
        for name, tensor in merged.named_parameters():
            tensor.copy_(mean[name])
        return merged

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As of any causal language model of transformers, but with the experts' own caches, which grow."""
        settings: Any = generation_config or self.generation_config
        kind = kwargs.get("cache_implementation") or settings.cache_implementation
        if kind is not None:
            raise ValueError(_wrong("cache_implementation", kind, "none: each expert has a growing cache"))
        ids = kwargs.get("input_ids") if inputs is None else inputs
        _refuse_embeddings(kwargs)
        if ids is not None:
            _check_ids(ids)
            if kwargs.get("use_cache", settings.use_cache) is False:
                kwargs.setdefault("prompt_length", ids.shape[1])
            elif kwargs.get("past_key_values") is None and kwargs.get("cache") is None:
                kwargs[CACHE] = CBTMCache(ids.shape[1])
        return super().generate(inputs, generation_config, *args, **kwargs)  # pyright: ignore

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: torch.Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        """What `generate` gives to forward. It hands over what it has no use for, too."""
        known = {*_arguments(type(self)), *NOT_READ, *NOT_GIVEN}
        found = super().prepare_inputs_for_generation(input_ids, **kwargs)  # pyright: ignore
        return {name: value for name, value in found.items() if name in known}

    def _supports_default_dynamic_cache(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


# What is asked for, and what is refused.


def _sorted_out(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Any]:
    """Arguments of from_pretrained: for the experts, the hub and the config; and the generation config.

    Raises TypeError for one that nobody knows, ValueError for one of transformers that asks for what the
    ensemble does not have.
    """
    known = {*inspect.signature(CBTMConfig.__init__).parameters, *CBTMConfig().to_dict()} - {"self", "kwargs"}
    for_experts, hub, settings, generation = {}, {}, {}, None
    for name, value in given.items():
        if name in OF_EXPERTS or name == "torch_dtype":
            if value is not None:
                for_experts[name.removeprefix("torch_")] = value
        elif name in OF_THE_HUB:
            hub[name] = value
        elif name in known:
            settings[name] = value
        elif name in REFUSED:
            _refuse(name, value, REFUSED[name])
        elif name == "generation_config":
            generation = value
        elif name not in PASSED_OVER:
            raise _unexpected("from_pretrained", name, [*known, *OF_EXPERTS])
    return (
        for_experts,
        {name: value for name, value in hub.items() if value is not None},
        settings,
        generation,
    )


def _configured(given: Any, settings: Mapping[str, Any]) -> CBTMConfig:
    """A copy of a config, or that of a folder, with these settings. Raises ValueError for another model's."""
    if isinstance(given, str | Path):
        given = CBTMConfig.from_pretrained(given)
    elif getattr(given, "model_type", None) != CBTMConfig.model_type:
        raise ValueError(_wrong("config", f"a {type(given).__name__}", "a CBTMConfig, or a folder"))
    config: Any = copy.deepcopy(given)
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def _checked_dtype(dtype: Any) -> Any:
    """Raise ValueError unless it is a dtype of numbers with a fraction, its name, `auto` or None."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if (
        dtype is not None
        and dtype != "auto"
        and not (isinstance(found, torch.dtype) and found.is_floating_point)
    ):
        raise ValueError(_wrong("dtype", dtype, "auto or one of torch, such as bfloat16"))
    return dtype


def _checked_map(device_map: Any, experts: Sequence[str]) -> Any:
    """Raise ValueError unless experts can be put where a device map says."""
    if device_map is None or (isinstance(device_map, str) and device_map in ("auto", "balanced")):
        return device_map
    places = device_map if isinstance(device_map, dict) else {"": device_map}
    if unknown := {str(name) for name in places} - {"", *experts}:
        raise ValueError(_wrong("device_map", ", ".join(sorted(unknown)), ", ".join(experts)))
    for place in places.values():
        try:
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError, TypeError, NotImplementedError):
            place, is_there = f"{place}: no device here", False
        else:
            is_there = torch.device(place).type != "meta"
        if not is_there:
            expected = "auto, a device of torch, or one for each expert"
            raise ValueError(_wrong("device_map", place, expected))
    return device_map


def _refuse_embeddings(more: Mapping[str, Any]) -> None:
    """Raise ValueError for embeddings in the place of ids."""
    if more.get("inputs_embeds") is not None:
        raise ValueError(_wrong("inputs_embeds", "given", "input_ids, which the router reads"))


def _check_ids(ids: Any) -> None:
    """Raise ValueError unless these are token ids, (B, T), at least one."""
    found = None
    if not isinstance(ids, torch.Tensor):
        found = "missing" if ids is None else f"a {type(ids).__name__}"
    elif ids.dim() != 2 or not ids.numel():
        found = f"shape {tuple(ids.shape)}"
    elif ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        found = f"{ids.dtype}".removeprefix("torch.")
    elif (least := int(ids.min())) < 0:
        found = f"{least}"
    if found is not None:
        raise ValueError(_wrong("input_ids", found, "a tensor of token ids, a row of at least one each"))


def _check_arguments(more: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise TypeError for an argument of forward that nobody knows, ValueError for one that is not read."""
    for name, value in more.items():
        if name in NOT_GIVEN:
            _refuse(name, value)
        elif name == "token_type_ids":
            if value is not None and bool(torch.as_tensor(value).any()):
                raise ValueError(_wrong(name, "others than 0", "0 for each token"))
        elif name not in NOT_READ and value is not None:  # None: transformers may give more to come
            raise _unexpected("forward", name, known)


def _check_mask(mask: Any, shape: tuple[int, ...], first: int) -> None:
    """Raise ValueError unless a mask has 0 and 1 for these columns, or for all so far."""
    if mask is None:
        return
    wanted = {shape, (shape[0], first + shape[1])}
    found = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
    if found not in {f"shape {size}" for size in wanted}:
        expected = " or ".join(map(str, sorted(wanted)))
        raise ValueError(_wrong("attention_mask", found, f"shape {expected}"))
    new = mask[:, -shape[1] :]
    if not bool(((new == 0) | (new == 1)).all()):
        raise ValueError(_wrong("attention_mask", "other numbers", "1 for a token, 0 for padding"))


def _check_positions(given: Any, mask: torch.Tensor | None, first: int, end: int) -> None:
    """Raise ValueError for positions other than those that the experts get."""
    if given is None:
        return
    own = torch.arange(end)[None] if mask is None else mask.cpu().cumsum(1) - 1
    own = own[:, first:]
    is_padding = torch.zeros_like(own, dtype=torch.bool) if mask is None else mask[:, first:].cpu() == 0
    given = torch.as_tensor(given).cpu()
    given = given[None] if given.dim() == 1 else given
    fits = given.dim() == 2 and given.shape[1] == own.shape[1]
    if (
        not fits
        or (len(own) > 1 and len(given) not in (1, len(own)))
        or not ((given == own) | is_padding).all()
    ):
        expected = "the number of each token in its text, which it gets without them"
        raise ValueError(f"position_ids: others. Expected {expected}. Leave them out.")


def _kept(logits_to_keep: Any, n: int) -> tuple[torch.Tensor | None, int]:
    """Which of n columns a caller wants (None: the last ones), and how many from the first of them on."""
    if isinstance(logits_to_keep, torch.Tensor):
        given = logits_to_keep.cpu()
        is_number = not given.is_floating_point() and given.dtype != torch.bool
        if (
            given.dim() == 1
            and given.numel()
            and is_number
            and -n <= int(given.min()) <= int(given.max()) < n
        ):
            columns = given.long() % n
            return columns, n - int(columns.min())
        found = f"a tensor of shape {tuple(given.shape)}"
    elif type(logits_to_keep) is int and logits_to_keep >= 0:
        return None, min(logits_to_keep or n, n)
    else:
        found = repr(logits_to_keep)
    expected = f"a whole number of at least 0, or the numbers of some of {n} columns"
    raise ValueError(_wrong("logits_to_keep", found, expected))


def _check_new(cache: Any) -> None:
    """Raise ValueError for a cache that holds a text, or that has a bound."""
    is_empty = cache is None or (isinstance(cache, Cache) and not cache.get_seq_length())
    if not is_empty or getattr(cache, "is_compileable", False):
        expected = "the ensemble's own cache, or an empty dynamic one"
        raise ValueError(_wrong("past_key_values", type(cache).__name__, expected))


# Files.


def _about(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells the files that an expert is loaded from apart from others: inode, size and time of each."""
    if not folder.is_dir():
        return {}
    found = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
    about = {path.name: path.stat() for path in found if "safetensors" in path.name or path.stem == "config"}
    return {name: (now.st_ino, now.st_size, now.st_mtime_ns) for name, now in about.items()}


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none, or if it is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _new_hash() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=16)


def _hash(path: Path) -> str:
    """The hash of a file, as records have it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _new_hash).hexdigest()


def _write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with its seal: the hash of all its other bytes, as cbtm_pipeline reads it."""

    def text(value: Mapping[str, Any]) -> bytes:
        return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()

    rest = {name: value for name, value in content.items() if name != "seal"}
    digest = _new_hash()
    digest.update(text(rest))
    with _new_file(path) as file:
        file.write(text({**rest, "seal": digest.hexdigest()}))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Any]:
    """Write a file that is there whole or not at all. One that is there may be a link to another's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.unlink(missing_ok=True)
    try:
        with tmp.open("xb") as file:  # a link of this name is not followed
            yield file
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


AutoConfig.register("cbtm", CBTMConfig, exist_ok=True)
AutoModelForCausalLM.register(CBTMConfig, CBTMForCausalLM, exist_ok=True)
