"""Held-out text as it was scored: every expert's log-probabilities and the distances, checked to belong together.

Shapes: N held-out tokens, D documents, K cluster experts.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import make_again

LOWEST = -700.0  # nats; exp of more than this is no longer a number, and no trained model comes near


class Scored(NamedTuple):
    """`logprob[expert]` (N,) float32; `d2_NK`; document i is rows `offsets[i]` to `offsets[i + 1]`; the rest has one entry per document."""

    logprob: dict[str, np.ndarray]
    d2_NK: np.ndarray
    offsets: np.ndarray
    n_bytes_D: np.ndarray
    cluster_D: np.ndarray
    doc_id_D: np.ndarray

    @property
    def n_tokens_D(self) -> np.ndarray:
        return np.diff(self.offsets)

    def experts(self, names: Iterable[str]) -> np.ndarray:
        """Log-probabilities under these experts, (N, n_names) float32."""
        return np.stack([self.logprob[name] for name in names], axis=1)

    def take(self, documents: np.ndarray) -> "Scored":
        """The documents with these indices, in that order."""
        n_tokens = self.n_tokens_D[documents]
        offsets = np.concatenate([[0], np.cumsum(n_tokens)])
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][documents] - offsets[:-1], n_tokens)
        return Scored(
            {expert: logprob_N[rows] for expert, logprob_N in self.logprob.items()},
            self.d2_NK[rows],
            offsets,
            self.n_bytes_D[documents],
            self.cluster_D[documents],
            self.doc_id_D[documents],
        )


class Expected(NamedTuple):
    """What the config says of a run: ids of all that is trained, the number of clusters, the plans of two rules."""

    outdir: str
    experts: list[str]
    k: int
    route: dict[str, Any]  # plan.route(...).content()
    score_expert: dict[str, Any]


def read(
    expected: Expected, distances: Path, scores: Iterable[Path], cards: Iterable[Path]
) -> tuple[Scored, dict[str, dict[str, Any]], dict[str, str]]:
    """Return what was scored, the card of every expert, and `made_from`. Who is who is read inside the files, never from their order.

    Raises ValueError when a file of the expected run is missing, is there twice, or was made from something else.
    """
    arrays, meta = artifact.read_npz(distances, "distances")
    names = expected.experts
    card_files = {path: artifact.read_json(path, "expert") for path in cards}
    score_files = {path: artifact.read_npz(path, "scores") for path in scores}
    cards_by_name = _by_expert(card_files, names, f"{expected.outdir}/experts/{{}}/card.json")
    scores_by_name = _by_expert(
        {path: file[1] for path, file in score_files.items()}, names, f"{expected.outdir}/scores/{{}}.npz"
    )

    _check_plan(distances, meta, expected.route)
    seed = cards_by_name["seed"][1]["weights"]
    origins: dict[str, str] = {}
    logprob, made_from = {}, {"distances": artifact.identity(distances)}
    for name in names:
        card_path, card = cards_by_name[name]
        if name != "seed":
            artifact.check_made_from(card_path, card, "seed", seed)
        for origin in {"assignments", "random"} & card[
            "made_from"
        ].keys():  # all experts on the same clusters
            artifact.check_made_from(
                card_path, card, origin, origins.setdefault(origin, card["made_from"][origin])
            )
        path, score_meta = scores_by_name[name]
        artifact.check_made_from(path, score_meta, "expert", card["weights"])
        artifact.check_made_from(path, score_meta, "shards", meta["made_from"]["shards"])
        _check_plan(path, score_meta, expected.score_expert)
        logprob[name] = score_files[path][0]["logprob_N"]
        made_from[f"scores-{name}"] = artifact.identity(path)
        _check_logprob(path, logprob[name], len(arrays["d2_NK"]))

    n_clusters = arrays["d2_NK"].shape[1]
    if n_clusters != expected.k:
        raise ValueError(
            f"{distances}: {n_clusters} clusters. Expected cluster.k, {expected.k}. {make_again(distances)}"
        )
    scored = Scored(
        logprob, arrays["d2_NK"], arrays["offsets"], arrays["n_bytes"], arrays["cluster"], arrays["doc_id"]
    )
    return scored, {name: card for name, (_, card) in cards_by_name.items()}, made_from


def _by_expert(
    metas: dict[Path, dict[str, Any]], names: list[str], where: str
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Path and meta of every expert in `names`, each of which must be there once; `where` is where a missing one would lie."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path, meta in metas.items():
        name = meta.get("expert")
        if name not in names:
            raise ValueError(
                f"{path}: expert {name}. Expected one of {', '.join(names)}. Leave it out, or use the config of its run."
            )
        if name in found:
            raise ValueError(
                f"{path}: expert {name} again, as in {found[name][0]}. Expected every expert once. Leave one out."
            )
        found[name] = path, meta
    for name in names:
        if name not in found:
            path = where.format(name)
            raise ValueError(
                f"{path}: not given. Expected one file each for {', '.join(names)}. Make it: snakemake --cores 2 {path}"
            )
    return found


def _check_plan(path: Path, meta: dict[str, Any], plan: dict[str, Any]) -> None:
    for key, expected in plan.items():
        if meta.get(key) != expected:
            raise ValueError(
                f"{path}: made with {key} {meta.get(key)}. Expected {expected}, as in the config. {make_again(path)}"
            )


def _check_logprob(path: Path, logprob_N: np.ndarray, n_tokens: int) -> None:
    if len(logprob_N) != n_tokens:
        raise ValueError(
            f"{path}: {len(logprob_N)} tokens. Expected {n_tokens}, as in the distances. {make_again(path)}"
        )
    if not logprob_N.min() >= LOWEST:  # also true of NaN
        raise ValueError(
            f"{path}: log-probabilities down to {logprob_N.min():.3g}. Expected numbers above {LOWEST:.0f}. "
            "The training of this expert diverged: lower train.lr or train.clip_norm."
        )
