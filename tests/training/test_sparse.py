"""Mixture-of-experts seeds: their router's loss, and the FLOPs of the experts that read a token."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from cbtm_pipeline.training import loss, model, sparse

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
# the keys of each model type that are not in SIZES: 8 experts, 2 of them active
TYPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 16},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "flex_olmo": {"num_experts": 8, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 8, "num_experts_per_tok": 2, "kv_channels": 16},
}


def seed(model_type: str, **keys: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **TYPES[model_type], **keys})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_seed_asks_for_the_loss_of_its_router(model_type: str) -> None:
    net = seed(model_type, output_router_logits=True).train()
    for part in net.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    ids_BT = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([torch.full((2, 1), -100), ids_BT[:, 1:]], 1)
    torch.manual_seed(2)  # some routers draw numbers while they train
    theirs = net(input_ids=ids_BT[:, :-1], use_cache=False)
    plain = torch.nn.functional.cross_entropy(theirs.logits.flatten(0, 1), ids_BT[:, 1:].flatten())
    weight = sparse.router_loss_weight(net, "model")
    ours = loss.NextToken(net).train()
    assert weight > 0 and theirs.aux_loss > 0
    torch.manual_seed(2)
    torch.testing.assert_close(ours(ids_BT) / 32, plain + weight * theirs.aux_loss)
    text_alone = plain_of(net.eval()(input_ids=ids_BT, use_cache=False).logits, ids_BT)
    torch.testing.assert_close(ours.eval()(ids_BT) / 32, text_alone)  # that of a validation
    # the whole is the loss that transformers computes, where it computes it for the same positions
    net.eval()
    own = net(input_ids=ids_BT, labels=labels, use_cache=False)
    parts = net(input_ids=ids_BT, use_cache=False)
    torch.testing.assert_close(own.loss, plain_of(parts.logits, ids_BT) + weight * parts.aux_loss)


def plain_of(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def test_a_seed_whose_router_has_a_loss_that_it_does_not_ask_for() -> None:
    assert loss.NextToken(seed("mixtral")).router_weight == 0


def test_a_seed_with_another_loss_of_its_own_is_one_line() -> None:
    net = seed("mixtral", output_router_logits=True)
    net.router_aux_loss_coef = 7.0  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match="has a part that is not known. Expected .* Set output_router_logits"
    ):
        model.check(net, "model.pretrained: x", 64, 32)


# without jetmoe, whose attention is sparse, too, and costs more than the formula of dense attention says
@pytest.mark.parametrize("model_type", [name for name in TYPES if name != "jetmoe"])
def test_flops_count_the_experts_that_read_a_token(model_type: str) -> None:
    """Those of a forward pass are a third; torch counts the multiplications that are really done."""
    n_tokens, net = 64, seed(model_type).eval()
    net.set_attn_implementation("eager")  # torch does not count those of its own attention on a CPU
    net.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net(input_ids=torch.arange(n_tokens)[None] % 64, use_cache=False)
    attention = 4 * 2 * 32 * n_tokens  # of the formula: 12 L d T / 3
    ours = model.flops_per_token(net, n_tokens) / 3
    assert ours - attention == pytest.approx(counter.get_total_flops() / n_tokens - attention, rel=0.1)
