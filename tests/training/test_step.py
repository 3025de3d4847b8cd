"""One step: the learning rate, the gradient of a batch, and the optimiser."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch

import made_training as made
from cbtm_pipeline import plan
from cbtm_pipeline.training import loss, model
from cbtm_pipeline.training import step as train_step

PLAN = plan.train_expert(made.make_config(lr=0.1), "0")


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    return net, train_step.make_optimizer(net, PLAN)


def backward(net: torch.nn.Module, step: int, scale: float = 1.0) -> torch.Tensor:
    result = scale * net(torch.randn(5, 4, generator=torch.Generator().manual_seed(step))).square().sum()
    result.backward()
    return result.detach()


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_clipped_steps_are_those_of_the_library(clip_norm):
    (net, optimizer), (other, reference), bad = make(), make(), torch.tensor(False)
    for step in range(5):
        norm = train_step.update(optimizer, backward(net, step), 0.1 / (step + 1), clip_norm, 1e9, bad)
        backward(other, step)
        expected = torch.nn.utils.clip_grad_norm_(other.parameters(), clip_norm)
        for group in reference.param_groups:
            group["lr"] = 0.1 / (step + 1)
        reference.step()
        reference.zero_grad()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
            assert a.grad is None
    assert not bad


@pytest.mark.parametrize(
    ("scale", "limit"), [(float("nan"), 1e9), (float("inf"), 1e9), (1e30, float("inf")), (1.0, 0.001)]
)
def test_a_bad_step_changes_nothing_and_no_later_one_does(scale, limit):
    net, optimizer = make()
    bad = torch.tensor(False)
    train_step.update(optimizer, backward(net, 0), 0.1, 1.0, 1e9, bad)
    before = copy.deepcopy([net.state_dict(), optimizer.state_dict()["state"]])
    train_step.update(optimizer, backward(net, 1, scale), 0.1, 1.0, limit, bad)
    assert bad
    train_step.update(optimizer, backward(net, 2), 0.1, 1.0, 1e9, bad)
    assert bad
    for a, b in zip(before[0].values(), net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, before[1][index][name]), name


def test_learning_rate():
    def rates(n_steps: int, **keys: Any) -> list[float]:
        keys = {"lr": 1.0, "schedule": "linear", "final_lr_ratio": 0.1, "warmup_ratio": 0.0} | keys
        how = dataclasses.replace(PLAN, n_steps=n_steps, **keys)
        return [train_step.learning_rate(step, how) for step in range(n_steps)]

    assert rates(3) == pytest.approx([0.7, 0.4, 0.1])
    assert rates(1) == pytest.approx([0.1])
    assert rates(5, warmup_ratio=0.4, final_lr_ratio=0.0) == pytest.approx([0.5, 1.0, 2 / 3, 1 / 3, 0.0])
    assert rates(2, schedule="cosine", final_lr_ratio=0.0) == pytest.approx([0.5, 0.0])
    assert rates(3, schedule="cosine") == pytest.approx(
        [0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2 for x in (1 / 3, 2 / 3, 1)]
    )
    assert rates(4, warmup_ratio=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_accumulated_gradient_is_that_of_the_whole_batch():
    net = model.scratch(made.LLAMA, made.VOCAB_SIZE, 0, made.SEQ_LEN, 0)
    tokens_BT = torch.randint(
        made.VOCAB_SIZE, (16, made.SEQ_LEN + 1), generator=torch.Generator().manual_seed(0)
    )

    def gradient(micro_batch_size: int) -> tuple[float, torch.Tensor]:
        net.zero_grad()
        total = train_step.accumulate(
            loss.NextToken(net), tokens_BT, 16 * made.SEQ_LEN, micro_batch_size, False
        )
        return total.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    mean, whole = gradient(16)
    assert mean == pytest.approx(net(input_ids=tokens_BT, labels=tokens_BT).loss.item(), abs=1e-5)
    for micro_batch_size in (8, 5):
        other_loss, other = gradient(micro_batch_size)
        assert other_loss == pytest.approx(mean, abs=1e-5)
        assert torch.allclose(other, whole, rtol=1e-4, atol=1e-7)


def test_weight_decay_is_for_matrices_only():
    net = model.scratch({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}, 300, 0, 32, 0)
    decayed, free = train_step.make_optimizer(net, PLAN).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(net.parameters()))
