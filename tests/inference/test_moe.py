"""The experts as one mixture-of-experts model of a stock architecture."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cbtm_pipeline.inference import moe

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 64, "initializer_range": 0.2},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None},
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
    "mistral": {"sliding_window": 7, "head_dim": 16},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen2": {},
    "olmo2": {},
}
TEXT = torch.randint(1, 99, (2, 20), generator=torch.Generator().manual_seed(0))


def dense(kind: str, rng_seed: int = 0) -> Any:
    torch.manual_seed(rng_seed)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **OWN.get(kind, {})}))
    with torch.no_grad():
        for p in net.parameters():  # norms and biases, too, differ from their defaults
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


@pytest.mark.parametrize("kind", moe.TWINS)
def test_identical_experts_are_the_dense_model(kind: str, tmp_path: Path):
    net = dense(kind)
    made = moe.build([net, copy.deepcopy(net), copy.deepcopy(net)], n_active=2)
    torch.manual_seed(1)
    with torch.no_grad():
        for block in moe.layers(made):  # any router will do
            block.gate.weight.normal_()
        made.save_pretrained(tmp_path)
        found: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        loaded, info = found
        assert not info["missing_keys"] and not info["unexpected_keys"]
        torch.testing.assert_close(loaded.eval()(TEXT).logits, net(TEXT).logits, atol=1e-4, rtol=1e-4)
    assert loaded.generate(TEXT, max_new_tokens=4, do_sample=False).shape == (2, 24)


@pytest.mark.parametrize("kind", moe.TWINS)
def test_a_router_that_is_sure_runs_its_own_expert(kind: str):
    one, other = dense(kind), dense(kind)
    with torch.no_grad():
        for block in moe.layers(other):
            for p in block.parameters():
                p.normal_(std=0.2)
        made = moe.build([one, other], n_active=1)
        torch.testing.assert_close(made(TEXT).logits, one(TEXT).logits, atol=1e-4, rtol=1e-4)
        made = moe.build([other, one], n_active=1)
        torch.testing.assert_close(made(TEXT).logits, other(TEXT).logits, atol=1e-4, rtol=1e-4)


def test_routers_learn_which_text_is_whose_without_training():
    experts = [dense("llama"), dense("llama")]
    halves = [torch.arange(1, 13), torch.arange(13, 25)]
    draw = torch.Generator().manual_seed(2)
    texts = {
        j: [half[torch.randint(12, (40,), generator=draw)] for _ in range(5)] for j, half in enumerate(halves)
    }
    made = moe.build(experts, n_active=1)
    moe.fit_routers(made, moe.average(experts), texts)
    found: list[torch.Tensor] = []
    moe.layers(made)[0].register_forward_pre_hook(lambda _, given: found.append(given[0][0]))
    gate = moe.layers(made)[0].gate.weight
    for j, half in enumerate(halves):
        made(half[torch.randint(12, (1, 40), generator=draw)])
        assert ((found[-1] @ gate.T).argmax(1) == j).float().mean() > 0.8


def test_training_changes_routers_alone():
    experts = [dense("llama", 0), dense("llama", 1)]
    made = moe.build(experts, n_active=2)
    before = copy.deepcopy(made.state_dict())
    moe.train_routers(made, lambda step: TEXT, 3)
    changed = {name for name, tensor in made.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}


@pytest.mark.parametrize("kind", ["opt", "gpt2", "gpt_neox"])
def test_an_architecture_without_a_twin_is_refused_in_one_line(kind: str):
    with pytest.raises(
        ValueError, match=rf"^--moe: no mixture-of-experts twin of {kind}. Expected one of llama, "
    ):
        moe.twin(AutoConfig.for_model(kind), 2, 2)
