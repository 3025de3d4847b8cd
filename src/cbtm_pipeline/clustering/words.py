"""Whole words that set groups of texts apart. Tokens are often parts of words, which tell people little.

Shapes: N texts, W words, K groups.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import sparse

PATTERN = r"(?<![^\W_])[^\W\d_]{3,30}(?![^\W_])"  # three letters or more, in any script
_WORD = re.compile(PATTERN)
MIN_TEXTS = 2  # that have a word; in fewer than 20 texts, one


def distinctive(texts: Sequence[str], labels_N: np.ndarray, k: int, n: int) -> list[list[str]]:
    """For each group, up to n words whose mean tf-idf most exceeds their mean in all texts, the best first.

    Words have small letters. `labels_N` are the groups of the texts, 0 to k - 1.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second, which few commands need

    vectorizer = TfidfVectorizer(token_pattern=PATTERN, min_df=MIN_TEXTS if len(texts) >= 20 else 1)
    try:
        rows_NW = sparse.csr_array(vectorizer.fit_transform(texts))
    except ValueError:  # no word at all
        return [[] for _ in range(k)]
    n_texts_K = np.bincount(labels_N, minlength=k)
    members_KN = sparse.csr_array((np.ones(len(texts)), (labels_N, np.arange(len(texts)))), (k, len(texts)))
    means_KW = sparse.csr_array(members_KN @ rows_NW).toarray() / np.maximum(n_texts_K, 1)[:, None]
    excess_KW = means_KW - rows_NW.mean(axis=0)
    names = vectorizer.get_feature_names_out()
    order_KW = np.argsort(-excess_KW, axis=1, kind="stable")[:, :n]
    return [
        [str(names[w]) for w in order_W if excess_W[w] > 0]
        for order_W, excess_W in zip(order_KW, excess_KW, strict=True)
    ]


def filled(words: Sequence[str], others: Sequence[str], n: int) -> list[str]:
    """The words, and of the others as many as n leaves room for, but no part of a word."""
    more = [term for term in others if not any(term in word for word in words)]
    return [*words, *more][:n]


def completed(terms: Iterable[str], texts: Iterable[str]) -> list[str]:
    """For each term the most frequent word of the texts that holds it, each word once.

    A term that is a word of the texts stays, and so does one that no word holds.
    """
    counts = Counter(word for text in texts for word in _WORD.findall(text.casefold()))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    found = (t if t in counts else next((w for w in ranked if t in w), t) for t in terms)
    return list(dict.fromkeys(found))
