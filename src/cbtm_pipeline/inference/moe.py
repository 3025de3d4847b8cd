"""The experts as one mixture-of-experts model of a stock architecture, as Branch-Train-MiX makes it.

Feed-forwards become the experts of each layer. All other tensors are averaged (BTX, arXiv 2403.07816), which
is exact where only feed-forwards were trained. The router of each layer is the ridge regression from the
hidden states of the averaged model onto the cluster of the text (DUME, arXiv 2603.29765): it needs no
training.

Shapes: E experts, N tokens, H hidden size, B sequences, T tokens of one.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

TWINS = {  # architectures with a mixture-of-experts twin in transformers, and that twin
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen3": "qwen3_moe",
    "qwen2": "qwen2_moe",
    "olmo2": "flex_olmo",
}
SAME = (  # keys that a twin shares with its dense model; others keep the twin's default
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *(
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "sliding_window",
    ),
    *("use_sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings", "initializer_range"),
    *("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
)
SHARED = 16  # width of the shared expert of Qwen2-MoE, which is zero here
RIDGE = 1e-2  # of the mean squared hidden state
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)  # that are tried for a router's logits


def twin(config: Any, n_experts: int, n_active: int) -> Any:
    """The configuration of the twin. Raises ValueError for an architecture without one."""
    from transformers import AutoConfig

    kind = config.model_type
    if kind not in TWINS:
        raise ValueError(
            f"--moe: no mixture-of-experts twin of {kind}. Expected one of {', '.join(TWINS)}. "
            "Export without --moe."
        )
    if getattr(config, "mlp_bias", False) or (getattr(config, "attention_bias", False) and kind == "llama"):
        raise ValueError(
            f"--moe: {kind} with biases. Expected none, as Mixtral has none. Export without --moe."
        )
    given = {key: getattr(config, key) for key in SAME if hasattr(config, key)}
    n_active = min(n_active, n_experts)
    given |= {"num_experts_per_tok": n_active, "intermediate_size": config.intermediate_size}
    if kind in ("llama", "mistral"):
        given |= {"num_local_experts": n_experts}
        given.setdefault("sliding_window", None)
    else:
        given |= {"num_experts": n_experts, "norm_topk_prob": True}
    if kind.startswith("qwen"):
        given |= {"moe_intermediate_size": config.intermediate_size, "decoder_sparse_step": 1}
        given |= {"mlp_only_layers": []}
    if kind == "qwen2":
        given |= {"shared_expert_intermediate_size": SHARED, "qkv_bias": True}
    return AutoConfig.for_model(TWINS[kind], **given)


def build(experts: Sequence[Any], n_active: int) -> Any:
    """The twin of these models of one shape, float32. Its routers are zero: the first experts are chosen.

    Raises ValueError for an architecture without a twin.
    """
    from transformers import AutoModelForCausalLM

    config = twin(experts[0].config, len(experts), n_active)
    moe = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    dense = [net.state_dict() for net in experts]
    with torch.no_grad():
        for name, target in moe.state_dict().items():
            layer = name.partition(".mlp.")[0]
            if name.endswith("experts.gate_up_proj"):
                parts = [[d[f"{layer}.mlp.{p}_proj.weight"] for p in ("gate", "up")] for d in dense]
                target.copy_(torch.stack([torch.cat(pair) for pair in parts]))
            elif name.endswith("experts.down_proj"):
                target.copy_(torch.stack([d[f"{layer}.mlp.down_proj.weight"] for d in dense]))
            elif ".mlp." in name:  # routers, and the shared expert of Qwen2-MoE
                target.zero_()
            else:
                target.copy_(torch.stack([d[name] for d in dense]).mean(0))
    return moe


def average(experts: Sequence[Any]) -> Any:
    """A model whose weights are the mean of the experts'."""
    mean = copy.deepcopy(experts[0])
    others = [dict(net.named_parameters()) for net in experts]
    with torch.no_grad():
        for name, target in mean.named_parameters():
            target.copy_(torch.stack([other[name] for other in others]).mean(0))
    return mean


def layers(net: Any) -> list[Any]:
    """The feed-forward blocks, from the first layer to the last."""
    return [layer.mlp for layer in net.model.layers]


def fit_routers(moe: Any, mean: Any, texts: Mapping[int, Sequence[torch.Tensor]]) -> None:
    """Set the routers by ridge regression. `texts`: sequences of token ids (T,) by the expert they belong to.

    The scale of the logits is that with the least cross entropy of the expert, of SCALES times E.
    """
    n_layers, n_experts = len(layers(mean)), len(texts)
    inputs: list[list[torch.Tensor]] = [[] for _ in range(n_layers)]
    hooks = [
        block.register_forward_pre_hook(lambda _, given, to=to: to.append(given[0][0].detach().double()))
        for block, to in zip(layers(mean), inputs, strict=True)
    ]
    owners = []
    with torch.no_grad():
        for expert, sequences in texts.items():
            for ids in sequences:
                mean(input_ids=ids[None], use_cache=False)
                owners.append(torch.full((len(ids),), expert))
        for hook in hooks:
            hook.remove()
        owner_N = torch.cat(owners)
        wanted_NE = torch.nn.functional.one_hot(owner_N, n_experts).double() - 1 / n_experts
        for block, parts in zip(layers(moe), inputs, strict=True):
            x_NH = torch.cat(parts)
            gram_HH = x_NH.T @ x_NH
            gram_HH += RIDGE * gram_HH.diagonal().mean() * torch.eye(len(gram_HH), dtype=torch.double)
            w_HE = torch.linalg.solve(gram_HH, x_NH.T @ wanted_NE)
            logits_NE = x_NH @ w_HE
            loss = {s: float(torch.nn.functional.cross_entropy(s * logits_NE, owner_N)) for s in SCALES}
            block.gate.weight.copy_(min(loss, key=loss.__getitem__) * w_HE.T)


def train_routers(moe: Any, batch_of: Callable[[int], torch.Tensor], n_steps: int, lr: float = 1e-3) -> None:
    """Train the routers alone, on the batches (B, T) that `batch_of(step)` gives."""
    if not n_steps:
        return
    moe.requires_grad_(False)
    gates = [block.gate.weight.requires_grad_(True) for block in layers(moe)]
    optimizer = torch.optim.AdamW(gates, lr=lr, weight_decay=0.0)
    for step in range(n_steps):
        ids_BT = batch_of(step)
        logits = moe(input_ids=ids_BT[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    moe.requires_grad_(True)
