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
import inspect
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

BLOCK = 256  # columns that are mixed at once: bounds the memory of a long text
ROUTER = "router.safetensors"
NO_EVIDENCE = 1.0  # squared distance of a prefix without a usable term: equally far from all centres
N_SNAPSHOTS = 8  # states of the router that are kept, so that a few columns can be taken back quickly


class CBTMConfig(PretrainedConfig):
    """What the ensemble is, and how it is run.

    `experts` are the names of their folders, `exclude` those that are left out. Router `paper` weighs by the
    prefix alone, `filter` also by what the experts said of it. `n_active` experts run for each token.
    `hysteresis`: an active expert is replaced only by one that weighs so many times more. `route="once"`
    fixes the active experts after the prompt, `fix_after` after so many tokens. `max_loaded` experts stay in
    memory, the least recently used goes first; None is no bound.
    """

    model_type = "cbtm"

    def __init__(
        self,
        experts: Sequence[str] = (),
        exclude: Sequence[str] = (),
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
        **kwargs: Any,
    ):
        for name, value, known in (
            ("router", router, ("paper", "filter")),
            ("route", route, ("token", "once")),
            ("mode", mode, ("ensemble", "merge")),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r}. Expected {' or '.join(known)}. Change it.")
        self.experts, self.exclude = list(experts), list(exclude)
        self.n_components, self.vocab_size = n_components, vocab_size
        self.router, self.n_active, self.router_temperature = router, n_active, router_temperature
        self.epsilon, self.beta, self.hysteresis = epsilon, beta, hysteresis
        self.route, self.fix_after, self.mode, self.max_loaded = route, fix_after, mode, max_loaded
        super().__init__(**kwargs)


@dataclass
class CBTMOutput(CausalLMOutputWithPast):
    """The usual output, and the logarithm of each expert's weight, (B, T, K), in the order of `model.names`.

    It is -inf for an expert that did not run.
    """

    router_log_weights: torch.Tensor | None = None


class State:
    """What the router knows of the text so far, by sequence (float64): the formulas are in `Router`."""

    def __init__(self, batch_size: int, n_components: int, n_experts: int):
        self.sum_BD = torch.zeros(batch_size, n_components, dtype=torch.float64)
        self.logb_BK = torch.zeros(batch_size, n_experts, dtype=torch.float64)  # the filter's belief
        self.logw_BK = torch.full((batch_size, n_experts), -torch.inf, dtype=torch.float64)
        self.n_B = torch.zeros(batch_size, dtype=torch.long)  # columns so far, padding not counted

    @property
    def active_BK(self) -> torch.Tensor:
        return self.logw_BK > -torch.inf

    def take(self, rows: torch.Tensor) -> "State":
        """The state of these sequences."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            setattr(new, name, value.index_select(0, rows.cpu()))
        return new


class CBTMCache(Cache):
    """The text so far, the router's state, and one KV cache per expert that has run.

    `n_seen[j]` columns have gone through expert j; `tail[j]` has its log-probabilities after the last one.
    """

    def __init__(self, state: State):
        super().__init__(layers=[])
        batch_size = len(state.n_B)
        self.ids = torch.zeros(batch_size, 0, dtype=torch.long)
        self.mask = torch.zeros(batch_size, 0, dtype=torch.long)
        self.kv: dict[int, DynamicCache] = {}
        self.n_seen: dict[int, int] = {}
        self.tail: dict[int, torch.Tensor] = {}
        self.state, self.fixed = state, False
        self.gains: list[
            torch.Tensor
        ] = []  # of each column but the first: log-probability of its token, (B, K)
        self.snapshots: list[tuple[int, State]] = [(0, state)]
        self.merged: PreTrainedModel | None = None

    def append(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add columns. `mask` covers all columns, or the new ones."""
        self.snapshots = [
            self.snapshots[0],
            *self.snapshots[1:][-N_SNAPSHOTS:],
            (self.get_seq_length(), self.state),
        ]
        self.ids = torch.cat([self.ids.to(ids.device), ids], 1)
        new = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :].to(ids.device, torch.long)
        self.mask = torch.cat([self.mask.to(ids.device), new], 1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.ids.shape[1]

    def get_max_length(self, layer_idx: int = 0) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return self.get_seq_length() > 0

    def activate_past_recording(self) -> None:
        """The text is recorded anyway."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take these sequences, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.ids, self.mask = (x.index_select(0, indices.to(x.device)) for x in (self.ids, self.mask))
        self.state = self.state.take(indices)
        self.gains = [gain.index_select(0, indices.cpu()) for gain in self.gains]
        self.snapshots = [(n, state.take(indices)) for n, state in self.snapshots]
        self.tail = {j: tail.index_select(0, indices.to(tail.device)) for j, tail in self.tail.items()}
        for cache in self.kv.values():
            cache.batch_select_indices(indices.to(self.ids.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.ids)).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Take the last columns back. A negative number counts them."""
        n = max_length if max_length >= 0 else self.get_seq_length() + max_length
        if n >= self.get_seq_length():
            return
        self.ids, self.mask = self.ids[:, :n], self.mask[:, :n]
        for j, n_seen in self.n_seen.items():
            if n_seen > n - 1:  # what it said after column n - 1 is computed again
                self.kv[j].crop(max(n - 1, 0))
                self.n_seen[j] = max(n - 1, 0)
                self.tail.pop(j, None)
        self.snapshots = [(k, state) for k, state in self.snapshots if k <= n]
        self.state, self.fixed = self.snapshots[-1][1], False


class Router(nn.Module):
    """The weights of the experts after each prefix. `embedding` and `centres` come from the clustering."""

    embedding: torch.Tensor  # (V, D) float32
    centres: torch.Tensor  # (K, D) float32

    def __init__(self, config: CBTMConfig, n_experts: int):
        super().__init__()
        self.config = config
        self.register_buffer(
            "embedding", torch.zeros(config.vocab_size, config.n_components), persistent=False
        )
        self.register_buffer("centres", torch.zeros(n_experts, config.n_components), persistent=False)

    def log_prior(self, sum_BD: torch.Tensor) -> torch.Tensor:
        """The paper's weights over all experts, (B, K): the softmax of -d2 / T (section 2.3)."""
        length_B1 = sum_BD.norm(dim=1, keepdim=True)
        h_BD = (sum_BD / length_B1.clamp_min(torch.finfo(torch.float64).tiny)).float().double()
        centres_KD = self.centres.double().cpu()
        d2_BK = (
            h_BD.square().sum(1, keepdim=True) - 2 * h_BD @ centres_KD.T + centres_KD.square().sum(1)
        ).float()
        d2_BK = torch.where(length_B1 > 0, d2_BK.double(), NO_EVIDENCE)
        return (-d2_BK / self.config.router_temperature).log_softmax(1)

    def credited(self, state: State, gain_BK: torch.Tensor) -> torch.Tensor:
        """The belief after a token that expert j gave the log-probability `gain_BK`.

        Active experts share their total weight anew, in proportion to w_j p_j^beta. The others keep theirs.
        """
        credit_BK = torch.where(state.active_BK, state.logw_BK + self.config.beta * gain_BK, -torch.inf)
        share_BK = credit_BK.log_softmax(1)
        total_B1 = torch.where(state.active_BK, state.logb_BK, -torch.inf).logsumexp(1, keepdim=True)
        return torch.where(state.active_BK, share_BK + total_B1, state.logb_BK)

    def step(
        self,
        state: State,
        ids_B: torch.Tensor,
        mask_B: torch.Tensor,
        gain_BK: torch.Tensor | None,
        fixed: bool,
    ) -> State:
        """The state after one more column. `gain_BK`: what experts gave its tokens, None for the first."""
        config, new = self.config, copy.copy(state)
        new.sum_BD = state.sum_BD + self.embedding[ids_B.to(self.embedding.device)].double().cpu()
        logprior_BK = self.log_prior(new.sum_BD)
        value_BK = logprior_BK
        if config.router == "filter":
            logb_BK = logprior_BK
            if gain_BK is not None:
                logb_BK = torch.where(state.n_B[:, None] > 0, self.credited(state, gain_BK), logprior_BK)
            stay, leak = (math.log(x) if x > 0 else -math.inf for x in (1 - config.epsilon, config.epsilon))
            value_BK = torch.logaddexp(logb_BK + stay, logprior_BK + leak)
        new.logb_BK, new.n_B = value_BK, state.n_B + 1
        active_BK = self._active(value_BK, state, fixed)
        new.logw_BK = value_BK.masked_fill(~active_BK, -torch.inf).log_softmax(1)
        for name, value in vars(new).items():  # padding changes nothing
            old = getattr(state, name)
            setattr(new, name, torch.where(mask_B.view(-1, *[1] * (value.dim() - 1)).bool(), value, old))
        return new

    def _active(self, value_BK: torch.Tensor, state: State, fixed: bool) -> torch.Tensor:
        """The experts that run (bool, (B, K)): the largest values, or nearly those that ran before."""
        n_active = min(self.config.n_active or value_BK.shape[1], value_BK.shape[1])
        order_BK = torch.sort(value_BK, dim=1, descending=True, stable=True).indices[:, :n_active]
        largest_BK = torch.zeros_like(value_BK, dtype=torch.bool).scatter(1, order_BK, True)
        before_BK, has_before_B = state.active_BK.clone(), state.n_B > 0
        sticky_BK, factor = before_BK.clone(), math.log(self.config.hysteresis)
        for _ in range(n_active if factor else 0):
            weakest = value_BK.masked_fill(~sticky_BK, torch.inf).min(1)
            strongest = value_BK.masked_fill(sticky_BK, -torch.inf).max(1)
            swap_B = strongest.values > weakest.values + factor
            rows = swap_B.nonzero().squeeze(1)
            sticky_BK[rows, weakest.indices[rows]] = False
            sticky_BK[rows, strongest.indices[rows]] = True
        found_BK = torch.where(has_before_B[:, None], sticky_BK, largest_BK) if factor else largest_BK
        limit = self.config.fix_after
        fixed_B = has_before_B & (torch.tensor(fixed) if limit is None else (state.n_B > limit) | fixed)
        return torch.where(fixed_B[:, None], before_BK, found_BK)


class CBTMForCausalLM(PreTrainedModel, GenerationMixin):
    """The ensemble. `names` are its experts, in the order of the router's centres."""

    config: CBTMConfig
    config_class = CBTMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_cache_class = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: CBTMConfig, folder: str | Path | None = None, **expert_kwargs: Any):
        super().__init__(config)
        if unknown := set(config.exclude) - set(config.experts):
            raise ValueError(f"exclude: {', '.join(sorted(unknown))}. Expected {', '.join(config.experts)}.")
        self.names = [name for name in config.experts if name not in config.exclude]
        if not self.names:
            raise ValueError("exclude: every expert. Expected at least one to be left. Name fewer.")
        self.folder, self.expert_kwargs = Path(folder or config._name_or_path), expert_kwargs
        self.device_map = expert_kwargs.pop("device_map", None)
        self.router = Router(config, len(self.names))
        self.experts = nn.ModuleDict()  # those in memory, the least recently used first
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
        if not isinstance(config, CBTMConfig):
            config, kwargs = CBTMConfig.from_pretrained(  # pyright: ignore
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(folder), revision=kwargs.get("revision")))
        known = ("dtype", "torch_dtype", "attn_implementation", "device_map")
        model = cls(config, folder, **{name: kwargs[name] for name in known if kwargs.get(name) is not None})
        tensors = load_file(folder / ROUTER)
        rows = [config.experts.index(name) for name in model.names]
        model.router.embedding, model.router.centres = tensors["embedding"], tensors["centres"][rows]
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        devices = model._devices()
        model.router.to(devices[0])
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Copy the ensemble's folder, with this config."""
        shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)
        self.config.save_pretrained(save_directory)

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.router.centres.device

    def _devices(self) -> list[torch.device]:
        """The device of each expert."""
        where = self.device_map
        if isinstance(where, dict):
            return [torch.device(where.get(name, where.get("", "cpu"))) for name in self.names]
        if where in ("auto", "balanced"):
            n_gpus = torch.cuda.device_count()
            return [
                torch.device("cuda", j % n_gpus) if n_gpus else torch.device("cpu")
                for j in range(len(self.names))
            ]
        return [self.device if where is None else torch.device(where)] * len(self.names)

    def expert(self, j: int) -> PreTrainedModel:
        """Expert j, from memory or from its folder. The least recently used one makes room for it."""
        name = self.names[j]
        if name in self.experts:
            expert: Any = self.experts.pop(name)
        else:
            limit = self.config.max_loaded
            while limit is not None and len(self.experts) >= max(limit, 1):
                del self.experts[next(iter(self.experts))]
            expert = AutoModelForCausalLM.from_pretrained(
                self.folder / "experts" / name, **self.expert_kwargs
            )
            expert = expert.to(self._devices()[j]).eval()
        self.experts[name] = expert
        return expert

    def _run(self, net: Any, cache: CBTMCache, j: int, end: int, n_keep: int) -> torch.Tensor:
        """Let expert j read columns up to `end`. Returns its last log-probabilities, (B, n_keep, V)."""
        first, device = cache.n_seen.get(j, 0), next(net.parameters()).device
        kv = cache.kv.setdefault(j, DynamicCache(config=net.config))
        position = (cache.mask[:, :end].cumsum(1) - 1).clamp_min(0)
        inputs = {
            "input_ids": cache.ids[:, first:end],
            "attention_mask": cache.mask[:, :end],
            "position_ids": position[:, first:],
        }
        names = inspect.signature(net.forward).parameters
        inputs = {name: value.to(device) for name, value in inputs.items() if name in names}
        keep = {"logits_to_keep": n_keep} if "logits_to_keep" in names else {}
        logits = net(**inputs, **keep, past_key_values=kv, use_cache=True).logits
        self.n_passes += (end - first) * len(cache.ids)
        cache.n_seen[j] = end
        logprob = logits[:, -n_keep:].float().log_softmax(-1)
        cache.tail[j] = logprob[:, -1]
        return logprob

    def _gain(
        self, cache: CBTMCache, column: int, block: dict[int, torch.Tensor], begin: int
    ) -> torch.Tensor:
        """The log-probability that each active expert gave the token of a column, (B, K)."""
        gain_BK = torch.full(cache.state.logb_BK.shape, -torch.inf, dtype=torch.float64)
        for j in cache.state.active_BK.any(0).nonzero().flatten().tolist():
            if j in block and column > begin:
                logprob_BV = block[j][:, column - 1 - begin]
            else:
                if j not in cache.tail or cache.n_seen[j] != column:
                    self._run(self.expert(j), cache, j, column, 1)
                logprob_BV = cache.tail[j]
            ids_B1 = cache.ids[:, column, None].to(logprob_BV.device)
            gain_BK[:, j] = logprob_BV.gather(1, ids_B1).squeeze(1).double().cpu()
        return gain_BK

    def _mix(
        self, cache: CBTMCache, begin: int, end: int, keep_from: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix columns `begin` to `end`: log-probabilities from `keep_from` on, and all weights (B, C, K)."""
        block: dict[int, torch.Tensor] = {}
        weights, is_filter = [], self.config.router == "filter"
        for column in range(begin, end):
            gain_BK = self._gain(cache, column, block, begin) if is_filter and column else None
            ids_B, mask_B = cache.ids[:, column].cpu(), cache.mask[:, column].cpu()
            cache.state = self.router.step(cache.state, ids_B, mask_B, gain_BK, cache.fixed)
            weights.append(cache.state.logw_BK.masked_fill(~mask_B[:, None].bool(), -torch.inf))
            if is_filter or column >= keep_from:
                for j in (weights[-1] > -torch.inf).any(0).nonzero().flatten().tolist():
                    if j not in block:
                        net = self.expert(j)
                        n_kept = end - (begin if is_filter else max(begin, keep_from))
                        block[j] = self._run(net, cache, j, end, n_kept)
        logw_BCK, first = torch.stack(weights, 1), max(begin, keep_from)
        shape = (len(cache.ids), max(end - first, 0), self.config.vocab_size)
        mixed_BCV = torch.full(shape, -torch.inf, device=cache.ids.device)
        for j, logprob_BCV in block.items() if end > first else ():
            logw_BC1 = logw_BCK[:, first - begin :, j, None].float().to(mixed_BCV.device)
            own_BCV = logprob_BCV[:, logprob_BCV.shape[1] - (end - first) :].to(mixed_BCV.device)
            mixed_BCV = torch.logaddexp(
                mixed_BCV, torch.where(logw_BC1 > -torch.inf, own_BCV + logw_BC1, -torch.inf)
            )
        padding_BC1 = cache.mask[:, first:end, None].to(mixed_BCV.device) == 0
        return mixed_BCV.masked_fill(padding_BC1, -math.log(self.config.vocab_size)), logw_BCK

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
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CBTMOutput:
        """Log-probabilities of the next token, (B, T, V), after the last `logits_to_keep` columns (0: all).

        `past_key_values` is the cache of the call before. An empty one, as `generate` makes it, is left out.
        """
        cache = past_key_values if isinstance(past_key_values, CBTMCache) else kwargs.get("cache")
        if not isinstance(cache, CBTMCache):
            _check_new(past_key_values, input_ids, kwargs)
            cache = CBTMCache(State(len(input_ids), self.config.n_components, len(self.names)))
        is_prompt, first = not cache.get_seq_length(), cache.get_seq_length()
        cache.append(input_ids, attention_mask)
        last = cache.get_seq_length()
        keep_from = first if labels is not None or not logits_to_keep else max(first, last - logits_to_keep)
        if self.config.mode == "merge":
            logits, weights = self._merged(cache, is_prompt, last - keep_from)
        else:
            parts = [self._mix(cache, b, min(b + BLOCK, last), keep_from) for b in range(first, last, BLOCK)]
            logits, weights = (torch.cat(found, 1) for found in zip(*parts, strict=True))
            cache.fixed = cache.fixed or self.config.route == "once"
        loss = None
        if labels is not None:
            target_BT = labels[:, 1:].to(logits.device)
            loss = nn.functional.nll_loss(
                logits[:, :-1].flatten(0, 1), target_BT.flatten(), ignore_index=-100
            )
        return CBTMOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache is None or use_cache else None,
            router_log_weights=weights if output_router_weights else None,
        )

    def _merged(self, cache: CBTMCache, is_prompt: bool, n_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with one model: the mean of the experts' weights by the prompt's router weights (TTMM)."""
        if len(cache.ids) > 1 and is_prompt:
            raise ValueError(
                f"mode merge: {len(cache.ids)} sequences. Expected one, as each has its own model."
            )
        if is_prompt:
            for column in range(cache.get_seq_length()):
                ids_B, mask_B = cache.ids[:, column].cpu(), cache.mask[:, column].cpu()
                state = self.router.step(cache.state, ids_B, mask_B, None, False)
                cache.state = state
            cache.merged = self.merge(cache.state.logw_BK[0].exp())
        assert cache.merged is not None
        logits = self._run(cache.merged, cache, -1, cache.get_seq_length(), n_keep)
        return logits.to(cache.ids.device), cache.state.logw_BK[:, None].expand(-1, n_keep, -1)

    def merge(self, weight_K: torch.Tensor) -> PreTrainedModel:
        """A model whose weights are the mean of the experts' with these weights (TTMM, arXiv 2505.14136)."""
        active = [j for j, weight in enumerate(weight_K.tolist()) if weight > 0]
        merged = copy.deepcopy(self.expert(active[0]))
        for name, tensor in merged.state_dict().items():
            if tensor.is_floating_point():
                parts = (
                    weight_K[j].item() * self.expert(j).state_dict()[name].to(tensor.device) for j in active
                )
                tensor.copy_(sum(parts))
        return merged

    def _supports_default_dynamic_cache(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


def _check_new(cache: Cache | None, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for input that the ensemble does not take."""
    if kwargs.get("inputs_embeds") is not None or input_ids is None:
        raise ValueError("inputs_embeds: given. Expected input_ids, which the router reads. Give input_ids.")
    if cache is not None and (cache.get_seq_length() or getattr(cache, "is_compileable", False)):
        found = type(cache).__name__
        raise ValueError(
            f"past_key_values: {found}. Expected the ensemble's own cache, or an empty dynamic one."
        )


AutoConfig.register("cbtm", CBTMConfig, exist_ok=True)
AutoModelForCausalLM.register(CBTMConfig, CBTMForCausalLM, exist_ok=True)
