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

import copy
import functools
import inspect
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

BLOCK = 128  # columns that are mixed at once: bounds the memory of a long text
FIRST_BLOCKS = (8, 64)  # ends of the first blocks: a text's first weights change fast, and waste little there
ROUTER, RECORD = "router.safetensors", "files.json"
NO_EVIDENCE = 1.0  # squared distance of a prefix without a usable term: equally far from all centres
MERGED = -1  # the number under which a cache keeps the merged model
FAR = 0.2  # experts whose spread is larger do not average: those of a young seed lie 0.5 to 0.7 away
log = logging.getLogger("cbtm")
# transformers 5.24 has renamed the argument
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class CBTMConfig(PretrainedConfig):
    """What the ensemble is, and how it is run.

    `experts` are the names of their folders, `exclude` those that are left out, by name or as
    `tag:licence=cc-by`; `tags` has the tags of each expert. Router `paper` weighs by the
    prefix alone, `filter` also by what the experts said of it. `n_active` experts run for each token; None is
    all. `hysteresis`: an active expert is replaced only by one that weighs more than so many times as much.
    `route="once"` fixes the active experts at the end of the prompt, `fix_after` after so many tokens behind
    the first. `max_loaded` experts stay in memory; None is no bound. The least recently used goes first, and
    what it has read is forgotten unless it is active.
    """

    model_type = "cbtm"

    def __init__(
        self,
        experts: Sequence[str] = (),
        exclude: Sequence[str] | str = (),
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
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.n_components, self.vocab_size = n_components, vocab_size
        self.router, self.n_active, self.router_temperature = router, n_active, router_temperature
        self.epsilon, self.beta, self.hysteresis = epsilon, beta, hysteresis
        self.route, self.fix_after, self.mode, self.max_loaded = route, fix_after, mode, max_loaded
        self.check()
        super().__init__(**kwargs)

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
        given: Any = self.exclude
        wanted = {given} if isinstance(given, str) else {str(name) for name in given}
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


class CBTMCache(Cache):
    """The text so far, the router's state, and one KV cache per expert that has run.

    `n_seen[j]` columns have gone through expert j; `tail[j]` has its log-probabilities after the last one,
    (B, V). `n_prompt`: columns of the prompt; None: those of the first call.
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
        self.merged: tuple[PreTrainedModel, np.ndarray] | None = None  # and the experts' logw_BK

    def append(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add columns. `mask` covers all columns, or the new ones."""
        if mask is not None:
            mask = mask[:, -ids.shape[1] :].to(ids.device, torch.long)
        if self.mask is not None or (mask is not None and not bool(mask.all())):
            old = torch.ones_like(self.ids) if self.mask is None else self.mask
            self.mask = _joined(old, torch.ones_like(ids) if mask is None else mask)
        self.ids = _joined(self.ids, ids)

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
        if self.n_prompt is not None and n < self.n_prompt:
            self.n_prompt = None
        for j, n_seen in list(self.n_seen.items()):
            if n_seen > n - 1:  # what it said after column n - 1 is needed again
                self.n_seen[j] = max(n - 1, 0)
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
        if ids_BC.max() >= len(self.embedding):
            raise ValueError(_wrong("input_ids", ids_BC.max(), f"ids below {len(self.embedding)}"))
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
        rows: tuple[np.ndarray, np.ndarray] | None,
        fixed: bool,
    ) -> np.ndarray:
        """Move the state on by a column; returns the logarithm of the weights, (B, K).

        `gain_BK` has the log-probability that each active expert gave the column's token. `rows`: which
        sequences have a token there (bool), and which had one in the column before; None: all have.
        """
        config, (logb_BK, before_BK) = self.config, state.before(column)
        started_B1 = (state.n_B > 0)[:, None]
        value_BK = logprior_BK
        if config.router == "filter":
            if gain_BK is not None:
                heard_B1 = started_B1 if rows is None else started_B1 & rows[1][:, None]
                logb_BK = np.where(heard_B1, self._credited(logb_BK, before_BK, gain_BK), logb_BK)
            logb_BK = np.where(started_B1, logb_BK, logprior_BK)
            value_BK = _log_add(np.log1p(-config.epsilon) + logb_BK, np.log(config.epsilon) + logprior_BK)
        fix_after = math.inf if config.fix_after is None else config.fix_after
        fixed_B1 = started_B1 & (fixed | (state.n_B > fix_after)[:, None])
        active_BK = self._active(value_BK, before_BK > -np.inf, started_B1, fixed_B1)
        logw_BK = np.where(active_BK, value_BK, -np.inf)
        logw_BK -= _log_sum_exp(logw_BK)
        new_BK2 = state.trail_BCK2[:, column]
        new_BK2[..., 0], new_BK2[..., 1] = value_BK, logw_BK
        if rows is None:
            state.n_B += 1
            return logw_BK
        here_B1 = rows[0][:, None]
        new_BK2[~rows[0]] = np.stack(state.before(column), 2)[~rows[0]]  # padding changes nothing
        state.n_B += rows[0]
        return np.where(here_B1, logw_BK, -np.inf)

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


class CBTMForCausalLM(PreTrainedModel, GenerationMixin):
    """The ensemble. `names` are its experts, in the order of the router's centres."""

    config: CBTMConfig
    config_class = CBTMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_cache_class = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: CBTMConfig, folder: str | Path | None = None, **expert_kwargs: Any):
        config.check()
        super().__init__(config)
        excluded = config.excluded()
        self.names = [name for name in config.experts if name not in excluded]
        self.folder, self.expert_kwargs = Path(folder or config._name_or_path), expert_kwargs
        self.device_map = expert_kwargs.pop("device_map", None)
        if isinstance(self.device_map, dict) and (unknown := set(self.device_map) - {"", *config.experts}):
            raise ValueError(_wrong("device_map", ", ".join(sorted(unknown)), ", ".join(config.experts)))
        self.router: Router | None = None
        self.register_buffer(
            "anchor", torch.empty(0), persistent=False
        )  # shows where `to` has moved the model
        self.experts = nn.ModuleDict()  # those in memory, the least recently used first
        self.latest = ""  # the name of the last
        self.spread = 0.0  # of the experts that were merged last
        self.n_passes = 0  # columns that went through an expert, over all sequences: the cost
        self.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> "CBTMForCausalLM":
        """Load the router; experts load when they first run.

        Further arguments: those of CBTMConfig; and for the experts `dtype`, `attn_implementation` and
        `device_map`, which is a device, `auto` (all GPUs in turn), or a device for each expert's name.
        """
        config: Any = kwargs.pop("config", None)
        known = ("dtype", "torch_dtype", "attn_implementation", "device_map")
        for_experts = {name: kwargs.pop(name) for name in known if kwargs.get(name) is not None}
        if not isinstance(config, CBTMConfig):
            config, kwargs = CBTMConfig.from_pretrained(  # pyright: ignore
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(folder), revision=kwargs.get("revision")))
        model = cls(config, folder, **for_experts)
        tensors = load_file(folder / ROUTER)
        rows = [config.experts.index(name) for name in model.names]
        model.router = Router(config, tensors["embedding"].numpy(), tensors["centres"][rows].numpy())
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.to(model._devices()[0])  # pyright: ignore[reportArgumentType]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Copy the ensemble's folder, with this config and without its record, which knows another one."""
        if Path(save_directory).resolve() != self.folder.resolve():
            left_out = shutil.ignore_patterns(RECORD)
            shutil.copytree(self.folder, save_directory, dirs_exist_ok=True, ignore=left_out)
        self.config.save_pretrained(save_directory)

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
        """Expert j, from memory or from its folder. The least recently used inactive one makes room."""
        name = self.names[j]
        if name in self.experts:
            if name != self.latest:
                self.experts[name] = self.experts.pop(name)
            self.latest = name
            return cast(PreTrainedModel, self.experts[name])
        limit = self.config.max_loaded
        while limit is not None and len(self.experts) >= limit:
            needed = {self.names[i] for i in active}
            del self.experts[min(self.experts, key=lambda other: other in needed)]  # min takes the first
        # an expert is one of transformers' own models: no code of its folder is run, nor is anybody asked
        options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        folder = self.folder / "experts" / name
        expert = AutoModelForCausalLM.from_pretrained(folder, **options, **self.expert_kwargs)
        self.experts[name] = expert.to(self._devices()[j]).eval()  # pyright: ignore[reportArgumentType]
        self.latest = name
        return expert

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
        mask_BC = None if cache.mask is None else cache.mask[:, max(begin - 1, 0) : end].cpu().numpy() > 0
        here_BC = None if mask_BC is None else mask_BC[:, -ids_BC.shape[1] :]
        logprior_BCK = router.log_prior(router.sums(state, ids_BC, here_BC))
        logw_BCK, gain_BCK = np.empty_like(logprior_BCK), np.full_like(logprior_BCK, -np.inf)
        said: dict[int, torch.Tensor] = {}  # by expert: the log-probabilities that end at column `end`
        first = max(begin, keep_from)
        heard_from = max(begin - 1, 0) if router.listens else first

        def run(j: int, active: Sequence[int]) -> None:
            net = self.expert(j, active)
            if self.config.max_loaded is not None:  # it bounds the KV caches, too
                kept = {*active, *(i for i, name in enumerate(self.names) if name in self.experts)}
                for i in set(cache.kv) - kept:
                    cache.drop(i)
            logits_BCV = self._run(net, cache, j, end, end - heard_from)
            said[j] = logits_BCV[:, -max(end - first, 1) :].log_softmax(-1)
            if router.listens:
                heard_BCV, start = logits_BCV[:, :-1], end - logits_BCV.shape[1] + 1
                if start < end:
                    gain_BC = _of_tokens(heard_BCV, cache.ids[:, start:end])
                    gain_BCK[:, start - begin :, j] = gain_BC - heard_BCV.logsumexp(-1).cpu().numpy()
                cache.tail[j] = said[j][:, -1].clone() if said[j].shape[1] > 1 else said[j][:, -1]

        if router.listens and begin:
            logw_BK = state.before(begin)[1]
            active = _active(logw_BK if mask_BC is None else logw_BK[mask_BC[:, 0] & mask_BC[:, 1]])
            for j in active:
                if j in cache.tail and cache.n_seen[j] == begin:
                    gain_BCK[:, 0, j] = _of_tokens(cache.tail[j][:, None], cache.ids[:, begin, None])[:, 0]
                else:  # after a crop, it has to speak again
                    run(j, active)
        fixed_from = math.inf if self.config.route == "token" or cache.n_prompt is None else cache.n_prompt
        if mask_BC is None and not router.listens and self.config.hysteresis == 1:
            after = math.inf if self.config.fix_after is None else self.config.fix_after + 1
            logw_BCK = router.block(state, begin, logprior_BCK, min(fixed_from, after))
            active = _active(logw_BCK[:, first - begin :])
            for j in active:
                run(j, active)
            return self._mixed(cache, said, logw_BCK[:, first - begin :], end), logw_BCK
        for c, column in enumerate(range(begin, end)):
            rows = None
            if here_BC is not None and mask_BC is not None:
                rows = here_BC[:, c], mask_BC[:, c if begin else max(c - 1, 0)]
            gain_BK = gain_BCK[:, c] if router.listens and column else None
            logw_BCK[:, c] = router.step(
                state, column, logprior_BCK[:, c], gain_BK, rows, column >= fixed_from
            )
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
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_router_weights: bool = False,
        prompt_length: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CBTMOutput:
        """Log-probabilities of the next token, (B, T, V), after the last `logits_to_keep` columns (0: all).

        `past_key_values` is the cache of the call before. An empty one, as `generate` makes it, is left out.
        `prompt_length`: the columns at whose end `route="once"` fixes the experts, for calls without a cache.
        """
        given = kwargs.get("cache") if past_key_values is None else past_key_values
        if not isinstance(given, CBTMCache):
            _check_new(given, input_ids, kwargs)
        cache = given if isinstance(given, CBTMCache) else CBTMCache(prompt_length)
        first = cache.get_seq_length()
        cache.append(input_ids, attention_mask)
        last = cache.get_seq_length()
        if cache.state is None:
            cache.state = State(len(cache.ids), self.config.n_components, len(self.names))
        cache.state.reserve(last)
        if first and cache.state.n_B[0] < 0:
            self._recount(cache, first)
        keep_from = first if labels is not None or not logits_to_keep else max(first, last - logits_to_keep)
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
        return CBTMOutput(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,  # pyright: ignore[reportArgumentType]
            router_log_weights=torch.from_numpy(logw_BTK).to(logits.device)
            if output_router_weights
            else None,
            **{CACHE: cache if use_cache is None or use_cache else None},  # pyright: ignore[reportArgumentType]
        )

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

    def _merged(self, cache: CBTMCache, first: int, n_keep: int) -> tuple[torch.Tensor, np.ndarray]:
        """The same with one model: the mean of the experts' weights by the prompt's router weights (TTMM)."""
        router, n_columns = self._router(), cache.get_seq_length() - first
        if cache.merged is None or not first:
            if len(cache.ids) > 1:
                found = f"{len(cache.ids)} sequences"
                raise ValueError(_wrong("mode merge", found, "one, as each has its own model"))
            self._recount(cache, n_columns)
            logprior_BK = router.log_prior(cast(State, cache.state).sum_BD[:, None])[:, 0]
            largest_K = np.argsort(-logprior_BK[0], kind="stable")[: router.n_active]
            logw_BK = np.full_like(logprior_BK, -np.inf)
            logw_BK[:, largest_K] = logprior_BK[:, largest_K]
            logw_BK -= _log_sum_exp(logw_BK)
            cache.merged = self.merge(np.exp(logw_BK[0])), logw_BK
        net, logw_BK = cast(tuple[PreTrainedModel, np.ndarray], cache.merged)
        logits = self._run(net, cache, MERGED, first + n_columns, n_keep).log_softmax(-1)
        return logits.to(cache.ids.device), np.repeat(logw_BK[:, None], n_columns, 1)

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
        if isinstance(ids, torch.Tensor) and ids.dim() == 2:
            if kwargs.get("use_cache", settings.use_cache) is False:
                kwargs.setdefault("prompt_length", ids.shape[1])
            elif kwargs.get("past_key_values") is None and kwargs.get("cache") is None:
                kwargs[CACHE] = CBTMCache(ids.shape[1])
        return super().generate(inputs, generation_config, *args, **kwargs)  # pyright: ignore

    def _supports_default_dynamic_cache(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


def _check_new(cache: Cache | None, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for input that the ensemble does not take."""
    if kwargs.get("inputs_embeds") is not None or input_ids is None:
        raise ValueError(_wrong("inputs_embeds", "given", "input_ids, which the router reads"))
    if cache is not None and (cache.get_seq_length() or getattr(cache, "is_compileable", False)):
        expected = "the ensemble's own cache, or an empty dynamic one"
        raise ValueError(_wrong("past_key_values", type(cache).__name__, expected))


AutoConfig.register("cbtm", CBTMConfig, exist_ok=True)
AutoModelForCausalLM.register(CBTMConfig, CBTMForCausalLM, exist_ok=True)
