"""Train one expert more for a finished run, and write a new ensemble that has it. No other expert changes.

    cbtm add-expert law --corpus law/ --tag licence=cc-by
    cbtm add-expert law --corpus law/ --profile slurm

The expert begins as the one whose centre is nearest to the new documents, and is trained like every expert of
the run. All that is made lies in <outdir>/added/NAME. After whatever ends it, type the same command again. It
is also `python -m cbtm_pipeline.add_expert`.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline import config, plan
from cbtm_pipeline.base import artifact, cli, printable
from cbtm_pipeline.corpus import content, encoding, shard_files
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.inference import changed_set, package
from cbtm_pipeline.ops import which_run
from cbtm_pipeline.provenance import expert_files

REQUEST = "request.json"
KIND = "request"
SNAKEFILE = Path("workflow/added.smk")
PLACES = {"tokenizer", "ensemble"}  # entries of a request that say where something lies, not what it is


def read_run(outdir: Path, base: Path) -> tuple[config.Config, changed_set.Set]:
    """The config of a run, and the set of experts that grows. Raises ValueError if they do not belong
    together.
    """
    path = outdir / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Expected that of a finished run. Name its --outdir.")
    cfg, found = config.read(path), changed_set.read(base)
    tokenizer = encoding.read_card(outdir / "tokenizer/tokenizer.json")
    if tokenizer["identity"] != changed_set.tokenizer_of(found):
        raise ValueError(
            f"{base}: another tokenizer than that of {outdir}. Expected an ensemble of this run. Name its "
            "--outdir."
        )
    return cfg, found


def request(cfg: config.Config, found: changed_set.Set, args: argparse.Namespace) -> dict[str, Any]:
    """What is asked for. Raises ValueError for a corpus that cannot be read."""
    outdir = Path(cfg.outdir)
    about = {
        "expert": args.name,
        "tokenizer": str(args.run / "tokenizer/tokenizer.json"),
        "ensemble": str(found.folder),
        "ensemble_seal": found.record["seal"],
        "config": cfg.model_dump(exclude={"outdir", "run", "corpus", "tags"}),
        "corpus": cfg.corpus.model_dump(exclude={"train", "eval"}),
    }
    corpus = content.of_corpus(cfg.corpus.train, None, None, outdir / content.SEEN)
    return artifact.make_meta(KIND, {"corpus": corpus, "ensemble": found.record["seal"]}, **about)


def keep(folder: Path, asked: dict[str, Any], cfg: config.Config) -> None:
    """Write request and config. Raises ValueError if another expert of this name has been begun."""
    path = folder / REQUEST
    if path.exists() and (folder / "shards/manifest.json").exists():
        before = artifact.read_sealed(path, KIND)
        names = [name for name in asked if name not in PLACES and before.get(name) != asked[name]]
        if names:
            raise ValueError(
                f"{folder}: was begun with another {', '.join(names)}. Expected the same command. Choose "
                "another name, or remove the folder."
            )
    artifact.write_sealed(path, asked)
    config.write(cfg, folder / "config.json")
    content.write_planned(corpus_files.find(cfg.corpus.train, None), folder / content.PLANNED)


def command(folder: Path, args: argparse.Namespace) -> list[str]:
    """The command line of Snakemake."""
    snakefile = SNAKEFILE if SNAKEFILE.exists() else Path(__file__).parents[2] / SNAKEFILE
    if not snakefile.exists():
        raise ValueError(f"{SNAKEFILE}: no such file. Expected that of the project. Run this in its root.")
    words = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile)]
    words += ["--profile", args.profile] if args.profile else ["--cores", str(args.cores)]
    words += ["--dry-run"] if args.dry_run else []
    return [*words, "--configfile", str(folder / "config.json")]


def run(words: list[str]) -> int:
    """Run a command to its end, and return its status. Signals are for it: it cancels its jobs first."""
    process = subprocess.Popen(words)
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),  # a terminal sends it to both
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.terminate()),
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def some_texts(shards: Path) -> list[str]:
    """The training texts of the first shard."""
    manifest = artifact.read_sealed(shards, "shards")
    first = shard_files.entries(shards, manifest, "train")[0]
    return shard_files.attributes(shards.parent, first, ["text"])["text"].to_pylist()


def pack(found: changed_set.Set, folder: Path, name: str, tags: dict[str, str], out: Path) -> str:
    """Write the new ensemble. Returns the name of the parent."""
    from cbtm_pipeline.inference import branch  # it imports torch

    centre_D, counts_V, record = branch.read(folder / "branch.npz")
    if record["made_from"]["ensemble"] != found.record["seal"]:
        raise ValueError(
            f"{found.folder}: has changed meanwhile. Expected the ensemble that this began with. Add the "
            "expert under another name."
        )
    weights = folder / "experts" / name / changed_set.WEIGHTS
    card = expert_files.read_card(weights)
    texts = some_texts(folder / "shards/manifest.json")
    terms = changed_set.top_terms(found.folder / "tokenizer.json", found, counts_V, centre_D, texts)
    more = found._replace(
        names=[*found.names, name],
        centres_KD=np.concatenate([found.centres_KD, centre_D[None]]),
        terms=[*found.terms, terms],
        tags={**found.tags, **({name: tags} if tags else {})},
    )
    about = {"what": "added", "expert": name, "identity": card["identity"], "parent": record["parent"]}
    sentence = f"expert {name} was added. It began as expert {record['parent']}."
    changed_set.write(more, changed_set.Change(sentence, about, (name, weights.parent)), out)
    return record["parent"]


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", metavar="NAME", help="the name of the new expert")
    p.add_argument("--corpus", nargs="*", default=[], metavar="FILE", help="new documents, as corpus.train")
    which_run.add_options(p)
    p.add_argument("--from", dest="base", type=Path, metavar="DIR", help="ensemble; default: the run's own")
    p.add_argument("--out", type=Path, metavar="DIR", help="new ensemble; default: <outdir>/ensemble-NAME")
    about = "a tag of the new expert, such as licence=cc-by; may be given again"
    p.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE", help=about)
    p.add_argument("--steps", type=int, metavar="N", help="optimiser steps; default: train.steps of the run")
    p.add_argument("--profile", help="of Snakemake, such as slurm: each job runs where it says")
    p.add_argument("--cores", type=int, default=2, help="without a profile: cores of this machine (2)")
    p.add_argument("--dry-run", "-n", action="store_true", help="show the jobs and run nothing")
    return p.parse_args()


def main() -> None:
    args = parse()
    args.run = which_run.named(args)
    base, out = args.base or args.run / "ensemble", args.out or args.run / f"ensemble-{args.name}"
    if not args.corpus:
        raise ValueError("--corpus: no file. Expected the documents of the new expert. Name them.")
    tags, (cfg, found) = changed_set.read_tags(args.tag), read_run(args.run, base)
    changed_set.check_new_name(args.name, [*found.names, *plan.trained(cfg)])
    package.check_new(out, base)
    folder = args.run / "added" / args.name
    values = cfg.model_dump()
    values["corpus"] |= {"train": [str(Path(path).absolute()) for path in args.corpus], "eval": None}
    values["train"] |= {"steps": args.steps} if args.steps is not None else {}
    cfg = config.validate({**values, "outdir": str(folder), "tags": tags})
    keep(folder, request(cfg, found, args), cfg)
    if status := run(command(folder, args)):
        raise ValueError(
            f"snakemake: ended with status {status}. Expected a trained expert. See {folder}/logs, then "
            "type the same command again."
        )
    if not args.dry_run:
        parent = pack(found, folder, args.name, tags, out)
        n = len(found.names) + 1
        printable.show(f"{out}: {n} experts, {args.name} began as {parent}", end="\n")


if __name__ == "__main__":
    cli.run(main)
