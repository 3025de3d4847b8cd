"""Draw tokens. R rows, V tokens of the vocabulary."""

import hashlib
import secrets
from collections.abc import Sequence

import torch

LEAST = -9999.0  # what OpenAI's API writes for the logarithm of zero, which JSON does not have


def generators(seed: int | None, first: int, n: int) -> list[torch.Generator]:
    """One generator for each of the answers `first` to `first + n - 1` of a request.

    So an answer depends on its seed and number alone, not on how many others are drawn beside it.
    """
    seed = secrets.randbits(63) if seed is None else seed
    digests = [hashlib.blake2b(f"{seed} {first + i}".encode(), digest_size=8).digest() for i in range(n)]
    return [torch.Generator().manual_seed(int.from_bytes(digest) >> 1) for digest in digests]


def draw(
    logprob_RV: torch.Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]
) -> list[int]:
    """A token for each row; with temperature 0 the most probable one.

    `top_p`: draw from the smallest set of most probable tokens that has this share (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logprob_RV.argmax(1).tolist()
    p_RV, order_RV = (logprob_RV.double().cpu() / temperature).softmax(1), None
    if top_p < 1:
        p_RV, order_RV = p_RV.sort(dim=1, descending=True, stable=True)
        p_RV = p_RV.masked_fill(p_RV.cumsum(1) - p_RV >= top_p, 0)
    sum_RV = p_RV.cumsum(1)
    u_R1 = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    found_R1 = torch.searchsorted(sum_RV, u_R1 * sum_RV[:, -1:], right=True)
    last_R1 = (sum_RV < sum_RV[:, -1:]).sum(1, keepdim=True)  # the last that can be drawn, against rounding
    found_R1 = torch.minimum(found_R1, last_R1)
    return (found_R1 if order_RV is None else order_RV.gather(1, found_R1)).flatten().tolist()


def most_probable(logprob_V: torch.Tensor, n: int) -> list[tuple[int, float]]:
    """The `n` most probable tokens and their log-probabilities."""
    top = logprob_V.topk(min(n, len(logprob_V)))
    return [
        (i, max(value, LEAST)) for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
