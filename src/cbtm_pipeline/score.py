"""Score any text: perplexity and bits per byte of the ensemble, and of every expert and baseline beside it.

    cbtm score FILE ...

A file may have any format of a corpus (docs/corpus.md). Long documents are read in windows. The numbers are
of all tokens but separators. With the same documents, context and stride, they are those of the run's own
evaluation. It is also `python -m cbtm_pipeline.score`.

With --profile or --cores, Snakemake runs a job for each expert (workflow/scored.smk), for more text than one
process should read. The numbers are the same.

Shapes: N tokens of all documents, K experts.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline.base import cli, printable
from cbtm_pipeline.base.printable import printable as as_printable
from cbtm_pipeline.corpus import blocks, encoding, rows
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus.formats import COMPRESSIONS, FORMATS
from cbtm_pipeline.corpus.records import Fields
from cbtm_pipeline.inference import changed_set, score_jobs, where
from cbtm_pipeline.inference.mixture import Mixture
from cbtm_pipeline.inference.score_jobs import Counts
from cbtm_pipeline.ops import snakemake_run, which_run, worded
from cbtm_pipeline.provenance import expert_files

# of the run that the folder lies in
BASELINES = ("dense", "dense-batch", "dense-steps", "dense-large", "seed")
PART_BYTES = 1 << 24


Scored = tuple[list[Counts], dict[str, np.ndarray]]  # the files; log-probabilities of all tokens by system


class Windows(NamedTuple):
    """How a document is read: `context` tokens at once, `stride` of them new."""

    context: int
    stride: int


def found_in(paths: Sequence[Path]) -> list[Path]:
    """The files that the command line names: itself, or all corpus files below a folder.

    Raises ValueError for a folder without one.
    """
    with worded.worded("FILE"):
        return [
            file
            for path in paths
            for file in (corpus_files.input_files([str(path)]) if path.is_dir() else [path])
        ]


def read_file(
    path: Path, args: argparse.Namespace, encoder: encoding.TokenEncoder, separator_id: int
) -> Iterator[tuple[np.ndarray, int] | rows.BadRow]:
    """Each row: its document `[sep, x_0, ...]` and the bytes of its text, or why it is left out.

    Raises ValueError for a file that cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected text or a file of a corpus. Correct the name.")
    if corpus_files.format_of(path) is None:
        ends = f"{' '.join(FORMATS)}, perhaps with {' or '.join(COMPRESSIONS)}"
        raise ValueError(f"{path}: unknown format. Expected a name that ends in {ends}. Rename it.")
    for row in _rows(path, args):
        if isinstance(row, rows.BadRow):
            yield row
            continue
        ids = encoder.encode(row.text, fast=not encoder.why_slow)
        if not len(ids):
            yield rows.BadRow(row.file, row.line, rows.NO_TOKENS)
            continue
        yield np.concatenate([[separator_id], ids]).astype(np.int64), len(row.text)


def read_files(args: argparse.Namespace, mixture: Mixture) -> tuple[list[Counts], list[np.ndarray]]:
    """Read and encode all files: what is in each, and their documents. Raises ValueError for one without."""
    encoder = encoding.TokenEncoder(mixture.folder / "tokenizer.json")
    counts, documents, n_tokens = [], [], 0
    for path in args.files:
        n_before, begin, n_bytes, left_out = len(documents), n_tokens, 0, []
        for row in read_file(path, args, encoder, mixture.separator_id):
            if isinstance(row, rows.BadRow):
                left_out.append(f"row {row.line}: {row.reason}")
                continue
            documents.append(row[0])
            n_tokens += len(row[0]) - 1
            n_bytes += row[1]
        n = len(documents) - n_before
        counts.append(Counts(str(path), slice(begin, n_tokens), n, n_bytes, left_out))
        _check_documents(counts[-1])
    return counts, documents


def check_files(args: argparse.Namespace, mixture: Mixture) -> None:
    """Read every file up to its first document. Raises ValueError for one that jobs could not use."""
    encoder = encoding.TokenEncoder(mixture.folder / "tokenizer.json")
    for path in args.files:
        left_out = []
        for row in read_file(path, args, encoder, mixture.separator_id):
            if not isinstance(row, rows.BadRow):
                break
            left_out.append(f"row {row.line}: {row.reason}")
        else:
            _check_documents(Counts(str(path), slice(0, 0), 0, 0, left_out))


def _check_documents(file: Counts) -> None:
    if not file.n_documents:
        why = f" ({file.left_out[0]})" if file.left_out else ""
        raise ValueError(f"{file.name}: no document{why}. Expected text. Check --text-field.")


def _rows(path: Path, args: argparse.Namespace) -> Iterator[rows.Document | rows.BadRow]:
    """The rows of a file, as `shard` reads them. Ids do not matter."""
    file = corpus_files.File(0, path, corpus_files.printable(path.name))
    fields = Fields(args.text_field)
    for part in blocks.parts([file], PART_BYTES, fields, args.txt_documents):
        yield from rows.read(part, fields)


def offsets_of(documents: Iterable[np.ndarray]) -> np.ndarray:
    """Where each document's tokens begin among those of all, and where the last one's end."""
    return np.cumsum([0, *(len(document) - 1 for document in documents)])


def distances(mixture: Mixture, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Squared distance of each token's prefix to each centre, (N, K)."""
    from cbtm_pipeline import route

    return np.concatenate(list(route.prefix_distances(documents, mixture.E_VD, mixture.centres_KD)))


def score(folder: Path, documents: Sequence[np.ndarray], windows: Windows) -> np.ndarray:
    """The log-probability of each token under the model in a folder, (N,) float32."""
    from cbtm_pipeline import score_expert
    from cbtm_pipeline.base import device
    from cbtm_pipeline.training import model

    net = model.load(folder).eval()
    device.move(net)
    return score_expert.score(net, documents, windows.context, windows.stride)


def mixed(
    mixture: Mixture, logprob: dict[str, np.ndarray], d2_NK: np.ndarray, offsets: np.ndarray
) -> dict[str, np.ndarray]:
    """The log-probability of each token by system, (N,): the ensemble first, then all models alone.

    `logprob`: by name of the expert or baseline. The columns of `d2_NK` are the mixture's experts.
    """
    from cbtm_pipeline.inference.mixture import log_weights
    from cbtm_pipeline.mixture import ensemble, sweep
    from cbtm_pipeline.mixture.routers import HeldOut

    logprob_NK = np.stack([logprob[name] for name in mixture.names], axis=1)
    blocks = sweep.blocks(HeldOut(logprob_NK, d2_NK, offsets))
    mixed_N = np.concatenate(
        [ensemble.mix(block.logprob_NK, log_weights(mixture, block)) for block in blocks]
    )
    experts = {f"expert {name}": logprob[name] for name in mixture.names}
    others = {name: found for name, found in logprob.items() if name not in mixture.names}
    return {"ensemble": mixed_N, **experts, **others}


def find_baselines(
    mixture: Mixture, read_card: Callable[[Path], dict[str, Any]] = expert_files.read_card
) -> dict[str, Path]:
    """The dense models and the seed of the run that the folder lies in; none for a copy.

    `read_card` reads the card of weights; the default verifies all files.
    """
    experts, found = mixture.folder.parent / "experts", {}
    for name in BASELINES:
        weights = experts / name / "model.safetensors"
        is_ours = name not in mixture.names and mixture.folder.name.startswith("ensemble")
        if is_ours and weights.exists():
            card = read_card(weights)
            if card["made_from"]["tokenizer"] == mixture.record["made_from"].get("tokenizer"):
                found[name] = weights.parent
    return found


def score_here(args: argparse.Namespace, mixture: Mixture, windows: Windows) -> Scored:
    """Score all files in this process."""
    counts, documents = read_files(args, mixture)
    _warn(counts)
    folders = {name: mixture.folder / "experts" / name for name in mixture.names} | find_baselines(mixture)
    logprob = {name: score(folder, documents, windows) for name, folder in folders.items()}
    return counts, mixed(mixture, logprob, distances(mixture, documents), offsets_of(documents))


def score_by_jobs(args: argparse.Namespace, mixture: Mixture, windows: Windows) -> Scored | None:
    """Let Snakemake run a job for each model, and mix what they have found. None for a dry run."""
    check_files(args, mixture)
    outdir = which_run.named(args)
    cfg, found = changed_set.of_run(outdir, mixture.folder)
    baselines = find_baselines(mixture, lambda weights: changed_set.read_card(weights.parent))
    how = score_jobs.Reading(*windows, args.text_field, args.txt_documents)
    cfg = score_jobs.configured(cfg, args.files, how)
    asked = score_jobs.request(outdir, cfg, found, baselines, how)
    folder = score_jobs.folder(outdir, args.name, asked)
    models = [*mixture.names, *baselines]
    targets = score_jobs.targets(folder, models)
    cfg = cfg.model_copy(update={"outdir": str(folder)})
    with snakemake_run.begun(folder, asked, cfg, args.dry_run):
        snakemake_run.run(score_jobs.SNAKEFILE, folder, args, "the scores of all models", targets)
        if args.dry_run:
            return None
        snakemake_run.check_kept(folder, asked)
        made = score_jobs.read(folder, asked, models, args.files)
    _warn(made.files)
    columns = [made.experts.index(name) for name in mixture.names]
    return made.files, mixed(mixture, made.logprob, made.d2_NK[:, columns], made.offsets)


def _warn(counts: Sequence[Counts]) -> None:
    for file in counts:
        if file.left_out:
            note = f"{file.name}: {len(file.left_out)} left out, the first is {file.left_out[0]}"
            print(as_printable(note, keep=""), file=sys.stderr)


def result(file: Counts, logprobs: dict[str, np.ndarray]) -> dict[str, Any]:
    """The numbers of a file. `logprobs`: by system, of the tokens of all files."""
    found = []
    for name, logprob_N in logprobs.items():
        nll = -float(logprob_N[file.rows].sum(dtype=np.float64))
        mean = nll / file.n_tokens
        perplexity = math.exp(mean) if mean < 700 else None
        bits = nll / file.n_bytes / math.log(2)
        found.append({"system": name, "nll": mean, "perplexity": perplexity, "bits_per_byte": bits})
    about = {"n_documents": file.n_documents, "n_tokens": file.n_tokens, "n_bytes": file.n_bytes}
    return {"file": file.name, **about, "left_out": file.left_out, "systems": found}


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


def parse() -> argparse.Namespace:
    """The command line. Raises ValueError for options that need another one."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="text, a file of a corpus, or a folder"
    )
    where.add_options(p)
    where.add_exclude(p)
    p.add_argument("--text-field", default="text", help="where rows of .jsonl and .parquet have the text")
    p.add_argument(
        "--txt-documents", choices=["file", "block"], default="file", help="what is a document in .txt"
    )
    p.add_argument("--context", type=cli.whole, help="tokens of a window; default: as in the training")
    p.add_argument("--stride", type=cli.whole, help="new tokens of each further window; default: half")
    p.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    snakemake_run.add_options(p, "run a job for each expert, on so many cores of this machine")
    about = (
        "with --profile or --cores: all lies in <outdir>/scored/NAME; default: a hash of what is asked for"
    )
    p.add_argument("--name", metavar="NAME", help=about)
    args = p.parse_args()
    args.files = found_in(args.files)
    for option, value in (("--name", args.name), ("--dry-run", args.dry_run)):
        if value and not _has_jobs(args):
            expected = "--profile or --cores, which run jobs"
            raise ValueError(f"{option}: without jobs. Expected {expected}. Add one of them.")
    return args


def _has_jobs(args: argparse.Namespace) -> bool:
    return bool(args.profile) or args.cores is not None


def main() -> None:
    args = parse()
    folder = where.named(args)

    from cbtm_pipeline.inference import mixture as mixtures

    mixture = mixtures.read(folder, weights=not _has_jobs(args), **where.without(args))
    context = args.context or mixture.context
    if mixture.n_positions and context > mixture.n_positions:
        raise ValueError(f"--context: {context}. Expected at most {mixture.n_positions}. Lower it.")
    windows = Windows(context, min(args.stride or max(1, context // 2), context))
    with worded.worded("FILE"):
        scored = (score_by_jobs if _has_jobs(args) else score_here)(args, mixture, windows)
    if scored is None:
        return
    found = [result(file, scored[1]) for file in scored[0]]
    content = {"model": str(folder), "context": windows.context, "stride": windows.stride, "files": found}
    printable.show(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        if args.json
        else "\n".join(map(table, found))
    )


if __name__ == "__main__":
    cli.run(main)
