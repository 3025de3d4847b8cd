"""Write an ensemble in which another model stands for one expert. No other expert changes.

    cbtm replace-expert NAME --with FOLDER --from DIR --out DIR

The model must have the tokenizer and the vocabulary of the ensemble, and at least its context. It is loaded
once, so that one that cannot run is refused. Its centre is that of the expert before, or with --corpus the
mean of these documents' vectors. It is also `python -m cbtm_pipeline.replace_expert`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cbtm_pipeline.base import cli, printable
from cbtm_pipeline.corpus import blocks, encoding, rows, token_files
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus.records import Fields
from cbtm_pipeline.inference import changed_set, fitting, package
from cbtm_pipeline.ops import worded

if TYPE_CHECKING:
    from cbtm_pipeline.inference import branch

PART_BYTES = 1 << 24
N_DOCUMENTS = 1024  # that are embedded at once


def read_documents(
    paths: Sequence[str], found: changed_set.Set, args: argparse.Namespace
) -> tuple["branch.Sums", list[str]]:
    """The sums over the documents of some files, and the first texts. Raises ValueError if there is none."""
    from cbtm_pipeline.inference import branch  # imports torch

    encoder = encoding.TokenEncoder(found.folder / "tokenizer.json")
    separator, sums = found.config["bos_token_id"], branch.nothing(found.embedding_VD)
    waiting: list[np.ndarray] = []
    texts: list[str] = []

    def embed() -> None:
        nonlocal sums
        offsets = np.cumsum([0, *map(len, waiting)]).astype(np.int64)
        documents = token_files.Documents(np.concatenate(waiting).astype(np.uint32), offsets)
        sums = branch.add(sums, documents, found.embedding_VD, "documents")
        waiting.clear()

    fields = Fields(args.text_field, "id")
    parts = blocks.parts(corpus_files.name(corpus_files.input_files(paths)), PART_BYTES, fields, "file")
    for part in parts:
        for row in rows.read(part, fields):
            if isinstance(row, rows.Document):
                ids = encoder.encode(row.text, fast=not encoder.why_slow)
                if len(texts) < N_DOCUMENTS:
                    texts.append(row.text.decode())
                waiting.append(np.concatenate([[separator], ids]))
                if len(waiting) == N_DOCUMENTS:
                    embed()
    if waiting:
        embed()
    if not sums.mass:
        raise ValueError(f"{paths[0]}: no document. Expected text. Check --text-field.")
    return sums, texts


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", metavar="NAME", help="the expert that is replaced")
    p.add_argument(
        "--with", dest="new", required=True, type=Path, metavar="FOLDER", help="folder of the new expert"
    )
    p.add_argument(
        "--from", dest="base", required=True, type=Path, metavar="DIR", help="folder of an ensemble"
    )
    p.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="a folder that does not exist or is empty"
    )
    p.add_argument(
        "--corpus", nargs="+", metavar="FILE", help="what it was trained on: moves its centre there"
    )
    p.add_argument("--text-field", default="text", help="where rows of .jsonl and .parquet have the text")
    about = "a tag of the new expert; the old ones go; may be given again"
    p.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE", help=about)
    args = p.parse_args()
    package.check_new(args.out, args.base)
    tags, found = changed_set.read_tags(args.tag), changed_set.read(args.base)
    row, card = found.row(args.name), fitting.check(args.new, found)
    centres_KD, terms = found.centres_KD.copy(), list(found.terms)
    if args.corpus:
        with worded.worded("--corpus"):
            sums, texts = read_documents(args.corpus, found, args)
        centres_KD[row] = sums.centre()
        path = found.folder / "tokenizer.json"
        terms[row] = changed_set.top_terms(path, found, sums.counts_V, centres_KD[row], texts)
    other = found._replace(
        centres_KD=centres_KD, terms=terms, tags={**found.tags, **({args.name: tags} if tags else {})}
    )
    about = {
        "what": "replaced",
        "expert": args.name,
        "identity": card["identity"],
        "moved": bool(args.corpus),
    }
    change = changed_set.Change(f"expert {args.name} was replaced.", about, (args.name, args.new))
    changed_set.write(other, change, args.out, card)
    printable.show(f"{args.out}: {len(other.names)} experts, with another {args.name}", end="\n")


if __name__ == "__main__":
    cli.run(main)
