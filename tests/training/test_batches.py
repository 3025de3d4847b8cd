from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.training.batches import Stream, batch, permute


def stream(*lengths: int) -> Stream:
    starts = np.cumsum([0, *lengths])
    return Stream([np.arange(a, b, dtype=np.uint16) for a, b in pairwise(starts)])


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    start=st.integers(0, 100),
    n=st.integers(1, 50),
)
@settings(max_examples=100, deadline=None)
def test_read_is_a_slice_of_the_endless_circle(lengths, start, n):
    s = stream(*lengths)
    assert s.read(start, n).tolist() == [(start + i) % s.n_tokens for i in range(n)]


def test_tokens_keep_their_value_beyond_the_signed_range():
    assert Stream([np.array([65535], np.uint16), np.array([4_000_000_000], np.uint32)]).read(
        0, 3
    ).tolist() == [65535, 4_000_000_000, 65535]


def test_no_tokens_is_a_clear_error():
    with pytest.raises(ValueError, match=r"no tokens.*Lower cluster\.k"):
        Stream([np.empty(0, np.uint16), np.empty(0, np.uint16)])


@given(n=st.integers(1, 300), rng_seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_permute_is_a_bijection(n, rng_seed, epoch):
    assert sorted(permute(np.arange(n), n, rng_seed, np.full(n, epoch))) == list(range(n))


def test_permute_of_many_blocks_needs_no_table():
    n = 10**12
    places = np.array([0, 1, n - 1])
    blocks = permute(places, n, 0, np.zeros(3, int))
    assert len(set(blocks.tolist())) == 3
    assert ((blocks >= 0) & (blocks < n)).all()


def test_every_block_is_equally_likely_at_every_place():
    n, n_epochs = 6, 6000
    epochs = np.arange(n_epochs)
    counts = np.stack(
        [np.bincount(permute(np.full(n_epochs, i), n, 7, epochs), minlength=n) for i in range(n)]
    )
    chi2 = ((counts - n_epochs / n) ** 2 / (n_epochs / n)).sum()
    assert chi2 < 60  # 25 degrees of freedom: above 60 in one of 10 000 cases


def test_orders_of_epochs_and_seeds_are_unrelated():
    n = 4096
    orders = [
        permute(np.arange(n), n, s, np.full(n, e)) for s, e in ((0, 0), (0, 1), (1, 0), (2, 0), (-1, 0))
    ]
    correlation = np.corrcoef(np.stack([np.arange(n), *orders]))
    assert np.abs(correlation - np.eye(6)).max() < 5 / n**0.5


@given(
    n_tokens=st.integers(1, 200),
    seq_len=st.integers(1, 20),
    batch_size=st.integers(1, 7),
    rng_seed=st.integers(0, 3),
    n_epochs=st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_every_block_exactly_once_per_epoch(n_tokens, seq_len, batch_size, rng_seed, n_epochs):
    s = stream(n_tokens // 2, n_tokens - n_tokens // 2)
    n_blocks = s.n_blocks(seq_len)
    n_steps = -(-n_epochs * n_blocks // batch_size)
    rows = np.concatenate([batch(s, rng_seed, step, batch_size, seq_len) for step in range(n_steps)])
    for epoch in range(n_epochs):
        seen = rows[epoch * n_blocks : (epoch + 1) * n_blocks]
        assert sorted(seen[:, 0].tolist()) == [i * seq_len for i in range(n_blocks)]
        assert set(seen[:, 1:].ravel().tolist()) == set(range(n_tokens))  # every token is a target


def test_targets_are_inputs_shifted_and_blocks_overlap_by_one():
    rows = batch(stream(40), 0, 0, 4, 10)
    assert rows.shape == (4, 11)
    assert rows.dtype == np.int64
    assert sorted(rows.tolist()) == [[(10 * b + i) % 40 for i in range(11)] for b in range(4)]


def test_batch_is_a_pure_function_of_seed_and_step():
    later = batch(stream(500), 3, 17, 4, 8)
    s = stream(100, 400)  # the same tokens in other segments, and other steps asked for before
    for step in (5, 0, 16):
        batch(s, 3, step, 4, 8)
    assert (batch(s, 3, 17, 4, 8) == later).all()
    assert (batch(s, 3, 18, 4, 8) != later).any()
    assert (batch(s, 4, 17, 4, 8) != later).any()


def test_the_order_does_not_depend_on_the_batch_size():
    s = stream(333)
    small = np.concatenate([batch(s, 0, step, 2, 8) for step in range(30)])
    large = np.concatenate([batch(s, 0, step, 5, 8) for step in range(12)])
    assert (small == large).all()


def test_a_stream_shorter_than_a_block_wraps():
    rows = batch(stream(3), 0, 5, 2, 8)
    assert rows.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2]] * 2
