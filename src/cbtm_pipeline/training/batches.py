"""The training stream, and batch(step): a pure function, so that a training goes on after any stop without reading what it has read.

A stream is the concatenation of an expert's memory-mapped tokens, read as a circle. It is cut into blocks of seq_len inputs and the
token after them (block b starts at token b * seq_len), so that every token is predicted once per epoch. Each epoch has a keyed permutation
of the blocks; a batch takes the next blocks of the endless sequence epoch 0, epoch 1, ... and may cross from one epoch into the next.
Nothing here depends on the expert: equal data gives equal batches.

Shapes: B sequences, T tokens (seq_len).
"""

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6  # of the Feistel network; 4 already pass as a pseudo-random permutation (Luby and Rackoff 1988)


class Stream:
    """Segments of token ids (uint16 or uint32, memory-mapped or not), one after the other and then from the start again."""

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
        """n tokens from position `start` on, around the circle (int64)."""
        out = np.empty(n, np.int64)
        done, at = 0, start % self.n_tokens
        while done < n:
            i = int(np.searchsorted(self.starts, at, "right")) - 1
            piece = self.segments[i][at - self.starts[i] :][: n - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            at = (at + len(piece)) % self.n_tokens
        return out

    def n_blocks(self, seq_len: int) -> int:
        """Blocks in an epoch. The last one is filled up from the start of the circle."""
        return -(-self.n_tokens // seq_len)


ALL = slice(None)


def batch(
    stream: Stream, rng_seed: int, step: int, batch_size: int, seq_len: int, part: slice = ALL
) -> np.ndarray:
    """Tokens of step 0, 1, ... (int64, (B, T + 1)): inputs are all but the last column, targets all but the first. `part`: of its rows."""
    n_blocks = stream.n_blocks(seq_len)
    epoch_B, place_B = np.divmod(step * batch_size + np.arange(batch_size), n_blocks)
    blocks_B = permute(place_B, n_blocks, rng_seed, epoch_B)
    return np.stack([stream.read(block * seq_len, seq_len + 1) for block in blocks_B[part].tolist()])


def permute(place_B: np.ndarray, n: int, rng_seed: int, epoch_B: np.ndarray) -> np.ndarray:
    """Which of n blocks stands at each place (0 ... n - 1) of each epoch's order: a keyed bijection, in constant memory (int64, (B,)).

    A Feistel network permutes 2 ** (2 * half) >= n numbers; what falls outside 0 ... n - 1 is permuted again until it falls inside.
    NumPy's own permutation would need memory for all blocks, and may change from one release to the next.
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
    """The output function of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
