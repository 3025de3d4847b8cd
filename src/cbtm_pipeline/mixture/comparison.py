"""Finished runs side by side: what differs in their settings, their models, and which settings do best.

`cbtm compare` and the last rule of a study make the same content here, from any set of models that the
metrics of the runs have.

Shapes: D held-out documents.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline.corpus.heldout import MIN_REPORTED
from cbtm_pipeline.mixture import bootstrap, verdict

Content = dict[str, Any]  # of study.json
Row = dict[str, Any]
K, SEED, CONTROLS = "cluster.k", "seed", "train.controls"
TOP_K = "route.top_k"
MIN_SEEDS = 3  # below, no interval over seeds
BUDGET = ("train.steps", "train.batch_size", "train.seq_len")  # keys that decide the tokens of training
ALL_PAIRS = 4  # up to so many runs, each is compared with each; more are compared with the best
MODEL_KEYS = ("system", "router", "k", "top_k", "n_active", "passes", "perplexity", "bits_per_byte")


class Documents(NamedTuple):
    """The held-out documents of a run, (D,) each: which are reported, and the nll under each model, nats."""

    doc_id_D: np.ndarray
    is_reported_D: np.ndarray
    n_tokens_D: np.ndarray
    n_bytes_D: np.ndarray
    nll_D: Mapping[str, np.ndarray]  # of `ensemble`, which is the headline, and of each model


class Finished(NamedTuple):
    """A finished run."""

    name: str
    folder: Path
    settings: dict[str, Any]  # by config key, such as `cluster.k`
    metrics: dict[str, Any]
    n_tokens: int  # that all experts and their parents were trained on, without the seed
    n_parameters: dict[str, int]  # of each model
    held_out: str  # identity of the held-out documents, as tokens
    text: str  # the same, as text
    tokenizer: str
    documents: Documents


def check_comparable(runs: Sequence[Finished]) -> bool:
    """Whether the runs have the same tokenizer, and so comparable perplexities. Else bits per byte compare.

    Raises ValueError for a run whose numbers are of other text than those of the first.
    """
    first, *others = runs
    for run in others:
        where = f"{run.folder}: cannot be compared with {first.folder}"
        if run.held_out != first.held_out and run.text != first.text:
            raise ValueError(
                f"{where}: other held-out text. Expected the same documents. Give both runs the same "
                "corpus.eval, and run them again."
            )
        if not _same_parts(run.documents, first.documents):
            raise ValueError(
                f"{where}: other parts of the held-out documents were scored. Expected the same parts. Give "
                "both runs the same eval.max_document_tokens (null if their tokenizers differ), and run them "
                "again."
            )
    return all(run.tokenizer == first.tokenizer for run in others)


def _same_parts(a: Documents, b: Documents) -> bool:
    """Whether the same bytes of the same documents were scored."""
    sizes = [dict(zip(x.doc_id_D.tolist(), x.n_bytes_D.tolist(), strict=True)) for x in (a, b)]
    return sizes[0] == sizes[1]


def compare(runs: Sequence[Finished]) -> Content:
    """The content of study.json, without its record. Raises ValueError for runs that cannot be compared.

    `unit` says which figure compares runs: `perplexity`, or `bits_per_byte` where tokenizers differ.
    """
    unit = "perplexity" if check_comparable(runs) else "bits_per_byte"
    fewest = min(run.metrics["k"] for run in runs)
    keys = differing([{**run.settings, TOP_K: _tried(run, fewest)} for run in runs])
    rows = [_run(run, keys) for run in runs]
    groups = _groups(rows)
    return {
        "unit": unit,
        "differs": keys,
        "runs": rows,
        "groups": groups,
        "best_k": _best_k(groups, unit),
        "pairs": _pairs(runs, rows, unit),
    }


def _tried(run: Finished, fewest: int) -> list[Any]:
    """The sizes of active sets that were tried, below the fewest experts of all runs.

    So a list with `all`, which is another number for each k, is the same list.
    """
    return [size for size in run.settings.get(TOP_K, []) if size < fewest]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same everywhere, in the order of the config."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if any(s.get(key) != settings[0].get(key) for s in settings)]


def _run(run: Finished, keys: Iterable[str]) -> Row:
    """A run with its headline beside the strongest dense model, all its main models, and the routers' pairs.

    `labels` has the agreement of clusters and labels, where documents have labels.
    """
    metrics = run.metrics
    best, strongest = verdict.headline(metrics), verdict.strongest_dense(metrics)
    models = [_model(row, strongest, run.n_parameters) for row in verdict.main_rows(metrics)]
    headline = models[[row is best for row in verdict.main_rows(metrics)].index(True)]
    return {
        "run": run.name,
        "setting": {key: run.settings.get(key) for key in keys},
        "k": metrics["k"],
        "n_tokens": run.n_tokens,
        "n_documents": metrics["n_documents"],
        "dense": strongest,
        "equal_dense": verdict.equal_dense(metrics),
        "headline": headline,
        "models": models,
        "comparisons": metrics["comparisons"],
        "labels": {key: value for key, value in (metrics.get("labels") or {}).items() if key != "rows"},
    }


def _model(row: Row, strongest: str, n_parameters: Mapping[str, int]) -> Row:
    """A model of a run. `ratio` is that of its perplexity to the strongest dense model of the run.

    `ratios` has those to each dense model.
    """
    name = "random-0" if row["system"] == "random" else str(row["system"])
    size = n_parameters.get(name, n_parameters["0"])
    n_active = row["n_active"]
    return {
        "model": verdict.label(row),
        **{key: row.get(key) for key in MODEL_KEYS},
        "ratios": row["ratios"],
        **{key: row["ratios"][strongest][key] for key in ("ratio", "ci95")},
        "active_parameters": None if n_active is None else n_active * size,
        "train_flops": row["train_flops"],
        "is_headline": row["headline"],
    }


def _groups(rows: Sequence[Row]) -> list[Row]:
    """Runs that differ in their random seed alone, as one: geometric means, and the interval of their ratios.

    Of runs that differ in train.controls alone, the one with the strongest dense model counts. `ratio` is to
    the strongest of those dense models that every seed has.
    """
    found: dict[str, dict[Any, Row]] = {}
    for row in rows:
        by_seed = found.setdefault(repr(_shared_setting(row)), {})
        seed = row["setting"].get(SEED)
        if seed not in by_seed or row["headline"]["ratio"] > by_seed[seed]["headline"]["ratio"]:
            by_seed[seed] = row
    groups = []
    for some in (list(by_seed.values()) for by_seed in found.values()):
        dense, ratios = _to_strongest(some)
        means = {key: _mean(row["headline"][key] for row in some) for key in ("perplexity", "bits_per_byte")}
        groups.append(
            {
                **{"runs": [row["run"] for row in some], "setting": _shared_setting(some[0])},
                **{key: some[0][key] for key in ("k", "n_tokens")},
                **{"dense": dense, "ratio": _mean(ratios), "ci95": over_seeds(ratios), **means},
            }
        )
    return groups


def _to_strongest(rows: Sequence[Row]) -> tuple[str, list[float]]:
    """The strongest dense model that all these runs have, and the ratio of each run's best ensemble to it."""
    names = [name for name in rows[0]["equal_dense"] if all(name in row["equal_dense"] for row in rows)]
    ratios = {name: [row["headline"]["ratios"][name]["ratio"] for row in rows] for name in names or ["dense"]}
    strongest = max(ratios, key=lambda name: _mean(ratios[name]))
    return strongest, ratios[strongest]


def _shared_setting(row: Row) -> dict[str, Any]:
    """What the runs of a group have in common."""
    return {key: value for key, value in row["setting"].items() if key not in (SEED, CONTROLS)}


def over_seeds(ratios: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the geometric mean of ratios, one for each random seed; None for fewer than three.

    Student's t on the logarithms, with one degree of freedom fewer than seeds.
    """
    from scipy import stats

    if len(ratios) < MIN_SEEDS:
        return None
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return [math.exp(logs.mean() - half), math.exp(logs.mean() + half)]


def _mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    return math.exp(float(np.mean([math.log(value) for value in values])))


def others_of(group: Row) -> dict[str, Any]:
    """The setting of a group without k and the keys of the budget: what a line of a chart stands for."""
    return {key: value for key, value in group["setting"].items() if key not in (K, *BUDGET)}


def _best_k(groups: Sequence[Row], unit: str) -> list[Row]:
    """For each budget at which several k were tried, the k whose ensemble predicts best."""
    found: dict[tuple[str, int], list[Row]] = {}
    for group in groups:
        # a token more or less comes from rounding the batch of an expert
        found.setdefault((repr(others_of(group)), rounded(group["n_tokens"])), []).append(group)
    best = []
    for some in found.values():
        if len({group["k"] for group in some}) > 1:
            winner = min(some, key=lambda group: group[unit])
            tried = sorted({group["k"] for group in some})
            keys = ("n_tokens", "k", "ratio", unit)
            best.append({"setting": others_of(winner), "tried": tried, **{key: winner[key] for key in keys}})
    return sorted(best, key=lambda row: (repr(row["setting"]), row["n_tokens"]))


def rounded(n_tokens: int) -> int:
    """Tokens by two digits."""
    return round(n_tokens, 1 - int(math.log10(n_tokens))) if n_tokens else 0


def _pairs(runs: Sequence[Finished], rows: Sequence[Row], unit: str) -> list[Row]:
    """The headline ensembles of two runs on the documents that both report, with paired intervals.

    Of few runs, all pairs. Of more, each with the best, and those that differ in one key (`_is_one_change`).
    The ratio is of perplexities per token, or per byte where tokenizers differ.
    """
    order = sorted(range(len(runs)), key=lambda i: rows[i]["headline"][unit])
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    if len(runs) > ALL_PAIRS:
        pairs = [(a, b) for a, b in pairs if a == order[0] or _is_one_change(rows[a], rows[b])]
    return [{"run": runs[a].name, "against": runs[b].name, **_pair(runs[a], runs[b], unit)} for a, b in pairs]


def _is_one_change(a: Row, b: Row) -> bool:
    """Whether two runs differ in one key that is no budget, no seed and no list of controls.

    Another budget beside it is allowed where the training FLOPs are equal, as with another train.seed_share.
    """
    settings, flops = (a["setting"], b["setting"]), [row["headline"]["train_flops"] for row in (a, b)]
    keys = {key for key in settings[0] if settings[0][key] != settings[1][key]} - {CONTROLS}
    if max(flops) <= verdict.EQUAL * min(flops):
        keys -= set(BUDGET)
    return len(keys) == 1 and not keys & {SEED, *BUDGET}


def _pair(a: Finished, b: Finished, unit: str) -> Row:
    at_A, at_B = _shared(a.documents, b.documents)
    nll_D, reference_D = a.documents.nll_D["ensemble"][at_A], b.documents.nll_D["ensemble"][at_B]
    size_D = (a.documents.n_tokens_D if unit == "perplexity" else a.documents.n_bytes_D)[at_A]
    per, n_documents = ("token" if unit == "perplexity" else "byte"), len(at_A)
    found: Row = {"ratio": None, "ci95": None}
    if n_documents >= MIN_REPORTED:
        resamples = a.metrics["made_with"]["bootstrap"], a.metrics["made_with"]["rng_seed"]
        (found,) = bootstrap.estimates(nll_D[:, None], reference_D, size_D, *resamples)
    return {**found, "per": per, "n_documents": n_documents}


def _shared(a: Documents, b: Documents) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the documents that both runs report, in the same order."""
    row_B = {name: i for i, name in enumerate(b.doc_id_D.tolist()) if b.is_reported_D[i]}
    ids = enumerate(a.doc_id_D.tolist())
    pairs = [(i, row_B[name]) for i, name in ids if a.is_reported_D[i] and name in row_B]
    return np.array([i for i, _ in pairs], int), np.array([j for _, j in pairs], int)
