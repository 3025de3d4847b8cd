"""Score any text: perplexity and bits per byte of the ensemble, and of every expert and baseline beside it.

    cbtm score FILE ...

A file may have any format of a corpus (docs/corpus.md). Long documents are read in windows. The numbers are
of all tokens but separators. With the same documents, context and stride, they are those of the run's own
evaluation. It is also `python -m cbtm_pipeline.score`.

Shapes: N tokens of all documents, K experts.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline.base import cli, printable
from cbtm_pipeline.base.printable import printable as as_printable
from cbtm_pipeline.corpus import blocks, rows
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus.formats import COMPRESSIONS, FORMATS
from cbtm_pipeline.inference import where
from cbtm_pipeline.inference.mixture import Mixture
from cbtm_pipeline.provenance import expert_files

BASELINES = ("dense", "dense-batch", "dense-steps", "seed")  # of the run that the folder lies in
PART_BYTES = 1 << 24


class Text(NamedTuple):
    """The documents of a file, `[sep, x_0, ...]` each; bytes of their text; and why rows were left out."""

    name: str
    documents: list[np.ndarray]
    n_bytes: int
    left_out: list[str]

    @property
    def n_tokens(self) -> int:
        return sum(len(document) - 1 for document in self.documents)


class Windows(NamedTuple):
    """How a document is read: `context` tokens at once, `stride` of them new."""

    context: int
    stride: int


def read_files(paths: Sequence[Path], args: argparse.Namespace, mixture: Mixture) -> list[Text]:
    """Read and encode all files. Raises ValueError for a file that cannot be read or has no document."""
    from cbtm_pipeline.corpus.encoding import TokenEncoder

    encoder = TokenEncoder(mixture.folder / "tokenizer.json")
    found = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file. Expected text or a file of a corpus. Correct the name.")
        if corpus_files.format_of(path) is None:
            ends = f"{' '.join(FORMATS)}, perhaps with {' or '.join(COMPRESSIONS)}"
            raise ValueError(f"{path}: unknown format. Expected a name that ends in {ends}. Rename it.")
        documents, n_bytes, left_out = [], 0, []
        for row in _rows(path, args):
            if isinstance(row, rows.BadRow):
                left_out.append(f"row {row.line}: {row.reason}")
                continue
            ids = encoder.encode(row.text, fast=not encoder.why_slow)
            documents.append(np.concatenate([[mixture.separator_id], ids]).astype(np.int64))
            n_bytes += len(row.text)
        if not any(len(document) > 1 for document in documents):
            why = f" ({left_out[0]})" if left_out else ""
            raise ValueError(f"{path}: no document{why}. Expected text. Check --text-field.")
        found.append(Text(str(path), documents, n_bytes, left_out))
    return found


def _rows(path: Path, args: argparse.Namespace) -> Iterator[rows.Document | rows.BadRow]:
    """The rows of a file, as `shard` reads them."""
    file = corpus_files.File(0, path, corpus_files.printable(path.name))
    for part in blocks.parts([file], PART_BYTES, args.text_field, "id", args.txt_documents):
        yield from rows.read(part, args.text_field, "id")


def offsets_of(documents: Iterable[np.ndarray]) -> np.ndarray:
    """Where each document's tokens begin among those of all, and where the last one's end."""
    return np.cumsum([0, *(len(document) - 1 for document in documents)])


def distances(mixture: Mixture, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Squared distance of each token's prefix to each centre, (N, K)."""
    from cbtm_pipeline import route

    parts = [route.prefix_distances(document, mixture.E_VD, mixture.centres_KD) for document in documents]
    return np.concatenate(parts)


def score(folder: Path, documents: Sequence[np.ndarray], windows: Windows) -> np.ndarray:
    """The log-probability of each token under the model in a folder, (N,) float32."""
    from cbtm_pipeline import score_expert
    from cbtm_pipeline.base import device
    from cbtm_pipeline.training import model

    net = model.load(folder).eval()
    device.move(net)
    return score_expert.score(net, documents, windows.context, windows.stride)


def systems(
    mixture: Mixture, baselines: dict[str, Path], documents: Sequence[np.ndarray], windows: Windows
) -> dict[str, np.ndarray]:
    """The log-probability of each token by system, (N,): the ensemble first, then all models alone."""
    from cbtm_pipeline.inference.mixture import log_weights
    from cbtm_pipeline.mixture import ensemble
    from cbtm_pipeline.mixture.routers import HeldOut

    experts = {name: score(mixture.folder / "experts" / name, documents, windows) for name in mixture.names}
    logprob_NK = np.stack(list(experts.values()), axis=1)
    held_out = HeldOut(logprob_NK, distances(mixture, documents), offsets_of(documents))
    mixed_N = ensemble.mix(logprob_NK, log_weights(mixture, held_out))
    others = {name: score(folder, documents, windows) for name, folder in baselines.items()}
    return {"ensemble": mixed_N, **{f"expert {name}": found for name, found in experts.items()}, **others}


def find_baselines(mixture: Mixture) -> dict[str, Path]:
    """The dense models and the seed of the run that the folder lies in, verified; none for a copy."""

    experts, found = mixture.folder.parent / "experts", {}
    for name in BASELINES:
        weights = experts / name / "model.safetensors"
        if weights.exists() and mixture.folder.name.startswith("ensemble"):
            card = expert_files.read_card(weights)
            if card["made_from"]["tokenizer"] == mixture.record["made_from"].get("tokenizer"):
                found[name] = weights.parent
    return found


def result(text: Text, logprobs: dict[str, np.ndarray]) -> dict[str, Any]:
    """The numbers of a file. `logprobs`: by system, of the file's tokens."""
    found = []
    for name, logprob_N in logprobs.items():
        nll = -float(logprob_N.sum(dtype=np.float64))
        mean = nll / text.n_tokens
        perplexity = math.exp(mean) if mean < 700 else None
        bits = nll / text.n_bytes / math.log(2)
        found.append({"system": name, "nll": mean, "perplexity": perplexity, "bits_per_byte": bits})
    about = {"n_documents": len(text.documents), "n_tokens": text.n_tokens, "n_bytes": text.n_bytes}
    return {"file": text.name, **about, "left_out": text.left_out, "systems": found}


def table(found: dict[str, Any]) -> str:
    """The numbers of a file as text: a line about the file, and one for each system."""
    numbers = "{n_documents:,} documents, {n_tokens:,} tokens, {n_bytes:,} bytes".format(**found)
    lines = [f"{as_printable(found['file'], keep='')}: {numbers}"]
    width = max(len(row["system"]) for row in found["systems"])
    lines.append(f"  {'':{width}}  perplexity  bits/byte")
    for row in found["systems"]:
        perplexity = "-" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        lines.append(f"  {row['system']:{width}}  {perplexity:>10}  {row['bits_per_byte']:>9.4f}")
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text, or a file of a corpus")
    where.add_options(p)
    where.add_exclude(p)
    p.add_argument("--text-field", default="text", help="where rows of .jsonl and .parquet have the text")
    p.add_argument(
        "--txt-documents", choices=["file", "block"], default="file", help="what is a document in .txt"
    )
    p.add_argument("--context", type=where.whole, help="tokens of a window; default: as in the training")
    p.add_argument("--stride", type=where.whole, help="new tokens of each further window; default: half")
    p.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    args = p.parse_args()
    folder = where.named(args)

    from cbtm_pipeline.inference import mixture as mixtures

    mixture = mixtures.read(folder, **where.without(args))
    context = args.context or mixture.context
    if mixture.n_positions and context > mixture.n_positions:
        raise ValueError(f"--context: {context}. Expected at most {mixture.n_positions}. Lower it.")
    windows = Windows(context, min(args.stride or max(1, context // 2), context))
    texts = read_files(args.files, args, mixture)
    for text in texts:
        if text.left_out:
            note = f"{text.name}: {len(text.left_out)} left out, the first is {text.left_out[0]}"
            print(as_printable(note, keep=""), file=sys.stderr)
    documents = [document for text in texts for document in text.documents]
    logprobs = systems(mixture, find_baselines(mixture), documents, windows)
    ends = np.cumsum([0, *(text.n_tokens for text in texts)])
    found = [
        result(text, {name: logprob_N[a:b] for name, logprob_N in logprobs.items()})
        for text, a, b in zip(texts, ends, ends[1:], strict=False)
    ]
    content = {"model": str(folder), "context": windows.context, "stride": windows.stride, "files": found}
    printable.show(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        if args.json
        else "\n".join(map(table, found))
    )


if __name__ == "__main__":
    cli.run(main)
