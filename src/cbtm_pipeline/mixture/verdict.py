"""The result in words: names of systems, the table for the terminal, and sentences that say who wins, also when it is dense."""

import textwrap
from typing import Any

Row = dict[str, Any]

WIDTH = 100
KINDS = {"batch": "k x batch", "steps": "k x steps"}


def label(row: Row) -> str:
    """Name of a system for people, without the settings of its router."""
    match row["system"]:
        case "ensemble":
            return f"{row['router']} {'all' if row['top_k'] == row['k'] else 'top'}-{row['top_k']}"
        case "random":
            return f"random, {row['router'] or 'uniform'}"
    return row["system"]


def interval(ratio: float, ci95: list[float]) -> str:
    """`0.912 [0.904, 0.921]`"""
    return f"{ratio:.3f} [{ci95[0]:.3f}, {ci95[1]:.3f}]"


def short(value: float | None) -> str:
    """At most three digits, nothing for None: `0.05`, `1.97e+13`."""
    return "" if value is None else f"{value:.3g}"


def main_rows(metrics: dict[str, Any]) -> list[Row]:
    """The rows that a person wants to see first: all but the single experts, ensembles with their calibrated settings only."""
    return [
        r
        for r in metrics["systems"]
        if not r["system"].startswith("expert-") and (r["system"] != "ensemble" or r["calibrated"])
    ]


def headline(metrics: dict[str, Any]) -> Row:
    """The ensemble that did best on the calibration documents."""
    return min((r for r in metrics["systems"] if r["headline"]), key=lambda r: r["calibration_nll"])


def dense_kind(metrics: dict[str, Any], name: str) -> str:
    """How a dense model spends the experts' compute: `k x batch` or `k x steps`."""
    return KINDS[metrics["dense"] if name == "dense" else name.removeprefix("dense-")]


def sentences(metrics: dict[str, Any]) -> list[str]:
    """Who wins against each dense model, what the router is worth, and whether random clusters would have done as well."""
    best = headline(metrics)
    rows = {row["system"]: row for row in metrics["systems"]}
    said = []
    for name, against in best["ratios"].items():
        compute = f"{rows[name]['train_flops'] / best['train_flops']:.2f} x" if best["train_flops"] else "no"
        said.append(
            f"{label(best)} against {name} ({dense_kind(metrics, name)}, {compute} the training FLOPs): "
            f"{interval(**against)}, {_outcome(against['ci95'], 'the ensemble wins', f'{name} wins')}."
        )
    for pair in metrics["comparisons"]:
        if pair["system"] == label(best) and pair["against"] not in (
            "oracle",
            "random, uniform",
            "random, posterior",
        ):
            outcome = _outcome(pair["ci95"], "better", "worse")
            said.append(
                f"{label(best)} against {pair['against']}: {interval(pair['ratio'], pair['ci95'])}, {outcome}."
            )
    for row in metrics["systems"]:
        if row["system"] == "random":
            outcome = _outcome(row["ci95"], "a gain without clusters", "no gain without clusters")
            said.append(
                f"{label(row)} against dense: {interval(row['ratio_to_dense'], row['ci95'])}, {outcome}."
            )
    return said


def _outcome(ci95: list[float], below: str, above: str) -> str:
    return below if ci95[1] < 1 else above if ci95[0] > 1 else "no clear difference"


def table(metrics: dict[str, Any]) -> str:
    """The main rows as aligned plain text of at most WIDTH columns, with the verdict below."""
    lines: list[tuple[str, ...]] = [
        ("system", "T", "eps", "beta", "perplexity", "bits/byte", "ratio to dense [95 %]", "FLOPs")
    ]
    for row in main_rows(metrics):
        lines.append(
            (
                label(row) + (" *" if row["headline"] else ""),
                *(short(row[key]) for key in ("temperature", "epsilon", "beta")),
                f"{row['perplexity']:.2f}",
                f"{row['bits_per_byte']:.4f}",
                interval(row["ratio_to_dense"], row["ci95"]),
                short(row["train_flops"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        line[0].ljust(widths[0])
        + "".join("  " + c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    notes = [
        f"{metrics['n_documents']} held-out documents, {metrics['n_tokens']} tokens, {metrics['n_bytes']} bytes.",
        f"T, eps, beta and * (the best of its router) were chosen on {metrics['calibration']['n_documents']} other held-out documents.",
        "FLOPs: all training that the system needed, the seed's included. Ratios below are of perplexities.",
        "",
        *metrics["verdict"],
    ]
    text += [
        "",
        *(line for note in notes for line in textwrap.wrap(note, WIDTH, subsequent_indent="  ") or [""]),
    ]
    return "\n".join(text) + "\n"
