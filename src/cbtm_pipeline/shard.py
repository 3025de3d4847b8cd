"""Rule `shard`: read the corpus, validate, split and tokenise it, once, into shards of bounded size.

One process reads and cuts the corpus into blocks of records, in order; the workers turn each block into a shard of training documents, one
of held-out documents, or both. So the shards do not depend on the number of workers, and memory not on the size of the corpus.
"""

import json
import multiprocessing
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli, parallel
from cbtm_pipeline.corpus import blocks as corpus_blocks
from cbtm_pipeline.corpus import encoding, repeated_ids, shard_block
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus.rows import BadRow
from cbtm_pipeline.corpus.shard_block import Block, Entry, Made, Setup, Split
from cbtm_pipeline.plan import ShardPlan

_OWN = re.compile(r"\.?(train|eval)-\d{5,}\.(parquet|arrow)(\..+\.tmp)?|manifest\.json|quarantine\.jsonl")
InOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]  # like map


class Quarantine:
    """Writes the rows that cannot be used, and counts them by the kind of defect."""

    def __init__(self, file: TextIO, sources: list[str]):
        self.file, self.sources = file, sources
        self.n_rows = 0
        self.kinds: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, rows: Iterable[BadRow]) -> None:
        for row in rows:
            source = self.sources[row.file]
            self.file.write(
                json.dumps({"source": source, "line": row.line, "reason": row.reason}, ensure_ascii=False)
                + "\n"
            )
            kind = row.reason.partition(":")[0]
            self.n_rows += 1
            self.kinds[kind] += 1
            self.examples.setdefault(kind, f"{source}:{row.line}: {row.reason}")

    def summary(self) -> str:
        """The most common defects, each with its first row."""
        return "; ".join(f"{n} x {kind} ({self.examples[kind]})" for kind, n in self.kinds.most_common(3))


def make(plan: ShardPlan, tokenizer_json: Path, out: Path, n_workers: int, demo: Path | None) -> None:
    """Write the shards of the corpus beside `out`, and `out` (manifest.json) last. `plan`: the keys of section corpus.

    Raises ValueError if more than `max_bad_share` of the rows cannot be used, or if nothing remains to train on or to hold out.
    """
    card = encoding.read_card(tokenizer_json)
    train, held_out = (
        corpus_files.input_files(getattr(plan, side) or [], demo) for side in ("train", "eval")
    )
    if both := {path.absolute() for path in train} & {path.absolute() for path in held_out}:
        raise ValueError(
            f"corpus.eval: {min(both)} is also in corpus.train. Expected different files. Take it out of one of them."
        )
    files = corpus_files.name([*held_out, *train])
    folder = out.parent
    _clear(folder)
    identity = artifact.identity(tokenizer_json)
    fields = plan.text_field, plan.id_field, plan.eval_fraction
    setup = Setup(folder, tokenizer_json, identity, card["separator_id"], card["vocab_size"], *fields)
    try:
        with (
            artifact.publish(folder / "quarantine.jsonl") as tmp,
            tmp.open("w", encoding="utf-8") as file,
            _workers(n_workers) as in_order,
        ):
            quarantine = Quarantine(file, [corpus_files.printable(f.path) for f in files])
            shards, encoder = _make_shards(setup, plan, files, len(held_out), in_order, quarantine)
            shards = _without_duplicates(setup, shards, in_order, quarantine)
    finally:
        shutil.rmtree(folder / shard_block.SPILL, ignore_errors=True)
    _check(shards, quarantine, folder / "quarantine.jsonl", plan, len(files))
    artifact.write_json(
        out,
        artifact.make_meta(
            "shards",
            {"tokenizer": identity},
            shards=shards,
            separator_id=setup.separator_id,
            vocab_size=setup.vocab_size,
            n_quarantined=quarantine.n_rows,
            encoder=encoder,
        ),
    )


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, so that no stale shard lies beside the new ones."""
    shutil.rmtree(folder / shard_block.SPILL, ignore_errors=True)
    (folder / shard_block.SPILL).mkdir(parents=True)
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
) -> tuple[list[Entry], str]:
    """Make all blocks; return the shards, training shards first, and the encoder: gigatoken, if it encoded every block."""
    progress = cli.Progress("read", corpus_files.n_bytes(files) / 1e6, "MB")
    made: list[Made] = []

    def run(split: Split, some: list[corpus_files.File]) -> None:
        parts = corpus_blocks.parts(
            some, plan.shard_bytes, plan.text_field, plan.id_field, plan.txt_documents
        )
        blocks = (
            Block(i, split, block) for i, block in enumerate(corpus_blocks.blocks(parts, plan.shard_bytes))
        )
        for result in in_order(partial(shard_block.make, setup), blocks):
            quarantine.add(result.bad)
            made.append(result._replace(bad=[]))
            progress.add(result.n_read / 1e6, f"{quarantine.n_rows} rows in quarantine")

    if n_held_out:
        run("eval", files[:n_held_out])
        np.save(
            setup.folder / shard_block.SPILL / shard_block.HELD_OUT,
            np.sort(np.concatenate([m.held_out for m in made])),
        )
    run("train" if n_held_out else "both", files[n_held_out:])

    slow = Counter(block.why_slow for block in made if block.why_slow)
    n_sampled = sum(block.n_sampled for block in made)
    cli.log.info(
        "gigatoken encoded %d of %d blocks, its ids compared on %d slices of text",
        len(made) - slow.total(),
        len(made),
        n_sampled,
    )
    for why, n in slow.items():
        cli.log.warning("tokenizers encoded %d blocks: %s", n, why)
    shards = sorted(
        (entry for block in made for entry in block.shards), key=lambda entry: entry["split"], reverse=True
    )
    return shards, "tokenizers" if slow else "gigatoken"


@contextmanager
def _workers(n_workers: int) -> Iterator[InOrder]:
    """A map over processes that hold a few items at a time; with one worker, the map of this process."""
    if n_workers == 1:
        yield map
        return
    # not fork: libraries that have started threads do not survive it
    with ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), _start_worker) as pool:
        try:
            yield lambda function, items: parallel.in_order(pool, function, items, n_workers)
        except BrokenProcessPool as error:
            raise ValueError(
                "shard: a worker was killed. Expected it to return its shard. If memory ran out, lower corpus.shard_bytes or --workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed run must leave no worker that waits for ever, or writes among the shards of the next run."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _without_duplicates(
    setup: Setup, shards: list[Entry], in_order: InOrder, quarantine: Quarantine
) -> list[Entry]:
    """Keep the first document of each id: move the others to the quarantine, and write the shards that had them again."""
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
    for (i, entries, firsts), dropped in zip(
        groups, in_order(partial(shard_block.drop, setup), work), strict=True
    ):
        kept[i] = dropped.entry
        for entry, earlier, name in zip(entries, firsts, dropped.ids, strict=True):
            reason = f"duplicate id: {name} is also the id of {quarantine.sources[earlier['file']]}:{earlier['line']}"
            quarantine.add([BadRow(int(entry["file"]), int(entry["line"]), reason)])
    return [entry for entry in kept if entry]


def _check(shards: list[Entry], quarantine: Quarantine, path: Path, plan: ShardPlan, n_files: int) -> None:
    """Say what came out; raise ValueError if that is not enough."""
    n = {
        split: sum(entry["n_documents"] for entry in shards if entry["split"] == split)
        for split in ("train", "eval")
    }
    n_documents = sum(n.values())
    n_rows = n_documents + quarantine.n_rows
    if not n_rows:
        raise ValueError(
            f"corpus.train: no rows in its {n_files} files. Expected documents. Correct corpus.train."
        )
    share = quarantine.n_rows / n_rows
    if share > plan.max_bad_share or not n_documents:
        raise ValueError(
            f"corpus: {quarantine.n_rows} of {n_rows} rows ({share:.2%}) cannot be used: {quarantine.summary()}. "
            f"Expected at most {plan.max_bad_share:.2%}. See {path}; mend the rows or change corpus.max_bad_share."
        )
    if quarantine.n_rows:
        cli.log.warning(
            "%d of %d rows (%.2f %%) are in %s: %s",
            quarantine.n_rows,
            n_rows,
            100 * share,
            path,
            quarantine.summary(),
        )
    if not n["eval"]:
        raise ValueError(
            f"corpus: none of the {n_documents} documents is held out. Expected some to measure on. "
            f"{'Add documents to corpus.eval' if plan.eval else 'Raise corpus.eval_fraction or set corpus.eval'}."
        )
    if not n["train"]:
        raise ValueError(
            f"corpus: none of the {n_documents} documents is left to train on. Expected some. "
            "Add documents to corpus.train or lower corpus.eval_fraction."
        )
    for split, what in (("train", "training"), ("eval", "held-out")):
        some = [entry for entry in shards if entry["split"] == split]
        n_tokens, n_bytes = (sum(entry[key] for entry in some) for key in ("n_tokens", "n_bytes"))
        cli.log.info(
            "%d %s documents, %d tokens, %.1f MB, in %d shards",
            n[split],
            what,
            n_tokens,
            n_bytes / 1e6,
            len(some),
        )


def main(argv: list[str] | None = None) -> None:
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
    args = p.parse_args(argv)
    cli.start_logging("shard", args.log)
    make(plans.shard(config.read(args.config)), args.tokenizer, args.out, args.workers, args.demo)


if __name__ == "__main__":
    cli.run(main)
