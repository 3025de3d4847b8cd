"""The peer of benchmarks/corpus.py: the corpus path as the authors of C-BTM published it (github.com/kernelmachine/cbtm), written anew.

scikit-learn's tf-idf over words (English stop words, tokens that begin with a digit dropped), TruncatedSVD, L2 norm, nearest centre in
batches of 10 000 documents, a JSON line per document; then, as in training, every line parsed again and tokenised by Hugging Face's
tokenizers.
"""

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer

BATCH_DOCUMENTS = 10_000
NUMBER = "#NUMBER"


class Vectorizer(TfidfVectorizer):
    """tf-idf in which all tokens that begin with a digit are one term, a stop word."""

    def build_tokenizer(self):
        words = super().build_tokenizer()
        return lambda text: [NUMBER if word[0].isdigit() else word for word in words(text)]


def fit(texts: Sequence[str], n_components: int) -> Pipeline:
    """The embedder: texts to unit vectors (N, n_components)."""
    vectorizer = Vectorizer(stop_words=[*ENGLISH_STOP_WORDS, NUMBER])
    return Pipeline(
        [("tfidf", vectorizer), ("svd", TruncatedSVD(n_components)), ("norm", Normalizer(copy=False))]
    ).fit(texts)


def run(
    files: Sequence[Path], embedder: Pipeline, centres_KD: np.ndarray, tokenizer_json: Path
) -> dict[str, float]:
    """Both steps over the files, one process each, side by side. Returns the seconds of `cluster` and of `tokenise`."""
    seconds = {}
    fork = multiprocessing.get_context("fork")  # so that the embedder need not be written and read
    for step, target, what in (
        ("cluster", _cluster, (embedder, centres_KD)),
        ("tokenise", _tokenise, (tokenizer_json,)),
    ):
        began = time.perf_counter()
        processes = [fork.Process(target=target, args=(path, *what)) for path in files]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes)
        seconds[step] = time.perf_counter() - began
    return seconds


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _cluster(path: Path, embedder: Pipeline, centres_KD: np.ndarray) -> None:
    with path.with_suffix(".clusters").open("w") as out:
        batch = []
        rows = _rows(path)
        while batch := [row for _, row in zip(range(BATCH_DOCUMENTS), rows, strict=False)]:
            x_ND = embedder.transform([row["text"] for row in batch])
            nearest_N = (np.square(centres_KD).sum(axis=1) - 2 * x_ND @ centres_KD.T).argmin(axis=1)
            for row, cluster in zip(batch, nearest_N, strict=True):
                out.write(json.dumps({"id": row["id"], "cluster": int(cluster)}) + "\n")


def _tokenise(path: Path, tokenizer_json: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    with path.with_suffix(".tokens").open("wb") as out:
        for row in _rows(path):
            np.array(tokenizer.encode(row["text"].rstrip()).ids, np.int64).tofile(out)
