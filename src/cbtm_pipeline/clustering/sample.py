"""A sample of the training documents, and the terms that set clusters of it apart.

Shapes: N documents of the sample, D dimensions, K clusters, V terms.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse
from tokenizers import Tokenizer

from cbtm_pipeline.base import artifact
from cbtm_pipeline.clustering import words
from cbtm_pipeline.corpus import shard_files
from cbtm_pipeline.embedding import tfidf
from cbtm_pipeline.embedding import vectors as vector_files

N_TERMS = 12
BEGIN_TOKENS = 512  # of a document, in which its words are counted
TERM_DOCUMENTS = 20_000  # documents of the sample in which the terms are counted


def top_terms(
    counts_NV: sparse.csr_array, idf_V: np.ndarray, labels_N: np.ndarray, k: int, strings: list[str]
) -> list[list[str]]:
    """For each cluster, the N_TERMS strings whose mean tf-idf most exceeds their mean in all documents.

    Words of three letters or more come first, then other readable strings. A word counts once, whatever its
    case and the space around it.
    """
    rows_NV = tfidf.rows(counts_NV, idf_V)
    n, n_documents_K = len(labels_N), np.bincount(labels_N, minlength=k)
    members_KN = sparse.csr_array((np.ones(n), (labels_N, np.arange(n))), shape=(k, n))
    means_KV = sparse.csr_array(members_KN @ rows_NV).toarray() / np.maximum(n_documents_K, 1)[:, None]
    excess_KV = means_KV - rows_NV.mean(axis=0)

    readable_V = np.array([len(_word(s)) > 1 and "\ufffd" not in s for s in strings])
    words_V = np.array([len(_word(s)) > 2 and _word(s).isalpha() for s in strings])
    chosen = []
    for excess_V in excess_KV:
        order = np.argsort(-excess_V, kind="stable")
        order = order[(excess_V[order] > 0) & readable_V[order]]
        ranked = [*order[words_V[order]], *order[~words_V[order]]]
        chosen.append(list(dict.fromkeys(_word(strings[v]) for v in ranked))[:N_TERMS])
    return chosen


def _word(string: str) -> str:
    """The string without case and surrounding space."""
    return string.strip().casefold()


class Sample(NamedTuple):
    """Documents from all shards: vectors and numbers of tokens.

    `counts` holds the term counts of the documents whose row numbers are `counted`, `begins` their first
    BEGIN_TOKENS token ids. `labels` are those of all documents, if they were asked for and are there.
    """

    x_ND: np.ndarray
    n_tokens_N: np.ndarray
    counts: sparse.csr_array
    counted: np.ndarray
    begins: list[np.ndarray]
    labels: list[str] | None = None


def read_sample(vectors: Path, shards: Path, n: int, rng_seed: int, with_labels: bool = False) -> Sample:
    """Draw n training documents of shards/manifest.json, with their vectors of embed/manifest.json."""
    shards_manifest = artifact.read_sealed(shards, "shards")
    vectors_manifest = vector_files.read_manifest(vectors, shards)
    train = shard_files.entries(shards, shards_manifest, "train")
    step = -(-min(n, sum(entry["n_documents"] for entry in train)) // TERM_DOCUMENTS)
    drawn = zip(shard_files.sample(train, n, rng_seed), vectors_manifest["shards"], strict=True)
    labels = [] if with_labels and shard_files.identity_labels(train) else None
    x, n_tokens, counts, counted, begins, start = [], [], [], [], [], 0
    for (entry, rows), vectors_entry in drawn:
        documents = shard_files.documents(shards.parent, entry)
        x.append(vector_files.read(vectors.parent, vectors_entry)[rows])
        n_tokens.append(documents.n_tokens[rows])
        if labels is not None:
            of_shard = shard_files.labels(shards.parent, entry)
            labels += [of_shard[row] for row in rows.tolist()]
        some = documents.take(rows[::step])
        counts.append(tfidf.count(some, shards_manifest["vocab_size"]))
        ends = np.minimum(some.offsets[1:], some.offsets[:-1] + 1 + BEGIN_TOKENS)  # the separator is first
        begins += [some.values[a + 1 : b].copy() for a, b in zip(some.offsets[:-1], ends, strict=True)]
        counted.append(np.arange(start, start + len(rows), step))
        start += len(rows)
    counts_NV = sparse.csr_array(sparse.vstack(counts, "csr"))
    x_ND, n_tokens_N, counted_N = map(np.concatenate, (x, n_tokens, counted))
    return Sample(x_ND, n_tokens_N, counts_NV, counted_N, begins, labels)


def describe(
    sample: Sample, idf_V: np.ndarray, labels_N: np.ndarray, k: int, tokenizer: Tokenizer
) -> list[list[str]]:
    """What sets each cluster apart: N_TERMS words, and terms where its texts have fewer."""
    strings = [tokenizer.decode([token]) for token in range(len(idf_V))]
    terms = top_terms(sample.counts, idf_V, labels_N, k, strings)
    texts = tokenizer.decode_batch([ids.tolist() for ids in sample.begins])
    whole = [
        text if len(ids) < BEGIN_TOKENS else text.rpartition(" ")[0]
        for text, ids in zip(texts, sample.begins, strict=True)
    ]
    found = words.distinctive(whole, labels_N, k, N_TERMS)
    return [words.filled(*both, N_TERMS) for both in zip(found, terms, strict=True)]
