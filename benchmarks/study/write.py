"""Write docs/study.md with its pictures, and docs/which-k.md, from the stored metrics, docs/study/*.json.

    python benchmarks/study/write.py

Each of these files is the study.json of a study whose config lies in this folder. Every number and every
verdict on the pages is computed here.
"""

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import rates
import which_k
from stored import (
    BASES,
    CHANGES,
    LARGE,
    Estimate,
    Row,
    Study,
    against,
    filled,
    judged,
    millions,
    model,
    over,
    rate,
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
    at_best = {of.n_tokens: rates.at_best(study, of)[1] for of in rates.tried(study)}
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


def is_falling(values: Sequence[float]) -> bool:
    return all(a > b for a, b in itertools.pairwise(values))


def each(runs: Sequence[Row], estimates: Sequence[Estimate]) -> str:
    """An estimate for each budget."""
    if len(runs) == 1:
        return shown(estimates[0])
    told = zip(runs, estimates, strict=True)
    return "; ".join(f"{millions(run['n_tokens'])} tokens: {shown(estimate)}" for run, estimate in told)


def verdict_of(runs: Sequence[Row], estimates: Sequence[Estimate], below: str, above: str) -> str:
    """One verdict if all budgets agree, else the verdict of each."""
    found = [judged(estimate, below, above) for estimate in estimates]
    if len(set(found)) == 1:
        return found[0]
    return "; ".join(f"{millions(run['n_tokens'])}: {text}" for run, text in zip(runs, found, strict=True))


def claims(study: Study) -> list[str]:
    """Claims of the paper and of its relatives, and what this study says about each, as far as it has run."""
    runs = study.controlled
    with_random = [run for run in runs if any(row["model"] == "random, uniform" for row in run["models"])]
    wins = [study.over_strongest(run, run["headline"]["model"]) for run in runs]
    random = [study.over_strongest(run, "random, uniform") for run in with_random]
    ours = [against(run, "filter", "paper") for run in runs]
    k = runs[0]["k"]
    rows = [
        (
            "Experts beat a dense model of equal compute (C-BTM)",
            verdict_of(runs, wins, "holds", "does not hold"),
            f"k = {k}, over the strongest dense model: {each(runs, wins)}",
        ),
        *_larger(runs),
        *rates.claim(study),
        *_seeds(study),
        *_sparse(runs),
        (
            "Experts on random clusters gain nothing (C-BTM)",
            verdict_of(with_random, random, "does not hold", "holds"),
            f"equal weights, over the strongest dense model: {each(with_random, random)}",
        ),
        *_growth(study),
        *(_change(study, *change) for change in CLAIMED if change[0] in study.by_name),
        (
            "Experts of 1.3 B match a dense model of 6.7 B; few-shot tasks gain (C-BTM)",
            "cannot be tested here",
            "models of 0.2 M parameters know too little",
        ),
        (
            "Ours: `filter` is better than the paper's router",
            verdict_of(runs, ours, "holds", "does not hold"),
            f"k = {k}, each at its best setting: {each(runs, ours)}",
        ),
    ]
    return table(["claim", "here", "measured"], rows)


def _larger(runs: Sequence[Row]) -> list[tuple[str, str, str]]:
    """The first claim against a dense model that is larger, where there is one."""
    runs = [run for run in runs if LARGE in run["equal_dense"]]
    if not runs:
        return []
    found = [over(run, run["headline"]["model"], LARGE) for run in runs]
    verdict = verdict_of(runs, found, "holds", "does not hold")
    claim = "They beat a dense model of equal compute with twice the layers, too (ours)"
    return [(claim, verdict, f"k = {runs[0]['k']}, over `{LARGE}`: {each(runs, found)}")]


def _sparse(runs: Sequence[Row]) -> list[tuple[str, str, str]]:
    """The paper's claims about one and two active experts, with the paper's router."""
    ones = [over(run, "paper top-1", "dense") for run in runs]
    twos = [
        model(run, "paper top-2")["perplexity"] / model(run, f"paper all-{run['k']}")["perplexity"]
        for run in runs
    ]
    told = zip(runs, twos, strict=True)
    return [
        (
            "One active expert already beats dense (C-BTM)",
            verdict_of(runs, ones, "holds", "does not hold"),
            f"`paper top-1` over `dense`: {each(runs, ones)}",
        ),
        (
            "Two active experts are about as good as all (C-BTM)",
            f"worse by {100 * (min(twos) - 1):.1f} to {100 * (max(twos) - 1):.1f} %",
            f"`paper top-2` over `paper all-{runs[0]['k']}`: "
            + "; ".join(f"{millions(run['n_tokens'])} tokens: {ratio:.3f}" for run, ratio in told),
        ),
    ]


def _seeds(study: Study) -> list[tuple[str, str, str]]:
    """The first claim over random seeds, where there are enough for an interval."""
    rows = []
    for group in study.content["groups"]:
        if group["ci95"]:
            estimate = group["ratio"], group["ci95"]
            headlines = [study.by_name[run]["headline"] for run in group["runs"]]
            ratios = ", ".join(f"{row['ratios'][group['dense']]['ratio']:.3f}" for row in headlines)
            about = f"k = {group['k']}, {millions(group['n_tokens'])} tokens, over `{group['dense']}`"
            rows.append(
                (
                    f"The same over {len(group['runs'])} random seeds",
                    judged(estimate, "holds", "does not hold"),
                    f"{about}: {shown(estimate)}, each {ratios}",
                )
            )
    return rows


CLAIMED = (  # run, claim, what it says if the run is better than the base, and if it is worse
    ("balance=none", "Balance matters (C-BTM)", "does not hold", "holds"),
    ("by=label", "Clusters that are found are better than labels (C-BTM)", "does not hold", "holds"),
    (
        "by=label+text",
        "Labels and text together are better than text (C-BTM's outlook)",
        "holds",
        "does not hold",
    ),
    (
        "seed_share=0.25",
        "Half of the compute for the seed is better than a quarter (BTM)",
        "does not hold",
        "holds",
    ),
)


def _change(study: Study, name: str, claim: str, better: str, worse: str) -> tuple[str, str, str]:
    """A claim about one change, at each budget with which it has run."""
    runs, ratios = study.changed(name)
    base = study.base.split(",")[0]
    return claim, verdict_of(runs, ratios, better, worse), f"`{name}` over `{base}`: {each(runs, ratios)}"


def _growth(study: Study) -> list[tuple[str, str, str]]:
    """The claims about growing data, where there are several budgets."""
    if len(study.budgets) < 2:
        return []
    ratios = {k: [study.ratio(run) for run in study.of(k)] for k in study.ks if len(study.of(k)) > 1}
    whole = study.complete
    best_ks = {
        bound: [found[0]["k"] for n in whole if (found := which_k.best_within(study, n, bound))]
        for bound in (math.inf, *which_k.PASSES)
    }
    falls = all(map(is_falling, ratios.values()))
    tokens = " and ".join(map(millions, whole))
    named = {
        bound: "all experts run" if bound == math.inf else f"at most {bound:g} passes" for bound in best_ks
    }
    told = [f"{named[bound]}: {', '.join(map(str, ks))}" for bound, ks in best_ks.items()]
    grow = [len(set(ks)) > 1 and ks == sorted(ks) for ks in best_ks.values()]
    found = [
        (
            "The gain grows with the data (C-BTM)",
            "holds" if falls else "holds in part",
            "; ".join(f"k = {k}: {' → '.join(f'{r:.3f}' for r in each)}" for k, each in ratios.items())
            + _other_rates(study),
        ),
        (
            "The best k grows with the data (C-BTM)",
            "holds" if all(grow) else "holds in part" if any(grow) else "not seen",
            f"best k at {tokens} tokens, {'; '.join(told)}",
        ),
    ]
    return found if len(whole) > 1 else found[:1]


def _other_rates(study: Study) -> str:
    """Which budgets of the grid have another learning rate than the smallest one, in words."""
    smallest, *others = study.of(8)
    told = [
        f"{millions(run['n_tokens'])} tokens at {rate(run)}" for run in others if rate(run) != rate(smallest)
    ]
    return f". Learning rate {rate(smallest)}, but {' and '.join(told)}" if told else ""


def demo(study: Study) -> list[str]:
    """The same grid on the built-in corpus."""
    run = study.by_name["balance=none"]
    ratio = study.pair(run["run"], study.base)
    return [
        *budgets(study),
        "",
        f"Clusters that are not balanced have {verdict.interval(*ratio)} times the perplexity of balanced "
        f"ones (k = {run['k']}), and an NMI with the domains of {run['labels']['training']['nmi']:.3f}.",
    ]


def write(study: Study, of_demo: Study, of_rerouting: Sequence[Row]) -> str:
    """The page: a part for each mark of the text, as far as the study has run."""
    parts = {
        "summary": summary(study),
        "pictures": curves(study),
        "claims": claims(study),
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
