import copy

import pytest
import torch

from cbtm_pipeline.training import step as train_step

HOW = {"weight_decay": 0.1, "lr": 0.1, "betas": [0.9, 0.95]}


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    return net, train_step.make_optimizer(net, HOW)


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
