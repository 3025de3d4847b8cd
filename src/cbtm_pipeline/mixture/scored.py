"""Held-out text as it was scored: the log-probabilities of every expert, and the distances to the centres.

Shapes: N held-out tokens, D documents, K cluster experts.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import make, make_again, output_of, run_again

LOWEST = -700.0  # nats; below it the perplexity could overflow, and no trained model comes near it


class Scored(NamedTuple):
    """Scored held-out documents. Document i is rows `offsets[i]` to `offsets[i + 1]`."""

    logprob: dict[str, np.ndarray]  # by expert, (N,) float32
    d2_NK: np.ndarray
    offsets: np.ndarray
    n_bytes_D: np.ndarray
    cluster_D: np.ndarray
    doc_id_D: np.ndarray

    @property
    def n_tokens_D(self) -> np.ndarray:
        return np.diff(self.offsets)

    def experts(self, names: Iterable[str]) -> np.ndarray:
        """Log-probabilities under these experts, (N, number of names) float32."""
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


Meta = dict[str, Any]  # the meta record of a file


class Expected(NamedTuple):
    """What the config says about the run."""

    outdir: str
    experts: list[str]  # ids of everything that is scored, the seed included
    begins: Mapping[str, str]  # the model that each training began as, by id; parents are among them
    k: int  # number of clusters
    route: Meta  # the plan of rule route, as plan.route(...).content() gives it
    score_expert: Meta  # likewise of rule score_expert


class Found(NamedTuple):
    """The scored documents, and the records of the files. Cards and scores are by expert."""

    scored: Scored
    cards: dict[str, Meta]
    distances: Meta
    scores: dict[str, Meta]


def read(expected: Expected, distances: Path, scores: Iterable[Path], cards: Iterable[Path]) -> Found:
    """Read the scored documents, and the record of every file.

    Each file names its expert, so the order of the files does not matter. Raises ValueError when a file of
    the expected run is missing, is there twice, or was made from something else.
    """
    arrays, meta = artifact.read_npz(distances, "distances")
    _check_plan(distances, meta, expected.route)
    cards_by_name = _read_cards(expected, cards)

    score_files = {path: artifact.read_npz(path, "scores") for path in scores}
    score_metas = {path: score_meta for path, (_, score_meta) in score_files.items()}
    scores_by_name = _by_expert(score_metas, expected.experts, f"{expected.outdir}/scores/{{}}.npz")
    logprob = {}
    for name in expected.experts:
        path, score_meta = scores_by_name[name]
        artifact.check_made_from(path, score_meta, "expert", cards_by_name[name]["identity"])
        artifact.check_made_from(path, score_meta, "held_out", meta["made_from"]["held_out"])
        _check_plan(path, score_meta, expected.score_expert)
        logprob[name] = score_files[path][0]["logprob_N"]
        _check_logprob(path, logprob[name], len(arrays["d2_NK"]))

    n_clusters = arrays["d2_NK"].shape[1]
    if n_clusters != expected.k:
        raise ValueError(
            f"{distances}: {n_clusters} clusters. Expected cluster.k, {expected.k}. {run_again(distances)}"
        )
    scored = Scored(
        logprob, arrays["d2_NK"], arrays["offsets"], arrays["n_bytes"], arrays["cluster"], arrays["doc_id"]
    )
    return Found(scored, cards_by_name, meta, {name: scores_by_name[name][1] for name in expected.experts})


def _read_cards(expected: Expected, paths: Iterable[Path]) -> dict[str, Meta]:
    """The cards of all that was trained. Each must have begun as the model that it should begin as."""
    metas = {path: artifact.read_sealed(path, "expert") for path in paths}
    names = list(dict.fromkeys([*expected.experts, *expected.begins]))
    found = _by_expert(metas, names, f"{expected.outdir}/experts/{{}}/card.json")
    for name, first in expected.begins.items():
        path, card = found[name]
        artifact.check_made_from(path, card, "seed", found[first][1]["identity"])
    return {name: card for name, (_, card) in found.items()}


def _by_expert(metas: dict[Path, Meta], names: list[str], template: str) -> dict[str, tuple[Path, Meta]]:
    """Path and meta record of each expert in `names`. Each must be there exactly once.

    `template` gives the path of a missing file: `results/scores/{}.npz`.
    """
    found: dict[str, tuple[Path, Meta]] = {}
    for path, meta in metas.items():
        name = meta.get("expert")
        if name not in names:
            raise ValueError(
                f"{path}: expert {name}. Expected one of {', '.join(names)}. "
                "Leave it out, or use the config of its run."
            )
        if name in found:
            raise ValueError(
                f"{path}: expert {name} again, as in {found[name][0]}. Expected every expert once. "
                "Leave one out."
            )
        found[name] = path, meta
    for name in names:
        if name not in found:
            path = template.format(name)
            raise ValueError(
                f"{path}: not given. Expected one file each for {', '.join(names)}. "
                f"Make it: {make(output_of(path))}"
            )
    return found


def _check_plan(path: Path, meta: Meta, plan: Meta) -> None:
    for key, expected in plan.items():
        if (found := meta["made_with"].get(key)) != expected:
            raise ValueError(
                f"{path}: made with {key} {found}. Expected {expected}, as in the config. {run_again(path)}"
            )


def _check_logprob(path: Path, logprob_N: np.ndarray, n_tokens: int) -> None:
    if len(logprob_N) != n_tokens:
        raise ValueError(
            f"{path}: {len(logprob_N)} tokens. Expected {n_tokens}, as in the distances. {make_again(path)}"
        )
    if not logprob_N.min() >= LOWEST:  # NaN fails this comparison, too
        raise ValueError(
            f"{path}: log-probabilities down to {logprob_N.min():.3g}. Expected numbers above {LOWEST:.0f}. "
            "The training of this expert diverged: lower train.lr or train.clip_norm."
        )
