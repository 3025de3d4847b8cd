"""The training stream, and `batch`, a pure function of the step.

So a training that was stopped reads the next batch without reading the earlier ones.

A stream is the concatenation of an expert's memory-mapped tokens, read as a circle. Block b has the seq_len
inputs from token b * seq_len on, and the token after them. So every token is predicted once per epoch. Each
epoch has its own keyed permutation of the blocks. Batches take blocks from the endless sequence epoch 0,
epoch 1, ...; a batch may cross from one epoch into the next. Nothing here depends on the expert: equal data
gives equal batches.

Shapes: B sequences, T tokens (seq_len).
"""

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6  # of the Feistel network; 4 already pass as a pseudo-random permutation (Luby and Rackoff 1988)


class Stream:
    """Segments of token ids (uint16 or uint32, memory-mapped or not), concatenated and read as a circle.

    Raises ValueError if there is no token.
    """

    def __init__(self, segments: Sequence[np.ndarray]):
        self.segments = [s for s in segments if len(s)]
        self.starts = np.cumsum([0, *(len(s) for s in self.segments)])
        if not self.segments:
            raise ValueError(
                "training data: no tokens. Expected at least one document. Lower cluster.k or give more text."
            )

    @property
    def n_tokens(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, n: int) -> np.ndarray:
        """The n tokens from position `start` on, around the circle (int64)."""
        out = np.empty(n, np.int64)
        n_read, position = 0, start % self.n_tokens
        while n_read < n:
            i = int(np.searchsorted(self.starts, position, "right")) - 1
            piece = self.segments[i][position - self.starts[i] :][: n - n_read]
            out[n_read : n_read + len(piece)] = piece
            n_read += len(piece)
            position = (position + len(piece)) % self.n_tokens
        return out

    def n_blocks(self, seq_len: int) -> int:
        """The number of blocks in an epoch. Its last block is completed from the start of the circle."""
        return -(-self.n_tokens // seq_len)


ALL = slice(None)


def batch(
    stream: Stream, rng_seed: int, step: int, batch_size: int, seq_len: int, part: slice = ALL
) -> np.ndarray:
    """The tokens of step 0, 1, ... (int64, (B, T + 1)).

    Inputs are all columns but the last, targets all but the first. `part` selects rows of the batch.
    """
    n_blocks = stream.n_blocks(seq_len)
    epoch_B, place_B = np.divmod(step * batch_size + np.arange(batch_size), n_blocks)
    blocks_B = permute(place_B, n_blocks, rng_seed, epoch_B)
    return np.stack([stream.read(block * seq_len, seq_len + 1) for block in blocks_B[part].tolist()])


def permute(place_B: np.ndarray, n: int, rng_seed: int, epoch_B: np.ndarray) -> np.ndarray:
    """The block at each place (0 ... n - 1) of each epoch's order of n blocks (int64, (B,)).

    For each key this is a bijection, in constant memory. A Feistel network permutes 2 ** (2 * half) >= n
    numbers; a result outside 0 ... n - 1 is permuted again until it is inside. NumPy's own permutation would
    need memory for all blocks, and may change from one release to the next.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key_B = _mix(_mix(np.array([rng_seed % 2**64], np.uint64)) + epoch_B.astype(np.uint64))
    out_B = place_B.astype(np.uint64)
    outside = np.arange(len(out_B))
    while len(outside):
        left, right = out_B[outside] >> half, out_B[outside] & mask
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mix(_mix(key_B[outside] + np.uint64(i)) ^ right) & mask)
        out_B[outside] = left << half | right
        outside = outside[out_B[outside] >= n]
    return out_B.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The output of SplitMix64 (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
