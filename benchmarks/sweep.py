"""How long a sweep of router settings takes, and how many tokens a second the router embeds and places.

    python benchmarks/sweep.py --threads 2

Cost model: --tokens held-out tokens under --experts experts, in documents of up to --length tokens. As in the
default config, 0.3 of them choose the settings and the rest is reported. The grid has 504 settings of the
router `filter` (7 temperatures, 6 epsilons, 4 betas, 3 top_k) and 21 of `paper`. Each is tried on the tokens
that choose. For each of the 42 router x top_k x temperature, the best is evaluated on the reported ones.
A setting costs a token about 15 products, sums and comparisons for each expert, in 8 bytes each, from the
cache. Sets that stay are not tried: they are evaluated one by one, and add their time.

The router reads 4 bytes of each of the --dimensions of a token's vector, adds them up, and multiplies the
sums with every centre.

Targets, on two quiet cores: the sweep in 60 s; 1 M tokens/s for prefixes in 100 dimensions and 16 centres.
Wall-clock time counts. On a busy machine, CPU seconds over --threads say what it would be.
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from cbtm_pipeline import route
from cbtm_pipeline.mixture import sweep
from cbtm_pipeline.mixture.routers import HeldOut

GRID = sweep.Grid(
    routers=("paper", "filter"),
    top_k=(1, 2, 4),
    temperature=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    epsilon=(0.003, 0.01, 0.03, 0.1, 0.2, 0.3),
    beta=(0.25, 0.5, 0.75, 1.0),
)
CALIBRATION, DIMENSIONS, VOCABULARY = 0.3, 100, 32_000


def made(n_tokens: int, n_experts: int, length: int, rng: np.random.Generator) -> HeldOut:
    """Documents with a cluster each: its expert predicts them better, and its centre comes nearer."""
    n_tokens_D = rng.integers(length // 4, length + 1, int(1.6 * n_tokens / length))
    offsets = np.concatenate([[0], np.cumsum(n_tokens_D)])
    cluster_N = np.repeat(rng.integers(0, n_experts, len(n_tokens_D)), n_tokens_D)
    position_N = np.arange(offsets[-1]) - np.repeat(offsets[:-1], n_tokens_D)
    own_NK = cluster_N[:, None] == np.arange(n_experts)
    base_N1 = -rng.gamma(2, 2, (offsets[-1], 1))
    logprob_NK = base_N1 + 0.3 * rng.standard_normal(own_NK.shape) + 0.4 * own_NK - 0.2
    near_N1 = 1 - np.exp(-position_N / 30)[:, None]
    d2_NK = 1.5 - near_N1 * own_NK + 0.1 * rng.standard_normal(own_NK.shape)
    return HeldOut(np.minimum(logprob_NK, 0).astype(np.float32), d2_NK.astype(np.float32), offsets)


def timed(what: str, n: float, unit: str, threads: int, work: Callable[[], object]) -> None:
    """Run `work`, and print its wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"{what:<42} {wall:7.1f} s wall {cpu:7.1f} s CPU {n / wall:12,.0f} {unit}/s"
        f"   (CPU / {threads} threads: {n * threads / cpu:,.0f} {unit}/s, {cpu / threads:.1f} s)"
    )


def route_all(documents: list[np.ndarray], embedding: np.ndarray, centres: np.ndarray, threads: int) -> None:
    """The distances of all prefixes, as rule `route` computes them, but on several threads."""

    def route_some(some: list[np.ndarray]) -> None:
        for _ in route.prefix_distances(some, embedding, centres):
            pass

    groups = [documents[i::threads] for i in range(threads)]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(route_some, groups))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=1_000_000, help="held-out tokens")
    p.add_argument("--experts", type=int, default=16, help="experts, and centres")
    p.add_argument("--length", type=int, default=256, help="tokens of the longest document")
    p.add_argument("--threads", type=int, default=2, help="threads of the sweep and of the routing")
    args = p.parse_args()
    rng = np.random.default_rng(0)
    share = CALIBRATION
    calibration = made(int(share * args.tokens), args.experts, args.length, rng)
    reported = made(int((1 - share) * args.tokens), args.experts, args.length, rng)
    n_settings = len(GRID.temperature) * len(GRID.top_k) * (1 + len(GRID.epsilon) * len(GRID.beta))
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {args.threads} threads")
    print(f"{calibration.offsets[-1]:,} tokens to choose on, {reported.offsets[-1]:,} reported")

    def run() -> object:
        return sweep.sweep(calibration, reported, GRID, args.threads)

    timed(
        f"sweep of {n_settings} settings, {args.experts} experts", n_settings, "settings", args.threads, run
    )

    embedding = rng.standard_normal((VOCABULARY, DIMENSIONS)).astype(np.float32)
    centres = rng.standard_normal((args.experts, DIMENSIONS)) / DIMENSIONS**0.5
    ids = rng.integers(0, VOCABULARY, args.tokens).astype(np.int64)
    documents = np.array_split(ids, max(1, args.tokens // args.length))
    what = f"distances of prefixes, d = {DIMENSIONS}, k = {args.experts}"
    timed(
        what,
        args.tokens,
        "tokens",
        args.threads,
        lambda: route_all(documents, embedding, centres, args.threads),
    )


if __name__ == "__main__":
    main()
