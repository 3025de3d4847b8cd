"""Train one expert more for a finished run, and write a new ensemble that has it. No other expert changes.

    cbtm add-expert law --corpus law/ --tag licence=cc-by
    cbtm add-expert law --corpus law/ --profile slurm

The expert begins as the one whose centre is nearest to the new documents, and is trained like every expert of
the run. All that is made lies in <outdir>/added/NAME. After whatever ends it, type the same command again. It
is also `python -m cbtm_pipeline.add_expert`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_pipeline import config, plan
from cbtm_pipeline.base import artifact, cli, printable
from cbtm_pipeline.corpus import content, shard_files
from cbtm_pipeline.inference import changed_set, package
from cbtm_pipeline.ops import snakemake_run, which_run, worded
from cbtm_pipeline.provenance import expert_files

SNAKEFILE = "added.smk"  # in workflow/
CORPUS = ("text_field", "id_field", "txt_documents", "eval_fraction", "max_bad_share")  # keys with an option


def configured(
    cfg: config.Config, args: argparse.Namespace, tags: Mapping[str, str], folder: Path
) -> config.Config:
    """The config of the training: that of the run with the new documents, and what the options say."""
    values = config.of_new_text(cfg, [str(Path(path).absolute()) for path in args.corpus])
    given = {key: getattr(args, key) for key in CORPUS if getattr(args, key) is not None}
    values["corpus"] |= given | ({"id_field": None} if args.id_field == "null" else {})
    values["train"] |= {"steps": args.steps} if args.steps is not None else {}
    if isinstance(cfg.train.lr, list):
        choice = artifact.read_sealed(Path(cfg.outdir) / "search/experts.json", "choice")
        values["train"]["lr"] = choice["chosen"]
    return config.validate({**values, "outdir": str(folder), "tags": dict(tags)})


def request(
    cfg: config.Config, found: changed_set.Set, args: argparse.Namespace, tags: Mapping[str, str]
) -> dict[str, Any]:
    """What is asked for. Raises ValueError for a corpus that cannot be read."""
    outdir = Path(cfg.outdir)
    about = {
        "expert": args.name,
        "tokenizer": str(args.run / "tokenizer/tokenizer.json"),
        "ensemble": str(found.folder),
        "ensemble_seal": found.record["seal"],
        "config": cfg.model_dump(exclude={"outdir", "run", "corpus", "tags"}),
        "corpus": cfg.corpus.model_dump(exclude={"train", "eval"}),
        "tags": dict(tags),
    }
    # until the folder is this command's own, nothing is written there
    corpus = content.of_corpus(cfg.corpus.train, None, None, outdir / content.SEEN, remember=False)
    return artifact.make_meta(
        snakemake_run.KIND, {"corpus": corpus, "ensemble": found.record["seal"]}, **about
    )


def is_made(out: Path, folder: Path, name: str, asked: Mapping[str, Any]) -> bool:
    """Whether the ensemble at `out` is what is asked for: this command has come to its end before."""
    if not (out / package.FILES).is_file() or not snakemake_run.is_asked(folder, dict(asked)):
        return False
    last = package.read_record(out).get("changes", [{}])[-1]
    tags = artifact.read_json(out / package.CONFIG).get("tags", {}).get(name, {})
    weights = folder / "experts" / name / expert_files.WEIGHTS
    card = artifact.read_sealed(weights.with_name(changed_set.CARD), "expert") if weights.exists() else {}
    expected = {"what": "added", "expert": name, "from": asked["ensemble_seal"]}
    return {**expected, "identity": card.get("identity")}.items() <= last.items() and tags == asked["tags"]


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
    weights = folder / "experts" / name / expert_files.WEIGHTS
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
    how = p.add_argument_group("how the documents are read; default: as those of the run")
    how.add_argument("--text-field", metavar="KEY", help="where rows of .jsonl and .parquet have the text")
    how.add_argument("--id-field", metavar="KEY", help="where they have their id; null: by file and row")
    how.add_argument("--txt-documents", choices=["file", "block"], help="what is a document in .txt")
    how.add_argument("--eval-fraction", type=float, metavar="SHARE", help="of the documents to hold out")
    how.add_argument(
        "--max-bad-share", type=float, metavar="SHARE", help="of rows that may be of no use; more end it"
    )
    about = "a tag of the new expert, such as licence=cc-by; may be given again"
    p.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE", help=about)
    p.add_argument("--steps", type=int, metavar="N", help="optimiser steps; default: train.steps of the run")
    snakemake_run.add_options(p, "cores of this machine; without a profile, the default is 2")
    return p.parse_args()


def main() -> None:
    args = parse()
    args.run = which_run.named(args)
    base, out = args.base or args.run / "ensemble", args.out or args.run / f"ensemble-{args.name}"
    if not args.corpus:
        raise ValueError("--corpus: no file. Expected the documents of the new expert. Name them.")
    tags, (cfg, found) = changed_set.read_tags(args.tag), changed_set.of_run(args.run, base)
    changed_set.check_new_name(args.name, [*found.names, *plan.trained(cfg)])
    folder = args.run / "added" / args.name
    with worded.worded("--corpus"):
        cfg = configured(cfg, args, tags, folder)
        asked = request(cfg, found, args, tags)
    if is_made(out, folder, args.name, asked):
        return printable.show(f"{out}: already made, with {args.name}", end="\n")
    snakemake_run.check_begun(folder, asked)
    package.check_new(out, base)
    with snakemake_run.begun(folder, asked, cfg, args.dry_run):
        snakemake_run.run(SNAKEFILE, folder, args, "a trained expert")
        if not args.dry_run:
            snakemake_run.check_kept(folder, asked)
            parent = pack(found, folder, args.name, tags, out)
            n = len(found.names) + 1
            printable.show(f"{out}: {n} experts, {args.name} began as {parent}", end="\n")


if __name__ == "__main__":
    cli.run(main)
