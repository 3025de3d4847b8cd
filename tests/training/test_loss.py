import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import made_training as made
from cbtm_pipeline import plan
from cbtm_pipeline.training import loss, model
from cbtm_pipeline.training import step as train_step

SEQ_LEN = 16
CAPPED = made.LLAMA | {
    "model_type": "gemma2",
    "num_key_value_heads": 1,
    "head_dim": 16,
    "final_logit_softcapping": 2.0,
}


def make(scratch: dict[str, Any]):
    return model.scratch(scratch, made.VOCAB_SIZE, 0, SEQ_LEN, 0)


def random_tokens(n: int = 4, rng_seed: int = 0) -> torch.Tensor:
    return torch.randint(made.VOCAB_SIZE, (n, SEQ_LEN + 1), generator=torch.Generator().manual_seed(rng_seed))


def gradients(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.booleans(), st.integers(2, 30))
def test_chunks_are_the_whole(n, n_rows, with_bias, vocab_size):
    generator = torch.Generator().manual_seed(n)
    hidden, weight, bias = (
        torch.randn(size, generator=generator, requires_grad=True)
        for size in ((n, 5), (vocab_size, 5), vocab_size)
    )
    target = torch.randint(vocab_size, (n,), generator=generator)
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    whole = torch.nn.functional.cross_entropy(
        hidden @ weight.T + (bias if with_bias else 0), target, reduction="sum"
    )
    in_chunks = loss.cross_entropy(hidden, weight, bias if with_bias else None, target, n_rows)
    assert in_chunks.item() == pytest.approx(whole.item(), rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(3 * in_chunks, inputs), torch.autograd.grad(3 * whole, inputs), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_large_logits_stay_finite():
    hidden, weight = torch.tensor([[1000.0, 0.0]], requires_grad=True), torch.eye(2) * 1000
    result = loss.cross_entropy(hidden, weight, None, torch.tensor([1]), 64)
    assert result.item() == 1e6
    assert torch.equal(torch.autograd.grad(result, hidden)[0], torch.tensor([[1000.0, -1000.0]]))


@pytest.mark.parametrize("name", made.MODELS)
def test_loss_and_gradients_of_every_kind_of_model(name):
    net, tokens_BT = make(made.MODELS[name]), random_tokens()
    loss_of = loss.NextToken(net)
    assert loss_of.in_chunks
    total = loss_of(tokens_BT)
    total.backward()
    found = gradients(net)
    logits = net(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum"
    )
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for parameter, gradient in gradients(net).items():
        assert torch.allclose(found[parameter], gradient, rtol=1e-3, atol=1e-4), parameter
    with torch.no_grad():
        assert loss_of(tokens_BT).item() == pytest.approx(total.item(), rel=1e-6)


def test_a_model_that_caps_its_logits_is_not_treated_as_a_plain_one():
    net, tokens_BT = make(CAPPED), random_tokens()
    loss_of = loss.NextToken(net)
    assert not loss_of.in_chunks
    assert loss_of(tokens_BT).item() / tokens_BT[:, 1:].numel() == pytest.approx(
        net(input_ids=tokens_BT, labels=tokens_BT).loss.item(), rel=1e-5
    )


def test_logits_never_exist_whole():
    """With a vocabulary of 50 000, the largest tensor of a step is a chunk's."""
    net = model.scratch(made.LLAMA, 50_000, 0, 512, 0)
    tokens_BT = torch.randint(50_000, (4, 513))
    seen = Seen()
    with seen:
        loss.NextToken(net)(tokens_BT).backward()
    n_parameters = 50_000 * 32
    assert seen.largest < max(loss.CHUNK_LOGITS["cpu"] + 64 * 50_000, n_parameters + 1) * 1.5
    assert seen.largest < 4 * 512 * 50_000 / 10


class Seen(TorchDispatchMode):
    """Records the operations on tensors, and the size of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operations = 0, set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        self.operations.add(func.overloadpacket._qualified_op_name)
        return result


@pytest.mark.parametrize("name", made.MODELS)
def test_the_host_never_waits_for_the_device_in_a_step(name):
    net = make(made.MODELS[name]).train()
    loss_of, bad = loss.NextToken(net), torch.tensor(False)
    optimizer = train_step.make_optimizer(net, plan.train_expert(made.make_config(), "0"))
    seen = Seen()
    for step in range(2):
        with seen:
            total = train_step.accumulate(loss_of, random_tokens(rng_seed=step), 4 * SEQ_LEN, 2, True)
            train_step.update(optimizer, total, 0.1, 1.0, 100.0, bad)
    assert "aten::_fused_adamw_" in seen.operations
    # what reads a number from the device, or makes a tensor of a size that depends on one
    assert not seen.operations & {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::nonzero",
        "aten::equal",
        "aten::masked_select",
    }


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler, which torch.compile needs")
@pytest.mark.filterwarnings("ignore")  # the compiler's, about itself
def test_compiled_layers_and_chunks_give_the_same_loss():
    net, tokens_BT = make(made.MODELS["llama"]), random_tokens()
    loss_of = loss.NextToken(net)
    plain = loss_of(tokens_BT)
    plain.backward()
    expected = gradients(net)
    for layer in model.layers(net):
        layer.compile(dynamic=False)
    loss_of.chunk = torch.compile(loss_of.chunk, dynamic=False)
    compiled = loss_of(tokens_BT)
    compiled.backward()
    assert compiled.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, gradient in gradients(net).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-4), name
