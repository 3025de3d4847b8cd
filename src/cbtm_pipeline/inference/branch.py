"""Find where an added expert belongs: the centre of its documents, and the expert that it begins as.

    python -m cbtm_pipeline.inference.branch --config results/added/law/config.json \\
        --shards results/added/law/shards/manifest.json --ensemble results/ensemble --seal 5a... \\
        --out results/added/law/branch.npz

The embedder and the centres are those of the ensemble. The parent is the expert to whose centre the documents
have the least mean squared distance. Its files are placed in parent/ beside, as an expert of a run.

Shapes: N documents of a shard, D dimensions, K experts, V terms.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline import config
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.clustering import regroup
from cbtm_pipeline.corpus import shard_files
from cbtm_pipeline.corpus.token_files import Documents
from cbtm_pipeline.embedding import tfidf
from cbtm_pipeline.inference import changed_set, package

KIND = "branch"
PARENT = "parent/model.safetensors"  # beside the record


class Sums(NamedTuple):
    """Sums over documents, each with the weight that it has in the balance of the clusters."""

    mass: float
    sum_D: np.ndarray
    squares: float  # sum of squared lengths
    counts_V: np.ndarray

    def centre(self) -> np.ndarray:
        """The mean of the vectors, as k-means takes it. Raises ValueError if no document has a vector."""
        if not self.squares:
            raise ValueError(
                "--corpus: no term that the ensemble's embedding knows. Expected text of the kind that its "
                "experts read. Give other documents."
            )
        return (self.sum_D / self.mass).astype(np.float32)

    def d2(self, centres_KD: np.ndarray) -> np.ndarray:
        """The mean squared distance of the documents to each centre, (K,)."""
        c_KD = centres_KD.astype(np.float64)
        return self.squares / self.mass - 2 * c_KD @ (self.sum_D / self.mass) + np.square(c_KD).sum(1)


def nothing(E_VD: np.ndarray) -> Sums:
    """The sums over no documents."""
    return Sums(0.0, np.zeros(E_VD.shape[1]), 0.0, np.zeros(len(E_VD), np.int64))


def add(sums: Sums, documents: Documents, E_VD: np.ndarray, balance: str) -> Sums:
    """The sums with these documents, too. `balance` is cluster.balance."""
    h_ND, w_N = tfidf.embed(documents, E_VD), regroup.weights(documents.n_tokens, balance)
    return Sums(
        sums.mass + float(w_N.sum()),
        sums.sum_D + w_N @ h_ND.astype(np.float64),
        sums.squares + float(w_N @ np.square(h_ND.astype(np.float64)).sum(1)),
        sums.counts_V + np.bincount(documents.values, minlength=len(E_VD)),
    )


def place_parent(found: changed_set.Set, name: str, out: Path) -> None:
    """Put an expert of the ensemble's folder, verified, where a training reads it. `out`: its weights."""
    source = found.folder / "experts" / name
    card, hashes = changed_set.read_card(source), {}
    for file in sorted(package.EXPERT_FILES, key=lambda file: file == out.name):  # the weights come last
        if (source / file).exists():
            package.check_file(found.folder, found.record, f"experts/{name}/{file}")
            if file == out.name:
                meta = artifact.make_meta("expert_files", {"expert": card["identity"]}, files=hashes)
                artifact.write_sealed(out.with_name("files.json"), meta)
            else:
                hashes[file] = found.record["files"][f"experts/{name}/{file}"]
            package.place(source / file, out.with_name(file), link=True)


def read(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Centre (D,), term counts (V,) and record of a branch. Raises ValueError if it is damaged."""
    arrays, meta = artifact.read_npz(path, KIND)
    return arrays["centre_D"], arrays["counts_V"], meta


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json of the new documents")
    p.add_argument("--ensemble", required=True, type=Path, help="folder of the ensemble that grows")
    p.add_argument("--seal", required=True, help="the seal of its record")
    p.add_argument("--out", required=True, type=Path, help="branch.npz; the parent goes into parent/ beside")
    args = p.parse_args()
    cli.start_logging("embed", args.log)

    found = changed_set.read(args.ensemble)
    if found.record["seal"] != args.seal:
        raise ValueError(
            f"{args.ensemble}: another ensemble than when this began. Expected {args.seal}. Add the expert "
            "under another name."
        )
    manifest, sums = artifact.read_sealed(args.shards, "shards"), nothing(found.embedding_VD)
    balance = config.read(args.config).cluster.balance
    for entry in shard_files.entries(args.shards, manifest, "train"):
        documents = shard_files.documents(args.shards.parent, entry)
        sums = add(sums, documents, found.embedding_VD, balance)
    centre_D, d2_K = sums.centre(), sums.d2(found.centres_KD)
    parent = found.names[int(d2_K.argmin())]
    place_parent(found, parent, args.out.parent / PARENT)
    about = {"parent": parent, "d2": dict(zip(found.names, d2_K.tolist(), strict=True))}
    origin = {"shards": manifest["identity_train"], "ensemble": args.seal}
    meta = artifact.make_meta(KIND, origin, **about)
    artifact.write_npz(args.out, meta, centre_D=centre_D, counts_V=sums.counts_V)
    shown = ", ".join(f"{name} {d2:.3f}" for name, d2 in about["d2"].items())
    cli.log.info("branches from expert %s (mean squared distances: %s)", parent, shown)


if __name__ == "__main__":
    cli.run(main)
