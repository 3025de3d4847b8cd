"""Balanced k-means: ours, the published C-BTM algorithm, exact min-cost flow and faiss, on the same vectors.

    pip install -e '.[bench]'
    python benchmarks/kmeans.py                      # the comparison, then growth with N and k
    python benchmarks/kmeans.py --vectors x.npy --sizes 8000x16
    git clone https://github.com/kernelmachine/balanced-kmeans
    python benchmarks/kmeans.py --published-source balanced-kmeans

* published: the algorithm of github.com/kernelmachine/balanced-kmeans, written again here. It runs 20 Lloyd
  iterations from random documents. Each assignment has equal sizes and comes from an auction in which
  clusters bid for documents. The distances here are a product of matrices, which saves an array of N k D
  numbers. Afterwards, each document of the corpus goes to the nearest centre.
* published, own code: the published code itself, from a checkout given as --published-source.
* exact: k-means-constrained, min-cost flow, with as many restarts as ours (4; `ours once` has one, like
  `published`).
* faiss: not balanced; a lower bound for the time.

The vectors have unit length. They come from 200 topics of sizes 1, 1/2, 1/3 ..., with a spectrum that falls
like that of tf-idf + SVD. Each row of the table is a process of its own. `fresh` is the largest load over
the mean for as many other documents of the same kind, assigned as rule assign does it: ours corrects its
prices on them, and for the other methods they go to the nearest centre.

Cost model: one pass over the vectors is 2 N k D operations in float32 and reads 4 N D bytes. Ours holds the
vectors twice, and at most 2^23 distances.
"""

import argparse
import importlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np

N_INIT = 4
OWN_CODE = "published, own code"
SIZES = ("8000x16", "40000x64")
GROWTH = ("62500x128", "250000x128", "1000000x128", "250000x32", "250000x512")
D = 100


def mixture(n: int, rng_seed: int) -> np.ndarray:
    """n vectors of length one; the topics are always the same, the seed draws the documents."""
    spectrum = (np.arange(1, D + 1) ** -0.4).astype(np.float32)
    topics = np.random.default_rng(0).standard_normal((200, D), dtype=np.float32) * spectrum
    topics /= np.linalg.norm(topics, axis=1, keepdims=True)
    share = 1 / np.arange(1, len(topics) + 1)
    rng = np.random.default_rng([1, rng_seed])
    x = np.empty((n, D), np.float32)
    for start in range(0, n, 1 << 16):
        m = min(1 << 16, n - start)
        noise = rng.standard_normal((m, D), dtype=np.float32) * spectrum
        noise *= (0.6 * rng.lognormal(0, 0.3, m).astype(np.float32) / np.linalg.norm(spectrum))[:, None]
        rows = topics[rng.choice(len(topics), m, p=share / share.sum())] + noise
        x[start : start + m] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return x


def auction(score_NK: np.ndarray, eps: float) -> np.ndarray:
    """Labels of clusters of equal size (N,).

    Each cluster bids for the N / k documents that are worth most to it. A bid is the gain over the next best
    document, plus eps. The highest bid wins and is added to the document's price. The auction ends when every
    document has a bid.
    """
    import torch

    worth_KN = torch.from_numpy(np.ascontiguousarray(score_NK.T))
    k, n = worth_KN.shape
    price_N, value_KN, won = torch.zeros(n), worth_KN.clone(), None
    for n_rounds in range(1_000_000):
        top, which = value_KN.topk(n // k + 1, dim=1)
        bids_KN = torch.zeros(k, n).scatter_(1, which[:, :-1], top[:, :-1] - top[:, -1:] + eps)
        if won is not None and n_rounds < 100:
            bids_KN.view(-1)[won] = eps  # the winner keeps the document unless another cluster bids more
        if n_rounds > 1000:
            bids_KN[:, (bids_KN == 0).all(dim=0)] = eps
        highest_N, bidder_N = bids_KN.max(dim=0)
        bid_for = (highest_N > 0).nonzero()[:, 0]
        if len(bid_for) == n:
            return bidder_N.numpy()
        price_N[bid_for] += highest_N[bid_for]
        value_KN = worth_KN - price_N
        won = bidder_N[bid_for] * n + bid_for
        value_KN.view(-1)[won] = worth_KN.view(-1)[won]
    raise AssertionError("the auction does not end")


def published(x_ND: np.ndarray, k: int, rng_seed: int) -> tuple[float, float, np.ndarray]:
    """Inertia and largest load of the last assignment of the published algorithm, and the centres."""
    n = len(x_ND) // k * k  # the algorithm needs a multiple of k
    x_ND = x_ND[:n]
    centres_KD = x_ND[np.random.default_rng(rng_seed).choice(n, k, replace=False)].copy()
    labels_N = np.zeros(n, int)
    for _ in range(20):
        d2_NK = squared(x_ND, centres_KD)
        labels_N = auction(-d2_NK, max(float(d2_NK.max() - d2_NK.min()) / 50, 1e-4))
        before = centres_KD.copy()
        for j in range(k):
            centres_KD[j] = x_ND[labels_N == j].mean(axis=0)
        if np.sqrt(np.square(centres_KD - before).sum(axis=1)).sum() ** 2 < 1e-3:
            break
    return *quality(x_ND, centres_KD, labels_N), centres_KD


def authors(module: Any, x_ND: np.ndarray, k: int, rng_seed: int) -> tuple[float, float, np.ndarray]:
    """Inertia, largest load and centres from the authors' module."""
    import torch

    x_ND = x_ND[: len(x_ND) // k * k]
    np.random.seed(rng_seed)  # noqa: NPY002, the module draws from this generator
    found = module.KMeans(n_clusters=k, device=torch.device("cpu"), balanced=True)
    labels_N = found.fit(torch.from_numpy(x_ND), tqdm_flag=False, iter_limit=20).numpy()
    centres_KD = found.cluster_centers.numpy()
    return *quality(x_ND, centres_KD, labels_N), centres_KD


def authors_module(source: Path) -> Any:
    """The authors' package from a checkout.

    Its soft DTW needs numba and CUDA. No Euclidean distance uses it, so an empty module replaces it.
    """
    sys.modules["kmeans_pytorch.soft_dtw_cuda"] = cast(ModuleType, SimpleNamespace(SoftDTW=None))
    sys.path.insert(0, str(source))
    return importlib.import_module("kmeans_pytorch")


def quality(x_ND: np.ndarray, centres_KD: np.ndarray, labels_N: np.ndarray) -> tuple[float, float]:
    """Inertia, and largest load over the mean."""
    inertia = float(np.square(x_ND - centres_KD[labels_N]).sum(axis=1).mean())
    return inertia, float(np.bincount(labels_N).max() * len(centres_KD) / len(x_ND))


def squared(x_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """Squared distances, float32."""
    return np.square(x_ND).sum(axis=1)[:, None] - 2 * x_ND @ centres_KD.T + np.square(centres_KD).sum(axis=1)


class Result(NamedTuple):
    """A method's result: inertia, largest load over the mean, centres (K, D) and prices (K,)."""

    inertia: float
    load: float
    centres_KD: np.ndarray
    prices_K: np.ndarray


def ours(kmeans: Any, x_ND: np.ndarray, k: int, n_init: int) -> Result:
    """Balanced k-means of this pipeline."""
    found = kmeans.fit(x_ND, k, rng_seed=0, n_init=n_init, max_iterations=50)
    return Result(found.inertia, found.balance, found.centres_KD, found.prices_K)


def exact(module: Any, x_ND: np.ndarray, k: int) -> Result:
    """k-means-constrained."""
    n = len(x_ND)
    found = module.KMeansConstrained(
        k, size_min=n // k, size_max=-(-n // k), n_init=N_INIT, max_iter=50, random_state=0
    ).fit(x_ND)
    centres_KD = np.array(found.cluster_centers_)
    return Result(*quality(x_ND, centres_KD, np.array(found.labels_)), centres_KD, np.zeros(k))


def faiss(module: Any, x_ND: np.ndarray, k: int) -> Result:
    """k-means of faiss, which is not balanced."""
    n = len(x_ND)
    found = module.Kmeans(D, k, niter=20, nredo=N_INIT, seed=0, max_points_per_centroid=n)
    found.train(x_ND)
    centres_KD = np.array(found.centroids, np.float32)
    d2_NK = squared(x_ND, centres_KD)
    load = float(np.bincount(d2_NK.argmin(axis=1)).max() * k / n)
    return Result(float(d2_NK.min(axis=1).mean()), load, centres_KD, np.zeros(k))


def method(who: str, source: Path | None) -> Callable[[np.ndarray, int], Result]:
    """The function (x_ND, k) -> Result of a method.

    Imports its libraries, which takes no part of the measured time.
    A process imports only what its own method needs, so that its peak of memory is that of the method.
    """
    if who.startswith("ours"):
        module = importlib.import_module("cbtm_pipeline.clustering.kmeans")
        return lambda x_ND, k: ours(module, x_ND, k, 1 if who == "ours once" else N_INIT)
    if who == "published":
        importlib.import_module("torch")
        return lambda x_ND, k: Result(*published(x_ND, k, 0), np.zeros(k))
    if who == OWN_CODE and source:
        module = authors_module(source)
        return lambda x_ND, k: Result(*authors(module, x_ND, k, 0), np.zeros(k))
    if who == "exact":
        module = importlib.import_module("k_means_constrained")
        return lambda x_ND, k: exact(module, x_ND, k)
    module = importlib.import_module("faiss")
    return lambda x_ND, k: faiss(module, x_ND, k)


def measure(who: str, x_ND: np.ndarray, fresh_ND: np.ndarray, k: int, source: Path | None) -> str:
    """Fit, and return the row of the table. `source` is the checkout with the authors' code."""
    fit = method(who, source)
    began = time.perf_counter()
    found = fit(x_ND, k)
    seconds = time.perf_counter() - began
    chunks, prices_K = list(np.array_split(fresh_ND, 64)), found.prices_K
    if who.startswith("ours"):
        from cbtm_pipeline.clustering import prices

        weighted = [(rows, np.ones(len(rows))) for rows in chunks]
        prices_K, _ = prices.refine(lambda: weighted, found.centres_KD, prices_K)
    labels = [(squared(rows, found.centres_KD) + prices_K).argmin(axis=1) for rows in chunks]
    fresh = float(np.bincount(np.concatenate(labels), minlength=k).max() * k / len(fresh_ND))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    loads = f"inertia {found.inertia:.5f}   largest load {found.load:.3f}   fresh {fresh:.3f}"
    return f"{len(x_ND):8d} x {k:<4d} {who:<19} {seconds:8.2f} s   {loads}   peak {peak:.2f} GB"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--vectors",
        type=Path,
        help=".npy to use instead of the mixture; the fresh documents are its last rows",
    )
    p.add_argument("--sizes", nargs="*", default=SIZES, help="NxK of the comparison")
    p.add_argument("--growth", nargs="*", default=GROWTH, help="NxK to measure ours alone")
    p.add_argument(
        "--published-source",
        type=Path,
        help="a checkout of github.com/kernelmachine/balanced-kmeans, to measure it too",
    )
    p.add_argument("--one", nargs=2, metavar=("WHO", "NxK"), help="measure one row in this process")
    args = p.parse_args()
    if args.one:
        who, (n, k) = args.one[0], map(int, args.one[1].split("x"))
        given = np.load(args.vectors, allow_pickle=False) if args.vectors else None
        fitted, fresh = (
            (mixture(n, 0), mixture(n, 1)) if given is None else (given[:n].copy(), given[-n:].copy())
        )
        print(measure(who, fitted, fresh, k, args.published_source), flush=True)
        return
    given = {"--vectors": args.vectors, "--published-source": args.published_source}
    options = [str(word) for option in given.items() if option[1] for word in option]
    rows = [
        (who, size)
        for size in args.sizes
        for who in ("ours", "published", *([OWN_CODE] if args.published_source else []), "exact", "faiss")
        if who != "exact" or int(size.split("x")[0]) < 20_000
    ]
    for who, size in [*rows, *(("ours", size) for size in args.growth)]:
        subprocess.run([sys.executable, "-W", "ignore", __file__, *options, "--one", who, size], check=True)


if __name__ == "__main__":
    main()
