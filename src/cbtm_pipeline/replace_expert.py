"""Write an ensemble in which another model stands for one expert. No other expert changes.

    cbtm replace-expert NAME --with FOLDER --from DIR --out DIR

The model must have the tokenizer and the vocabulary of the ensemble. Its centre is that of the expert before,
or with --corpus the mean of these documents' vectors. It is also `python -m cbtm_pipeline.replace_expert`.
"""

import argparse
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbtm_pipeline.base import artifact, cli, printable
from cbtm_pipeline.corpus import blocks, encoding, rows, token_files
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.inference import changed_set, package

if TYPE_CHECKING:
    from cbtm_pipeline.inference import branch

PART_BYTES = 1 << 24
MAX_HEADER = 1 << 27  # bytes
N_DOCUMENTS = 1024  # that are embedded at once


def check(folder: Path, found: changed_set.Set) -> dict[str, Any]:
    """The card of the expert in a folder. Raises ValueError unless it fits into the set.

    A model that was not trained by a run gets the card that is written later.
    """
    for name in (package.CONFIG, changed_set.WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: no {name}. Expected the folder of an expert. Give another, or save the model "
                "in one file."
            )
    card = changed_set.read_card(folder)
    if card:
        artifact.check_file(folder / changed_set.WEIGHTS, card["weights"], "Remove card.json if it is new.")
    own, expected = folder / "tokenizer.json", changed_set.tokenizer_of(found)
    tokenizer = artifact.identity(own) if own.exists() else card.get("made_from", {}).get("tokenizer")
    if tokenizer != expected:
        raise ValueError(
            f"{folder}: {'another' if tokenizer else 'no'} tokenizer. Expected that of {found.folder}. Give "
            "an expert that was trained with it."
        )
    sizes = [
        artifact.read_json(path / package.CONFIG).get("vocab_size")
        for path in (folder, found.folder / "experts" / found.names[0])
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{folder}: a vocabulary of {sizes[0]} tokens. Expected {sizes[1]}, as the other experts have. "
            "Give another expert."
        )
    return card or new_card(folder, tokenizer)


def new_card(folder: Path, tokenizer: str) -> dict[str, Any]:
    """The card of a model that has none: what its files say."""
    weights, config = folder / changed_set.WEIGHTS, artifact.read_json(folder / package.CONFIG)
    about = {"expert": folder.name, "weights": artifact.identity(weights), "n_parameters": _size(weights)}
    about["identity"] = artifact.fingerprint([about["weights"], artifact.identity(folder / package.CONFIG)])
    context = config.get("max_position_embeddings") or config.get("n_positions")
    made_with = {"seq_len": context} if context else {}
    return artifact.make_meta("expert", {"tokenizer": tokenizer}, made_with, **about)


def _size(weights: Path) -> int:
    """The number of parameters in a safetensors file, by its header. Raises ValueError if it is none."""
    with weights.open("rb") as file:
        try:
            (n_bytes,) = struct.unpack("<Q", file.read(8))
            header = dict(json.loads(file.read(n_bytes if n_bytes < MAX_HEADER else 0)))
            shapes = [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
        except (struct.error, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{weights}: damaged. Expected safetensors. Save the model again.") from error
    return sum(math.prod(shape) for shape in shapes)


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

    parts = blocks.parts(
        corpus_files.name(corpus_files.input_files(paths)), PART_BYTES, args.text_field, "id", "file"
    )
    for part in parts:
        for row in rows.read(part, args.text_field, "id"):
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
    row, card = found.row(args.name), check(args.new, found)
    centres_KD, terms = found.centres_KD.copy(), list(found.terms)
    if args.corpus:
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
