"""The result in words: names of systems, the table for the terminal, and sentences that say who wins."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from cbtm_pipeline.mixture import search
from cbtm_pipeline.mixture.routers import ROUTERS

Row = dict[str, Any]  # an entry of `systems` in metrics.json

WIDTH = 110  # of the table, at most; of its notes 100 characters
EQUAL = 1.05  # so many times the compute still counts as equal: batches and steps are whole numbers
DENSE_KINDS = {"batch": "k x batch", "steps": "k x steps", "large": "twice the layers, from scratch"}
TOO_FEW = "too few documents for a verdict"
METRICS_ONLY = ("oracle", "random, uniform", "random, posterior")  # their comparisons get no sentence


def label(row: Row) -> str:
    """Name of a system for people, without the settings of its router."""
    match row["system"]:
        case "ensemble":
            name = f"{row['router']} {'all' if row['top_k'] == row['k'] else 'top'}-{row['top_k']}"
            return (
                f"{name} {'fixed' if row.get('fix_after') is not None else 'sticky'}" if stays(row) else name
            )
        case "random":
            return f"random, {row['router'] or 'uniform'}"
    return row["system"]


def stays(row: Row) -> bool:
    """Whether its active set stays where it would change with every weight."""
    return (row.get("hysteresis") or 1) > 1 or row.get("fix_after") is not None


def interval(ratio: float, ci95: list[float] | None) -> str:
    """`0.912 [0.904, 0.921]`, or `0.912 [-]` where too few documents were reported."""
    if ci95 is None:
        return f"{ratio:.3f} [-]"
    return f"{ratio:.3f} [{ci95[0]:.3f}, {ci95[1]:.3f}]"


def short(value: float | None) -> str:
    """A number with at most three digits, or nothing for None: `0.05`, `1.97e+13`."""
    return "" if value is None else f"{value:.3g}"


def main_rows(metrics: dict[str, Any]) -> list[Row]:
    """The rows to show first: without single cluster experts, and of ensembles only the calibrated ones."""
    return [
        row
        for row in metrics["systems"]
        if not row["system"].startswith("expert-") and (row["system"] != "ensemble" or row["calibrated"])
    ]


def headline(metrics: dict[str, Any]) -> Row:
    """The ensemble with the lowest nll on the calibration documents."""
    return min((row for row in metrics["systems"] if row["headline"]), key=lambda row: row["calibration_nll"])


def equal_dense(metrics: dict[str, Any]) -> list[str]:
    """The dense models with at most the headline ensemble's training FLOPs. If all have more, all of them."""
    best, rows = headline(metrics), {row["system"]: row for row in metrics["systems"]}
    most = EQUAL * best["train_flops"]
    return [name for name in best["ratios"] if rows[name]["train_flops"] <= most] or list(best["ratios"])


def strongest_dense(metrics: dict[str, Any]) -> str:
    """The name of the dense model that the headline ensemble is compared with.

    Of the dense models of equal compute, it is the one with the lowest perplexity on the reported documents.
    That choice favours dense.
    """
    perplexity = {row["system"]: row["perplexity"] for row in metrics["systems"]}
    return min(equal_dense(metrics), key=lambda name: perplexity[name])


def compute_of(metrics: dict[str, Any], name: str) -> str:
    """The training FLOPs of a dense model over those of the headline ensemble: `1.00 x`, or `no`."""
    best = headline(metrics)
    dense = next(row for row in metrics["systems"] if row["system"] == name)
    return f"{dense['train_flops'] / best['train_flops']:.2f} x" if best["train_flops"] else "no"


def outcome(metrics: dict[str, Any]) -> str:
    """Who wins, the headline ensemble or the strongest dense model of equal compute, in one sentence."""
    name = strongest_dense(metrics)
    ci95 = headline(metrics)["ratios"][name]["ci95"]
    if ci95 is None:
        return f"{TOO_FEW.capitalize()}."
    low, high = ci95
    if low <= 1 <= high:
        return "There is no clear difference."
    return "The ensemble wins." if high < 1 else f"{name.capitalize()} wins."


def dense_kind(metrics: dict[str, Any], name: str) -> str:
    """How a dense model spends the experts' compute: `k x batch`, `k x steps` or in a larger model."""
    return DENSE_KINDS[metrics["dense"] if name == "dense" else name.removeprefix("dense-")]


def sentences(metrics: dict[str, Any]) -> list[str]:
    """Compare the headline ensemble with dense models and other mixtures, and random clusters with dense."""
    found = [*_against_dense(metrics), *_against_others(metrics), *_random_clusters(metrics)]
    return [*found, *([_merged(metrics["merge"])] if "merge" in metrics else [])]


def at_the_ends(row: Row, tried: Mapping[str, Sequence[float]]) -> list[str]:
    """A sentence for each chosen setting that is the smallest or largest that was tried.

    Others may be better. `tried` are the lists of section route. `row` is the headline.
    """
    idle = ROUTERS[row["router"]].idle_alone if row["top_k"] == 1 else ()
    texts = []
    for key in ("temperature", "epsilon", "beta"):
        values, chosen = sorted(set(tried.get(key, ()))), row.get(key)
        if chosen is None or len(values) < 2 or key in idle or chosen not in (values[0], values[-1]):
            continue
        which, more = ("smallest", "smaller") if chosen == values[0] else ("largest", "larger")
        texts.append(
            f"{key} {chosen:g} is the {which} value that was tried: {more} ones may be better. "
            f"Add some to route.{key}."
        )
    if row["top_k"] < row["k"] and row["top_k"] == max(tried.get("top_k", [0])):
        texts.append(
            f"top_k {row['top_k']} is the largest that was tried, of {row['k']} experts. "
            "Add larger ones to route.top_k."
        )
    return texts


def _against_dense(metrics: dict[str, Any]) -> list[str]:
    """For each dense model, the strongest first: its training FLOPs, and whether it or the ensemble wins."""
    best, strongest = headline(metrics), strongest_dense(metrics)
    texts = []
    for name in sorted(best["ratios"], key=lambda name: name != strongest):
        about = f"{dense_kind(metrics, name)}, {compute_of(metrics, name)} the training FLOPs"
        ratio = best["ratios"][name]
        wins = _outcome(ratio["ci95"], "the ensemble wins", f"{name} wins")
        texts.append(f"{label(best)} against {name} ({about}): {interval(**ratio)}, {wins}.")
    return texts


def _against_others(metrics: dict[str, Any]) -> list[str]:
    """Whether the headline ensemble is better than other routers and than equal weights."""
    best = label(headline(metrics))
    return [
        f"{best} against {pair['against']}: {interval(pair['ratio'], pair['ci95'])}, "
        f"{_outcome(pair['ci95'], 'better', 'worse')}."
        for pair in metrics["comparisons"]
        if pair["system"] == best and pair["against"] not in METRICS_ONLY
    ]


def _random_clusters(metrics: dict[str, Any]) -> list[str]:
    """Whether experts on random clusters gain over the strongest dense model, too."""
    name = strongest_dense(metrics)
    return [
        f"{label(row)} against {name}: {interval(**row['ratios'][name])}, "
        f"{_outcome(row['ratios'][name]['ci95'], 'a gain without clusters', 'no gain without clusters')}."
        for row in metrics["systems"]
        if row["system"] == "random"
    ]


def _merged(merge: dict[str, Any]) -> str:
    """What one model of averaged weights for each document gives, beside the others on the same tokens."""
    first, *others = (
        f"{row['system']} {row['perplexity']:.2f} ({row['passes']:.2f} passes)" for row in merge["systems"]
    )
    return (
        f"Merging at test time, perplexity after prompts of {merge['prompt_tokens']:.0f} tokens: {first}; "
        f"{', '.join(others)}. {merge['averaged']:.1f} experts averaged "
        f"({merge['effective']:.2f} in effect), {merge['spread']:.2f} of their mean's norm apart."
    )


def _outcome(ci95: list[float] | None, below: str, above: str) -> str:
    """`below` if the whole interval lies below 1, `above` if it lies above, else no clear difference."""
    if ci95 is None:
        return TOO_FEW
    return below if ci95[1] < 1 else above if ci95[0] > 1 else "no clear difference"


def table(metrics: dict[str, Any]) -> str:
    """The main rows as aligned plain text of at most WIDTH columns, followed by the verdict."""
    settings, numbers = (
        ("T", "eps", "beta"),
        ("passes", "perplexity", "bits/byte", "to dense [95 %]", "FLOPs"),
    )
    header = ("system", *settings, *numbers)
    lines = align([header, *map(_cells, main_rows(metrics))])
    lines.insert(1, "-" * len(lines[0]))
    n_documents, n_chosen = metrics["n_documents"], metrics["calibration"]["n_documents"]
    notes = [
        f"{n_documents} held-out documents, {metrics['n_tokens']} tokens, {metrics['n_bytes']} bytes.",
        f"T, eps, beta and * (the best of its router) were chosen on {n_chosen} other held-out documents.",
        "passes: experts that read a token, on average, counting what new ones have to catch up.",
        "FLOPs: all training that the system needed, the seed's included. Ratios below are of perplexities.",
        "",
        *metrics["verdict"],
        *([search.sentence(metrics["search"])] if "search" in metrics else []),
        *metrics.get("warnings", []),
    ]
    lines.append("")
    for note in notes:
        lines += textwrap.wrap(note, 100, subsequent_indent="  ") or [""]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        label(row) + (" *" if row["headline"] else ""),
        *(short(row[key]) for key in ("temperature", "epsilon", "beta")),
        short(row["passes"]),
        f"{row['perplexity']:.2f}",
        f"{row['bits_per_byte']:.4f}",
        interval(row["ratio_to_dense"], row["ci95"]),
        short(row["train_flops"]),
    )


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """One line for each row; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]
