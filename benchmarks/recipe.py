"""The published corpus path of C-BTM, for comparison in benchmarks/corpus.py.

It is github.com/kernelmachine/cbtm, written again. Words get scikit-learn's tf-idf (English stop words and
tokens that begin with a digit are dropped), TruncatedSVD and L2 norm. Each document goes to the nearest
centre, in batches of 10 000 documents, and makes one JSON line. Then, as in training, every line is parsed
again and tokenised by Hugging Face's tokenizers.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
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

    def build_tokenizer(self) -> Callable[[str], list[str]]:
        """A function that splits a text into terms."""
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
    """Run both steps over the files, one process per file at the same time.

    Returns the seconds of each step.
    """
    seconds = {}
    fork = multiprocessing.get_context("fork")  # a forked process has the embedder in memory already
    for step, target, arguments in (
        ("cluster", _cluster, (embedder, centres_KD)),
        ("tokenise", _tokenise, (tokenizer_json,)),
    ):
        began = time.perf_counter()
        processes = [fork.Process(target=target, args=(path, *arguments)) for path in files]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes)
        seconds[step] = time.perf_counter() - began
    return seconds


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The documents of a JSON-lines file."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _cluster(path: Path, embedder: Pipeline, centres_KD: np.ndarray) -> None:
    """Write the cluster of each document of a file."""
    with path.with_suffix(".clusters").open("w") as out:
        batch = []
        rows = _rows(path)
        while batch := [row for _, row in zip(range(BATCH_DOCUMENTS), rows, strict=False)]:
            x_ND = embedder.transform([row["text"] for row in batch])
            nearest_N = (np.square(centres_KD).sum(axis=1) - 2 * x_ND @ centres_KD.T).argmin(axis=1)
            for row, cluster in zip(batch, nearest_N, strict=True):
                out.write(json.dumps({"id": row["id"], "cluster": int(cluster)}) + "\n")


def _tokenise(path: Path, tokenizer_json: Path) -> None:
    """Write the token ids of all documents of a file."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    with path.with_suffix(".tokens").open("wb") as out:
        for row in _rows(path):
            np.array(tokenizer.encode(row["text"].rstrip()).ids, np.int64).tofile(out)
