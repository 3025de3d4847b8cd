"""Linear tf-idf over token ids: a sum over a text's tokens, so that every prefix costs one more addition.

    h(x) = s / |s|,   s = sum over the tokens x_i of E[x_i],   E = diag(idf^p) V

idf_v = ln((1 + N) / (1 + df_v)) + 1, smoothed as if one more document held every term (scikit-learn's
smooth_idf). V holds the right singular vectors of the documents' tf-idf rows. For the search of V alone, the
rows have length one and do not count how often a term occurs; otherwise long and repetitive documents would
fill the leading components. The sum s stays linear in the counts. Terms in too many or too few documents, and
the separator, have zero rows in E. Text made only of these has the zero vector. benchmarks/weighting.py
compares weightings.

Shapes: N documents, V terms (token ids), U terms with a weight, D components, T tokens of one document with
its separator first, R rows of one chunk.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch.nn.functional import embedding_bag

from cbtm_pipeline.base.threads import one_thread
from cbtm_pipeline.corpus.token_files import Documents

log = logging.getLogger("cbtm")

CHUNK_TOKENS = 1 << 22  # of documents embedded at once; a longer document is its own chunk
CHUNK_PREFIXES = 1 << 12
OVERSAMPLES = 10  # columns beyond those wanted
POWER_ITERATIONS = 2  # more of them sharpen only the last components, which separate no topics
SAME = 1e-5  # singular values below this share of the first are float32 rounding, and their vectors are noise


class Embedder(NamedTuple):
    """`E_VD`: the vector that each token adds.

    `idf_V`: the weight of each term, idf^p, zero for a dropped term. Both are float32.
    """

    E_VD: np.ndarray
    idf_V: np.ndarray


def count(documents: Documents, vocab_size: int) -> sparse.csr_array:
    """Term counts of each document, float32 (N, V).

    Raises ValueError for a token id outside the vocabulary.
    """
    chunks = []
    for chunk in _chunks(documents):
        _check_ids(chunk.values, vocab_size)
        ones = np.ones(len(chunk.values), np.float32)
        counts_RV = sparse.csr_array(
            (ones, chunk.values.astype(np.int32), chunk.offsets), shape=(len(chunk), vocab_size)
        )
        # conversion to columns and back sorts each row in linear time; sum_duplicates alone would sort by
        # comparison
        counts_RV = counts_RV.tocsc().tocsr()
        counts_RV.sum_duplicates()
        chunks.append(counts_RV)
    if not chunks:
        return sparse.csr_array((0, vocab_size), dtype=np.float32)
    return sparse.csr_array(sparse.vstack(chunks, "csr"))


def fit(
    counts_NV: sparse.csr_array,
    *,
    separator_id: int,
    n_components: int,
    idf_power: float,
    max_df: float,
    min_df: int,
    rng_seed: int,
) -> Embedder:
    """Weights and components from the counts of the fitted documents.

    A term is kept if at least `min_df` documents and at most the share `max_df` of them hold it. If N is so
    small that these limits exclude each other, they give way: min_df counts as at most N, and terms in min_df
    documents are always kept. Raises ValueError if no term is kept.
    """
    n, vocab_size = counts_NV.shape  # pyright: ignore[reportGeneralTypeIssues]
    df_V = np.bincount(counts_NV.indices, minlength=vocab_size)
    lowest = min(min_df, n)
    kept_V = (df_V >= max(lowest, 1)) & (df_V <= max(max_df * n, lowest))
    kept_V[separator_id] = False
    if min_df > max_df * n:
        message = "embed.min_df %d and embed.max_df %g exclude each other in %d documents and give way"
        log.warning(message, min_df, max_df, n)
    if not kept_V.any():
        raise ValueError(
            f"embed.min_df, embed.max_df: {min_df} and {max_df:g} drop every term of {n} documents. "
            "Expected at least one to be kept. Lower min_df or raise max_df."
        )
    idf_V = np.where(kept_V, (np.log((1 + n) / (1 + df_V)) + 1) ** idf_power, 0)
    return weighted(counts_NV, idf_V, n_components, rng_seed)


def weighted(counts_NV: sparse.csr_array, idf_V: np.ndarray, n_components: int, rng_seed: int) -> Embedder:
    """The embedder with these weights.

    D is `n_components`, or less if there are too few documents or terms.
    """
    n, vocab_size = counts_NV.shape  # pyright: ignore[reportGeneralTypeIssues]
    terms_U = np.flatnonzero(idf_V)
    rows_NU = rows(counts_NV[:, terms_U], idf_V[terms_U])
    V_UD = _components(rows_NU, min(n_components, n, len(terms_U)), rng_seed)
    n_found = V_UD.shape[1]
    if n_found < n_components:
        found = f"{n} documents with {len(terms_U)} usable terms give {n_found} components"
        log.info("%s, fewer than embed.n_components (%d)", found, n_components)
    E_VD = np.zeros((vocab_size, n_found), np.float32)
    E_VD[terms_U] = idf_V[terms_U, None] * V_UD
    return Embedder(E_VD, idf_V.astype(np.float32))


def _components(rows_NU: sparse.csr_array, n: int, rng_seed: int) -> np.ndarray:
    """The right singular vectors with the n largest singular values, (U, n), or fewer if the rank is lower.

    Subspace iteration from a random start (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1). The
    sparse products have one thread per row. LAPACK cuts a matrix by the number of threads, and rounds
    accordingly: so it gets one thread, which is enough (0.1 s for a QR decomposition of 50 000 x 110).
    """
    columns_UN = sparse.csr_array(rows_NU.T)
    n_documents, n_terms = rows_NU.shape  # pyright: ignore[reportGeneralTypeIssues]
    width = min(n + OVERSAMPLES, n_documents, n_terms)
    B_UD = torch.randn(n_terms, width, generator=torch.Generator().manual_seed(rng_seed))
    for _ in range(1 + POWER_ITERATIONS):
        B_UD = _times(columns_UN, _orthonormal(_times(rows_NU, _orthonormal(B_UD))))
    with one_thread():
        V_UD, strength_D, _ = torch.linalg.svd(B_UD, full_matrices=False)
    return V_UD[:, :n][:, strength_D[:n] > SAME * strength_D[0]].numpy()


def _orthonormal(b: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns."""
    with one_thread():
        return torch.linalg.qr(b).Q


def _times(a: sparse.csr_array, b: torch.Tensor) -> torch.Tensor:
    """The product of a sparse and a dense matrix, in float32.

    Its rows are weighted sums of rows of `b`, as in `embed`. The kernel of torch for such sums is several
    times faster than its sparse matrices.
    """
    ids, offsets = (torch.from_numpy(x.astype(np.int32)) for x in (a.indices, a.indptr))
    weights = torch.from_numpy(a.data)
    return embedding_bag(
        ids, b.contiguous(), offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def rows(counts_NV: sparse.csr_array, idf_V: np.ndarray) -> sparse.csr_array:
    """The documents' tf-idf rows, float32 (N, V), in which a term counts once.

    A row has idf_v where term v occurs, scaled to length one. Zero rows stay zero.
    """
    weights = idf_V[counts_NV.indices].astype(np.float32)
    row = np.repeat(np.arange(len(counts_NV.indptr) - 1), np.diff(counts_NV.indptr))
    lengths_N = np.sqrt(np.bincount(row, np.square(weights), len(counts_NV.indptr) - 1))
    np.divide(weights, np.where(lengths_N > 0, lengths_N, 1)[row], out=weights, casting="same_kind")
    return sparse.csr_array((weights, counts_NV.indices, counts_NV.indptr), counts_NV.shape)


def embed(documents: Documents, E_VD: np.ndarray) -> np.ndarray:
    """Embedding of each document, float32 (N, D), of length one or zero.

    Each document is one sum over rows of E, in float32 and from left to right. So it depends neither on
    threads nor on other documents. A token costs a read of 4 D bytes, mostly from the cache because most
    tokens are frequent. Raises ValueError for a token id outside the vocabulary.
    """
    vocab_size, n_components = E_VD.shape
    h_ND = np.empty((len(documents), n_components), np.float32)
    start = 0
    for chunk in _chunks(documents):
        _check_ids(chunk.values, vocab_size)
        ids, offsets = (torch.from_numpy(x.astype(np.int32)) for x in chunk)
        s_RD = embedding_bag(ids, torch.from_numpy(E_VD), offsets, mode="sum", include_last_offset=True)
        h_ND[start : start + len(chunk)] = _normalise(s_RD.numpy())
        start += len(chunk)
    return h_ND


def prefix_sums(
    documents: Iterable[np.ndarray], E_VD: np.ndarray, chunk_rows: int = CHUNK_PREFIXES
) -> Iterator[torch.Tensor]:
    """Sums over the rows of E of all prefixes of documents `[sep, x_0, ..., x_(n-1)]`, float64 (R, D).

    The rows of all documents, one document after the other, come in chunks. Row t of a document, scaled to
    length one, is h(x_0 ... x_(t-1)): `embed` of that prefix up to float32 rounding. So its row 0 is zero.
    Sums are taken from left to right: no later token, no other document, and no choice of `chunk_rows`
    changes a bit of a row. Raises ValueError for an id outside the vocabulary.
    """
    rows_VD, sum_D = torch.from_numpy(E_VD), torch.zeros(E_VD.shape[1], dtype=torch.float64)
    for runs in _runs(documents, chunk_rows):
        ids_R = np.concatenate([run for _, run in runs], dtype=np.int64)
        _check_ids(ids_R, len(E_VD))
        s_RD = torch.nn.functional.embedding(torch.from_numpy(ids_R), rows_VD).double()
        begin = 0
        for first, run in runs:
            s_of_run = s_RD[begin : begin + len(run)]
            if first > 0:
                s_of_run[0] += sum_D
            torch.cumsum(s_of_run, dim=0, out=s_of_run)
            begin += len(run)
        sum_D = s_RD[-1].clone()
        yield s_RD


def _runs(documents: Iterable[np.ndarray], n_tokens: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """The documents in runs of tokens, in lists of n_tokens each, with the position at which a run begins."""
    runs, left = [], n_tokens
    for x_T in documents:
        first = 0
        while first < len(x_T):
            runs.append((first, x_T[first : first + left]))
            first += len(runs[-1][1])
            left -= len(runs[-1][1])
            if left == 0:
                yield runs
                runs, left = [], n_tokens
    if runs:
        yield runs


def _check_ids(values: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError for a token id outside the vocabulary."""
    highest = int(values.max(initial=0))
    if highest >= vocab_size:
        raise ValueError(
            f"tokens: id {highest}. Expected ids below the vocabulary size, {vocab_size}. "
            "Run shard and embed again."
        )


def _normalise(s_RD: np.ndarray) -> np.ndarray:
    """The rows scaled to length one, float32; zero rows stay zero."""
    lengths_R = np.sqrt(np.einsum("rd,rd->r", s_RD, s_RD))
    return (s_RD / np.where(lengths_R > 0, lengths_R, 1)[:, None]).astype(np.float32)


def _chunks(documents: Documents) -> Iterator[Documents]:
    """The documents in chunks of at most CHUNK_TOKENS tokens, or of one longer document."""
    offsets = documents.offsets
    first = 0
    while first < len(documents):
        last = int(np.searchsorted(offsets, offsets[first] + CHUNK_TOKENS, "right")) - 1
        last = max(last, first + 1)
        yield Documents(
            documents.values[offsets[first] : offsets[last]],
            (offsets[first : last + 1] - offsets[first]).astype(np.int32),
        )
        first = last
