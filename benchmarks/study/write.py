"""Write docs/study.md with its pictures, and docs/which-k.md, from the stored metrics, docs/study/*.json.

    python benchmarks/study/write.py

Each of these files is the study.json of a study whose config lies in this folder. Every number and every
verdict on the pages is computed here.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import claims
import rates
import which_k
from stored import (
    BASES,
    CHANGES,
    LARGE,
    Row,
    Study,
    filled,
    in_order,
    millions,
    model,
    shown,
    table,
)

from cbtm_pipeline.html import charts
from cbtm_pipeline.mixture import verdict

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
STYLE = """
svg { background: #fcfcfa; font-family: system-ui, sans-serif }
text { fill: #5d6876; font-size: 11.5px } .grid { stroke: #e1e4e8 } .grid, .line { fill: none }
.line { stroke: var(--c); stroke-width: 2 } .dashed { stroke-dasharray: 5 4; stroke-width: 1.5 }
.dot, .end { fill: var(--c) } .dot { stroke: #fcfcfa } .end { font-weight: 600 }
.c0 { --c: #2c6cb0 } .c1 { --c: #c4621a } .c2 { --c: #2d8a6b } .c3 { --c: #8b4fa3 } .grey { --c: #838c97 }
"""


def picture(name: str, title: str, x_label: str, y_label: str, series: list[charts.Series]) -> None:
    """Write a line chart as a picture of its own."""
    drawn = str(charts.lines(title, x_label, y_label, series, log_x=True))
    (svg,) = re.findall(r"<svg.*?</svg>", drawn, re.DOTALL)
    head, body = svg.split(">", 1)
    text = f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{body}\n'
    (DOCS / "study" / f"{name}.svg").write_text(text, "utf-8")


def summary(study: Study) -> list[str]:
    """The best ensemble of each budget beside the strongest dense model."""
    lines = []
    at_best = rates.ratios(study)
    for n_tokens in study.budgets:
        best = study.best(n_tokens)
        dense = study.strongest(best)["model"]
        text = (
            f"At {millions(n_tokens)} training tokens{study.tried(n_tokens)} the best ensemble of the grid "
            f"has k = {best['k']}. Its perplexity is {study.ratio(best):.3f} times that of `{dense}`, the "
            "strongest dense model of equal compute, size and learning rate."
        )
        if large := study.dense(best).get(LARGE):
            ratio = best["headline"]["perplexity"] / large["perplexity"]
            text += f" It is {ratio:.3f} times that of `{LARGE}`: equal compute, but twice the layers."
        if changed := study.best_changed(n_tokens):
            name, ratio = changed["run"], study.ratio(changed)
            text += f" With one change, `{name}`, k = {changed['k']} has {ratio:.3f}."
        if estimate := at_best.get(n_tokens):
            text += f" With k = 8 and each kind of model at its best rate, the ratio is {shown(estimate)}."
        lines.append(f"* {text}")
    return [*lines, ""]


def curves(study: Study) -> list[str]:
    """The pictures: ratio to dense, and held-out perplexity, against tokens. None of one budget."""
    if len(study.budgets) < 2:
        return []
    ratios, losses = [], []
    for i, k in enumerate(study.ks):
        runs = study.of(k)
        points = [(run["n_tokens"], study.ratio(run)) for run in runs]
        ratios.append(charts.Series(f"k = {k}", f"c{i}", points, dots=True, end=f"k = {k}"))
        points = [(run["n_tokens"], run["headline"]["perplexity"]) for run in runs]
        losses.append(charts.Series(f"k = {k}", f"c{i}", points, dots=True, end=f"k = {k}"))
    runs = [next(iter(study.at(n_tokens).values())) for n_tokens in study.budgets]
    dense = [(run["n_tokens"], study.strongest(run)["perplexity"]) for run in runs]
    losses.append(charts.Series("dense", "grey", dense, dots=True, end="dense"))
    ones = charts.Series("dense", "grey", [(1, 1)], "dashed")
    tokens = "training tokens of all experts together"
    picture("ratio", "Ratio to dense", tokens, "perplexity, relative to dense", [ones, *ratios])
    picture("perplexity", "Perplexity", tokens, "held-out perplexity", losses)
    return [
        "![Best ensemble over the strongest dense model, against tokens, for each k](study/ratio.svg)",
        "",
        "![Held-out perplexity of dense and of the best ensemble of each k](study/perplexity.svg)",
        "",
    ]


def budgets(study: Study) -> list[str]:
    """Perplexity and ratio for each k and budget."""
    ks, rows = study.ks, []
    for n_tokens in study.budgets:
        best = study.best(n_tokens)
        cells = dict.fromkeys(ks, "–")
        for k, run in study.at(n_tokens).items():
            text = f"{run['headline']['perplexity']:.1f} ({study.ratio(run):.3f})"
            cells[k] = f"**{text}**" if run is best else text
        dense = sorted(study.dense(best).items())
        named = ", ".join(f"{name} {row['perplexity']:.1f}" for name, row in dense)
        rows.append([millions(best["n_tokens"]), named, *cells.values()])
    return table(["tokens", "dense models", *(f"k = {k}" for k in ks)], rows)


def routers(study: Study, k: int) -> list[str]:
    """The routers and their sparse settings at one k, for each budget."""
    runs = study.of(k)
    names = [row["model"] for row in runs[0]["models"] if row["router"]]
    rows = []
    for name in ["seed", "uniform", *names, "oracle"]:
        cells = []
        for run in runs:
            row = model(run, name)
            passes = "" if row["passes"] is None or name in ("seed", "uniform") else f", {row['passes']:.2f}"
            cells.append(f"{row['perplexity'] / model(run, 'dense')['perplexity']:.3f}{passes}")
        rows.append([name, *cells])
    return table(["model", *(f"{millions(run['n_tokens'])} tokens" for run in runs)], rows)


def rerouting(study: Study, found: Sequence[Row]) -> list[str]:
    """What it costs to renew the weights less often than at every token (rerouting.py)."""
    header, columns = ["new weights every"], []
    for of_run in found:
        tokens = millions(study.by_name[of_run["run"]]["n_tokens"])
        for router, cells in of_run["routers"].items():
            header.append(f"`{router}`, {tokens}")
            columns.append([f"{cell['ratio']:.3f}" for cell in cells])
    intervals = [cell["interval"] for cell in found[0]["routers"]["paper"]]
    names = ["token", *(f"{n} tokens" for n in intervals[1:])]
    return table(header, zip(names, *columns, strict=True))


def changes(study: Study) -> list[str]:
    """What one change to the base run makes of its best ensemble."""
    rows = []
    for name, what in CHANGES.items():
        if name in study.by_name:
            ratio, ci95 = study.pair(name, study.base_of(name))
            training = (study.by_name[name]["labels"] or {}).get("training", {})
            nmi = f"{training['nmi']:.3f}" if training else "–"
            rows.append([f"`{name}`", what, verdict.interval(ratio, ci95), nmi])
    if not rows:
        return []
    header = ["change", "what it is", "perplexity over that of the base [95 %]", "NMI with labels"]
    about = (
        f"Against `{study.base}`, on documents that both report. NMI says how far clusters and labels agree."
    )
    about += "".join(
        f" `{name}` stands against `{other}`." for name, other in BASES.items() if name in study.by_name
    )
    return ["## One change at a time", "", about, "", *table(header, rows), ""]


def demo(study: Study) -> list[str]:
    """The same grid on the built-in corpus."""
    run = study.by_name["balance=none"]
    ratio = study.pair(run["run"], study.base)
    best = in_order(f"{study.best(n)['k']} at {millions(n)}" for n in study.complete)
    return [
        *budgets(study),
        "",
        f"With all experts active, the best k is {best} tokens.",
        "",
        f"Clusters that are not balanced have {verdict.interval(*ratio)} times the perplexity of balanced "
        f"ones (k = {run['k']}), and an NMI with the domains of {run['labels']['training']['nmi']:.3f}.",
    ]


def write(study: Study, of_demo: Study, of_rerouting: Sequence[Row]) -> str:
    """The page: a part for each mark of the text, as far as the study has run."""
    parts = {
        "summary": summary(study),
        "pictures": curves(study),
        "claims": claims.claims(study),
        "why": claims.why(study),
        "budgets": budgets(study),
        "changes": changes(study),
        "rates": rates.section(study),
        "routers": routers(study, 8),
        "rerouting": rerouting(study, of_rerouting),
        "demo": demo(of_demo),
    }
    return filled("study.md", parts)


def main() -> None:
    study, of_demo = Study(DOCS / "study/technical.json"), Study(DOCS / "study/demo.json")
    of_rerouting = json.loads((DOCS / "study/rerouting.json").read_text("utf-8"))
    (DOCS / "study.md").write_text(write(study, of_demo, of_rerouting), "utf-8")
    (DOCS / "which-k.md").write_text(which_k.write(study), "utf-8")


if __name__ == "__main__":
    main()
