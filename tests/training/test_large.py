"""The large dense model: its size, and that it spends the FLOPs that the plan says."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import made_training as made
from cbtm_pipeline import plan
from cbtm_pipeline.training import large, model

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4}


@given(st.integers(1, 10**6), st.floats(1, 1e12), st.floats(1, 5))
def test_steps_cost_the_same_flops_to_half_a_step(n_steps: int, small: float, ratio: float) -> None:
    n = large.equal_steps(n_steps, small, ratio * small)
    assert n == 1 or abs(n * ratio * small - n_steps * small) <= 0.5 * ratio * small * (1 + 1e-6)


@pytest.mark.parametrize("scratch", [made.LLAMA, {**made.LLAMA, "num_key_value_heads": 1}, GPT2])
def test_it_has_twice_the_layers_and_twice_the_parameters_of_layers(scratch: dict[str, Any]) -> None:
    cfg = made.make_config(scratch=scratch, controls=["dense-large"])
    planned = plan.train_expert(cfg, "dense-large")
    assert isinstance(planned, plan.LargePlan)
    net, n_steps = large.scratch(planned, 300, 0)
    small = model.scratch(scratch, 300, 0, planned.seq_len, 0)

    def in_layers(net: Any) -> int:
        return sum(parameter.numel() for parameter in model.layers(net).parameters())

    assert in_layers(net) == 2 * in_layers(small)
    assert net.config.hidden_size == small.config.hidden_size
    assert next(net.parameters()).device.type == "cpu"
    seed, experts = plan.train_expert(cfg, "seed"), cfg.train.steps * cfg.train.batch_size
    spent = model.flops_per_token(small, planned.seq_len) * (seed.n_steps * seed.batch_size + experts)
    step = model.flops_per_token(net, planned.seq_len) * planned.batch_size
    assert abs(n_steps * step - spent) <= step
