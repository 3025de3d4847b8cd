"""Read the corpus once, and check, split and tokenise it into shards of bounded size.

    python -m cbtm_pipeline.shard --config config.yaml --tokenizer results/tokenizer/tokenizer.json \\
        --out results/shards/manifest.json

One process reads the corpus and cuts it into blocks of records, in order. The workers turn each block into a
shard of training documents, a shard of held-out documents, or one of each. So the shards do not depend on the
number of workers, and the memory does not depend on the size of the corpus.
"""

import dataclasses
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.base.printable import shortened
from cbtm_pipeline.base.publish import fresh
from cbtm_pipeline.corpus import blocks as corpus_blocks
from cbtm_pipeline.corpus import content, encoding, heldout, labels, repeated_ids, shard_block, shard_files
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import rows as corpus_rows
from cbtm_pipeline.corpus.quarantine import Quarantine
from cbtm_pipeline.corpus.records import Fields
from cbtm_pipeline.corpus.rows import BadRow
from cbtm_pipeline.corpus.shard_block import Block, Entry, Made, Setup, Split
from cbtm_pipeline.corpus.shard_workers import InOrder, workers
from cbtm_pipeline.ops import worded
from cbtm_pipeline.plan import ShardPlan

_MAX_ID = 100  # characters of an id that a message shows
_OWN = re.compile(r"\.?(train|eval)-\d{5,}\.(parquet|arrow)(\..+\.tmp)?|manifest\.json|quarantine\.jsonl")


class Read(NamedTuple):
    """How much of the corpus was read."""

    n_files: int
    n_rows: int
    n_bytes: int  # of the records


def make(
    plan: ShardPlan,
    tokenizer_json: Path,
    out: Path,
    n_workers: int,
    demo: Path | None,
    seen: Path,
    planned: Path | None = None,
    calibration_share: float | None = None,
) -> None:
    """Write the shards of the corpus beside `out`, and `out` (manifest.json) last.

    `demo` is the file that `builtin:demo` stands for. `seen` remembers the identities of the corpus's files,
    `planned` which files the start of the run has found. Raises ValueError if more than `max_bad_share` of
    the corpus cannot be used, if a planned file is gone, or if no document is left to train on or to hold
    out. With a `calibration_share`, the held-out documents have to be enough for a result, and a warning says
    what a result on few of them will lack.
    """
    card = encoding.read_card(tokenizer_json)
    train, held_out = _input_files(plan, demo, seen.parent)
    content.check_planned(planned, [*train, *held_out])
    _log_passed_over([*plan.train, *(plan.eval or [])], seen.parent)
    files = corpus_files.name([*held_out, *train])
    folder = out.parent
    _clear(folder)
    identity = artifact.identity(tokenizer_json)
    fields = Fields(plan.text_field, plan.id_field, plan.label_field)
    vocabulary = card["separator_id"], card["vocab_size"]
    setup = Setup(folder, tokenizer_json, identity, *vocabulary, fields, plan.eval_fraction or 0.0)
    try:
        with (
            artifact.publish(folder / "quarantine.jsonl") as tmp,
            tmp.open("w", encoding="utf-8") as file,
            workers(n_workers) as in_order,
            ThreadPoolExecutor(1) as beside,
        ):
            corpus = beside.submit(content.of_corpus, plan.train, plan.eval, demo, seen)
            quarantine = Quarantine(file, [corpus_files.printable(f.path) for f in files])
            shards, encoder, n_bytes = _make_shards(setup, plan, files, len(held_out), in_order, quarantine)
            shards = _without_duplicates(setup, shards, in_order, quarantine)
    finally:
        shutil.rmtree(folder / shard_block.SPILL, ignore_errors=True)
    n = _count(shards, "n_documents")
    read = Read(len(files), n.total() + quarantine.n_rows, n_bytes)
    _check_quarantine(read, quarantine, folder / "quarantine.jsonl", plan.max_bad_share)
    _check_split(n, plan)
    if plan.label_field is not None:
        labels.check_found(shards, plan.label_field)
    if calibration_share is not None:
        heldout.check_enough(n["eval"])
        if few := heldout.warning(n["eval"], calibration_share):
            cli.log.warning("%s", few)
    _log_splits(shards)
    about = {"separator_id": setup.separator_id, "vocab_size": setup.vocab_size}
    more = {"n_quarantined": quarantine.n_rows, "encoder": encoder, "shards": shards, "files": _files(shards)}
    for split in ("train", "eval"):
        entries = [entry for entry in shards if entry["split"] == split]
        more[f"identity_{split}"] = shard_files.identity_of(entries, about | {"tokenizer": identity})
    made_from = {"tokenizer": identity, "corpus": corpus.result()}
    artifact.write_sealed(out, artifact.make_meta("shards", made_from, plan.content(), **about, **more))


def _files(shards: list[Entry]) -> list[str]:
    """The names of all files beside the manifest."""
    of_shards = (f"{entry['name']}{suffix}" for entry in shards for suffix in (".parquet", ".arrow"))
    return [*of_shards, "quarantine.jsonl"]


def _input_files(plan: ShardPlan, demo: Path | None, outdir: Path) -> tuple[list[Path], list[Path]]:
    """The files of corpus.train and of corpus.eval. Raises ValueError for a file in both."""
    train = corpus_files.input_files(plan.train, demo, outdir)
    held_out = corpus_files.input_files(plan.eval or [], demo, outdir)
    if both := {path.absolute() for path in train} & {path.absolute() for path in held_out}:
        raise ValueError(
            f"corpus.eval: {min(both)} is also in corpus.train. Expected different files. "
            "Take it out of one of them."
        )
    return train, held_out


def _clear(folder: Path) -> None:
    """Remove the files of an earlier run, so that no stale shard lies beside the new ones."""
    fresh(folder / shard_block.SPILL)
    for path in folder.iterdir():
        if _OWN.fullmatch(path.name):
            path.unlink()


def _make_shards(
    setup: Setup,
    plan: ShardPlan,
    files: list[corpus_files.File],
    n_held_out: int,
    in_order: InOrder,
    quarantine: Quarantine,
) -> tuple[list[Entry], str, int]:
    """Make all blocks. Returns the shards, training shards first, the name of the encoder in the manifest,
    and the bytes of all records.

    That name is `gigatoken` if it encoded every block, else `tokenizers`. The first `n_held_out` files are
    those of corpus.eval.
    """
    progress = cli.Progress("read", corpus_files.n_bytes(files) / 1e6, "MB")
    made: list[Made] = []

    def make_blocks(split: Split, some: list[corpus_files.File]) -> None:
        parts = corpus_blocks.parts(some, plan.shard_bytes, setup.fields, plan.txt_documents)
        cut = corpus_blocks.blocks(parts, plan.shard_bytes)
        blocks = (Block(number, split, block) for number, block in enumerate(cut))
        for result in in_order(partial(shard_block.make, setup), blocks):
            quarantine.add(result.bad)
            made.append(result._replace(bad=[]))
            progress.add(result.n_read / 1e6, f"{quarantine.n_rows} rows in quarantine")

    if n_held_out:
        make_blocks("eval", files[:n_held_out])
        hashes = np.sort(np.concatenate([m.held_out for m in made]))
        np.save(setup.folder / shard_block.SPILL / shard_block.HELD_OUT, hashes)
    make_blocks("train" if n_held_out else "both", files[n_held_out:])

    slow = Counter(block.why_slow for block in made if block.why_slow)
    cli.log.info(
        "gigatoken encoded %d of %d blocks; its ids were compared on %d slices of text",
        len(made) - slow.total(),
        len(made),
        sum(block.n_sampled for block in made),
    )
    for why, n in slow.items():
        cli.log.warning("tokenizers encoded %d blocks: %s", n, why)
    shards = [entry for block in made for entry in block.shards]
    shards.sort(key=lambda entry: entry["split"], reverse=True)
    return shards, "tokenizers" if slow else "gigatoken", sum(block.n_bytes for block in made)


def _without_duplicates(
    setup: Setup, shards: list[Entry], in_order: InOrder, quarantine: Quarantine
) -> list[Entry]:
    """Keep the first document of each id; returns the shards that are left.

    The other documents go to the quarantine, and the shards that had them are written again.
    """
    paths = [shard_block.spilled(setup, entry["name"]) for entry in shards]
    found = list(repeated_ids.find(paths))
    if not found:
        return shards
    shard, again, first = (np.concatenate(columns) for columns in zip(*found, strict=True))
    by_place = np.lexsort((again["line"], again["file"], shard))
    shard, again, first = shard[by_place], again[by_place], first[by_place]
    affected, starts = np.unique(shard, return_index=True)
    groups = list(zip(affected, np.split(again, starts[1:]), np.split(first, starts[1:]), strict=True))
    cli.log.info(
        "writing %d shards again without their %d documents whose id came before", len(affected), len(again)
    )
    kept: list[Entry | None] = list(shards)
    work = ((shards[i], repeated_ids.rows_of(paths[i], entries)) for i, entries, _ in groups)
    results = in_order(partial(shard_block.drop, setup), work)
    for (i, entries, firsts), dropped in zip(groups, results, strict=True):
        kept[i] = dropped.entry
        for entry, earlier, name in zip(entries, firsts, dropped.ids, strict=True):
            other = f"{quarantine.sources[earlier['file']]}:{earlier['line']}"
            reason = f"duplicate id: {shortened(name, _MAX_ID)} is also the id of {other}"
            quarantine.add([BadRow(int(entry["file"]), int(entry["line"]), reason)])
    return [entry for entry in kept if entry]


def _count(shards: list[Entry], key: str) -> Counter[str]:
    """The sum of a key of the entries, by split."""
    return Counter({split: sum(e[key] for e in shards if e["split"] == split) for split in ("train", "eval")})


def _check_quarantine(read: Read, quarantine: Quarantine, path: Path, max_bad_share: float) -> None:
    """Log a warning if rows are in the quarantine.

    Raises ValueError if they are too many, if they hold too many of the bytes, if too many files are damaged,
    or if there are no rows. A damaged file counts as a whole, because nobody knows how much of it is missing.
    """
    if not read.n_rows:
        raise ValueError(
            f"corpus.train: no rows in its {read.n_files} files. Expected documents. Correct corpus.train."
        )
    n_bad, n_damaged, summary = quarantine.n_rows, quarantine.n_damaged, quarantine.summary()
    share, of_bytes = n_bad / read.n_rows, quarantine.n_bytes / max(1, read.n_bytes)
    end = f"Expected at most {max_bad_share:.2%}. See {path}; "
    if n_damaged / read.n_files > max_bad_share:
        raise ValueError(
            f"corpus: {n_damaged} of {read.n_files} files ({n_damaged / read.n_files:.2%}) are damaged, and "
            f"nobody knows how much of them is missing: {summary}. {end}get these files again or change "
            "corpus.max_bad_share."
        )
    if share > max_bad_share or n_bad == read.n_rows:
        raise ValueError(
            f"corpus: {n_bad} of {read.n_rows} rows ({share:.2%}) cannot be used: {summary}. {end}"
            f"mend the rows or change corpus.max_bad_share.{_about_ids(quarantine)}"
        )
    if of_bytes > max_bad_share:
        raise ValueError(
            f"corpus: {n_bad} of {read.n_rows} rows cannot be used, and they hold {of_bytes:.2%} of the "
            f"bytes: {summary}. {end}mend the rows or change corpus.max_bad_share."
        )
    if n_bad:
        cli.log.warning(
            "%d of %d rows (%.2f %%) are in %s: %s", n_bad, read.n_rows, 100 * share, path, summary
        )


def _about_ids(quarantine: Quarantine) -> str:
    """What to do where most of the rows in the quarantine repeat an id, or have one that is none."""
    whole = "set corpus.id_field: null: then file and row name a document."
    if 2 * quarantine.kinds["duplicate id"] >= quarantine.n_rows:
        return f" Where each file counts from 0, {whole}"
    if 2 * quarantine.kinds[corpus_rows.NO_ID] >= quarantine.n_rows:
        return f" Where a document has no other id, {whole}"
    return ""


def _log_passed_over(patterns: list[str], outdir: Path) -> None:
    """Warn of files beside those of the corpus that are not read: they may be text, too."""
    if found := corpus_files.passed_over(patterns, outdir):
        kinds = Counter(path.suffix.lower() or path.name for path in found)
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5))
        cli.log.warning(
            "%d files are not read, as their names say no format that is known: %s (%s)",
            *(len(found), counts, corpus_files.printable(found[0])),
        )


def _check_split(n: Counter[str], plan: ShardPlan) -> None:
    """Raise ValueError if no document is held out, or if none is left to train on.

    `n`: documents by split.
    """
    if not n["eval"]:
        raise ValueError(
            f"corpus: none of the {n.total()} documents is held out. Expected some to measure on. "
            + (
                "Add documents to corpus.eval."
                if plan.eval
                else "Raise corpus.eval_fraction or set corpus.eval."
            )
        )
    if not n["train"] and plan.train:
        raise ValueError(
            f"corpus: none of the {n.total()} documents is left to train on. Expected some. "
            "Add documents to corpus.train or lower corpus.eval_fraction."
        )


def _log_splits(shards: list[Entry]) -> None:
    n_shards = Counter(entry["split"] for entry in shards)
    n_documents, n_tokens, n_bytes = (_count(shards, k) for k in ("n_documents", "n_tokens", "n_bytes"))
    for split, what in (("eval", "held-out"), ("train", "training")):
        if not n_shards[split]:
            continue
        cli.log.info(
            "%d %s documents, %d tokens, %.1f MB, in %d shards",
            n_documents[split],
            what,
            n_tokens[split],
            n_bytes[split] / 1e6,
            n_shards[split],
        )


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__)
    p.add_argument("--tokenizer", required=True, type=Path, help="tokenizer/tokenizer.json")
    p.add_argument(
        "--out",
        required=True,
        type=Path,
        help="shards/manifest.json; the shards and quarantine.jsonl go beside it",
    )
    p.add_argument("--workers", type=int, default=1, help="processes that make shards")
    p.add_argument("--demo", type=Path, help="the file that builtin:demo stands for")
    p.add_argument("--planned", type=Path, help="the list of files that the start of the run has found")
    p.add_argument("--held-out", action="store_true", help="hold out all documents of corpus.train")
    p.add_argument("--called", metavar="OPTION", help="what the command that asks calls its documents")
    p.add_argument("--unevaluated", action="store_true", help="one held-out document is enough")
    args = p.parse_args(argv)
    cli.start_logging("shard", args.log)
    cfg = config.read(args.config)
    seen, plan = Path(cfg.outdir, content.SEEN), plans.shard(cfg)
    if args.held_out:
        plan = dataclasses.replace(plan, train=(), eval=plan.train, eval_fraction=None)
    share = None if args.held_out or args.unevaluated else cfg.route.calibration_share
    with worded.worded(args.called):
        make(plan, args.tokenizer, args.out, args.workers, args.demo, seen, args.planned, share)


if __name__ == "__main__":
    cli.run(main)
