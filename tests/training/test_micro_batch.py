import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import made_training as made
from cbtm_pipeline.training import loss, micro_batch, model


@given(st.integers(1, 500), st.integers(1, 500))
def test_even_micro_batches(batch_size, largest):
    size = micro_batch.even(batch_size, largest)
    assert 1 <= size <= min(batch_size, largest)
    n, fewest = -(-batch_size // size), -(-batch_size // min(batch_size, largest))
    assert n <= 2 * fewest
    if batch_size % fewest == 0:
        assert (n, batch_size % size) == (fewest, 0)  # as few and as equal as possible


def test_sequence_bytes_are_what_autograd_keeps():
    """In a chain of layers, autograd keeps the input of each product, and the result of each tanh."""
    net = torch.nn.Sequential(torch.nn.Linear(7, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
    assert micro_batch.sequence_bytes(net, torch.zeros(7), False) == 4 * 50  # which is the second input


@pytest.mark.parametrize("bf16", [False, True])
def test_more_sequences_keep_proportionally_more(bf16):
    net = model.scratch(made.LLAMA, made.VOCAB_SIZE, 0, 64, 0).train()
    loss_of = loss.NextToken(net)
    sequence_T = torch.arange(65)
    each = micro_batch.sequence_bytes(loss_of, sequence_T, bf16)
    one, five = (micro_batch.kept_bytes(loss_of, sequence_T.repeat(n, 1), bf16) for n in (1, 5))
    assert each > 64 * 32 * 4 * 2 * 4  # some tensors for each layer and token
    assert five - one == pytest.approx(4 * each, rel=0.05)
    net.activation_checkpointing_enable({"use_reentrant": False})
    assert micro_batch.sequence_bytes(loss_of, sequence_T, bf16) < 0.3 * each


def test_the_choice():
    n, vocab_size = 1_300_000_000, 50_000
    fixed = 18 * n + 6 * (1 << 28)
    assert micro_batch.choose(64, n, vocab_size, 4 * 10**9, 4 * 10**8, 80e9) == (8, False)
    room = (micro_batch.USABLE * 80e9 - fixed) / 4e9
    assert 8 <= room < 11  # ten fit, eight make equal micro-batches
    assert micro_batch.choose(6, n, vocab_size, 4 * 10**9, 4 * 10**8, 80e9) == (6, False)
    assert micro_batch.choose(64, n, vocab_size, 10**11, 10**10, 80e9) == (4, True)
    assert micro_batch.choose(64, 4 * n, vocab_size, 4 * 10**9, 4 * 10**8, 80e9, n_shards=4) == (8, False)
    with pytest.raises(ValueError, match=r"model: 5,200,000,000 parameters need 9\d GB .*run\.sharded"):
        micro_batch.choose(64, 4 * n, vocab_size, 4 * 10**9, 4 * 10**8, 80e9)
