"""A study as its study.json stores it, and how its pages show numbers and verdicts."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cbtm_pipeline.mixture import comparison, verdict

BASES = {  # what runs stand against that differ from the base in more than one key
    "second_round": "fit_documents=10000",
    "balance=none,steps=800": "controls,steps=800",
    "balance=none,steps=3200": "k=8,steps=3200",
}
CHANGES = {
    "balance=none": "clusters that are not balanced",
    "balance=none,steps=800": "the same with 6.6 M tokens",
    "balance=none,steps=3200": "the same with 26 M tokens",
    "by=label": "clusters made of the labels, dealt to eight experts",
    "by=label+text": "labels and text together",
    "border_share=0.1": "a tenth of each expert's text from its neighbours",
    "seed_share=0.25": "a quarter of the compute for the seed, not half",
    "parents=2": "clusters of clusters: two parents, and four experts that begin as each",
    "fit_documents=10000": "clusters that are fitted on 10 000 documents, not on all",
    "second_round": "documents go to the expert that predicts them best, then training goes on",
}
LARGE = "dense-large"  # has twice the layers of an expert
Row = dict[str, Any]
Estimate = tuple[float, list[float] | None]  # a ratio with its 95 % interval


class Study:
    """The content of a study.json."""

    def __init__(self, path: Path) -> None:
        self.content = json.loads(path.read_text("utf-8"))
        self.runs: list[Row] = self.content["runs"]
        self.by_name = {run["run"]: run for run in self.runs}

    @property
    def grid(self) -> list[Row]:
        """The runs that differ in k and budget alone. That with all controls has the experts of another."""
        found: dict[tuple[int, int], Row] = {}
        for run in sorted(self.runs, key=lambda run: not run["run"].startswith("k=")):
            if re.match("k=|controls", run["run"]):
                found.setdefault((run["k"], budget(run)), run)
        return list(found.values())

    @property
    def controlled(self) -> list[Row]:
        """The run with most dense models of each budget, from the smallest budget to the largest."""
        found: dict[int, Row] = {}
        for run in self.runs:
            if re.match("controls|k=", run["run"]):
                most = max(found.get(budget(run), run), run, key=lambda run: len(run["equal_dense"]))
                found[budget(run)] = most
        return [found[n_tokens] for n_tokens in sorted(found) if len(found[n_tokens]["equal_dense"]) > 1]

    @property
    def base(self) -> str:
        """The run that others differ from in one key: k = 8 at the default budget."""
        return next(run["run"] for run in self.of(8) if run["setting"].get("train.steps", 200) == 200)

    @property
    def ks(self) -> list[int]:
        return sorted({run["k"] for run in self.grid})

    @property
    def budgets(self) -> list[int]:
        """Training tokens of all experts together, rounded."""
        return sorted({budget(run) for run in self.grid})

    @property
    def complete(self) -> list[int]:
        """The budgets at which every k has run."""
        return [n_tokens for n_tokens in self.budgets if set(self.at(n_tokens)) == set(self.ks)]

    def at(self, n_tokens: int) -> dict[int, Row]:
        """The runs of the grid with this budget, by k."""
        return {run["k"]: run for run in self.grid if budget(run) == n_tokens}

    def tried(self, n_tokens: int) -> str:
        """Where a budget lacks some k, which ones it has: ` (only k = 8 has run)`."""
        ks = sorted(self.at(n_tokens))
        return "" if ks == self.ks else f" (only k = {in_order(ks)} {'has' if len(ks) == 1 else 'have'} run)"

    def best(self, n_tokens: int) -> Row:
        """The run of the grid whose ensemble predicts best at this budget."""
        return min(self.at(n_tokens).values(), key=lambda run: run["headline"]["perplexity"])

    def best_changed(self, n_tokens: int) -> Row | None:
        """The best run with one change, if clearly better than its base, and better than the grid's best."""
        best = self.best(n_tokens)
        most = verdict.EQUAL * best["headline"]["train_flops"]
        better = [
            run
            for run in self.runs
            if run["run"] in CHANGES
            and self.pair(run["run"], self.base_of(run["run"]))[1][1] < 1
            and (budget(run), rate(run)) == (n_tokens, rate(best))
            and run["headline"]["train_flops"] <= most
            and run["headline"]["perplexity"] < best["headline"]["perplexity"]
        ]
        return min(better, key=lambda run: run["headline"]["perplexity"], default=None)

    def of(self, k: int) -> list[Row]:
        """The runs of the grid with this k, from the smallest budget to the largest."""
        return sorted((run for run in self.grid if run["k"] == k), key=lambda run: run["n_tokens"])

    def dense(self, run: Row) -> dict[str, Row]:
        """The dense models of equal compute of all runs with the same budget, seed and learning rate."""
        keys = ("seed", "train.seed_share", "train.lr")
        same = [
            other
            for other in self.runs
            if budget(other) == budget(run)
            and all(other["setting"].get(key) == run["setting"].get(key) for key in keys)
        ]
        found = {model["model"]: model for r in same for model in r["models"] if is_dense(model)}
        most = verdict.EQUAL * run["headline"]["train_flops"]
        return {name: model for name, model in found.items() if model["train_flops"] <= most}

    def strongest(self, run: Row) -> Row:
        """The dense model of equal compute and of an expert's size that predicts best."""
        same_size = [model for name, model in self.dense(run).items() if name != LARGE]
        return min(same_size, key=lambda model: model["perplexity"])

    def ratio(self, run: Row) -> float:
        """The perplexity of a run's best ensemble over that of `strongest`."""
        return run["headline"]["perplexity"] / self.strongest(run)["perplexity"]

    def over_strongest(self, run: Row, name: str) -> Estimate:
        """A model of a run over the strongest dense model of an expert's size."""
        return over(run, name, self.strongest(run)["model"])

    def base_of(self, name: str) -> str:
        """The run that a run with one change stands against."""
        return BASES.get(name, self.base)

    def changed(self, name: str) -> tuple[list[Row], list[Estimate]]:
        """The runs with one change, for each budget, and the ratio of each to its base."""
        runs = sorted((run for run in self.runs if run["run"].split(",")[0] == name), key=budget)
        return runs, [self.pair(run["run"], self.base_of(run["run"])) for run in runs]

    def pair(self, name: str, against: str) -> tuple[float, list[float]]:
        """The ratio of the best ensembles of two runs, with its interval."""
        for pair in self.content["pairs"]:
            if (pair["run"], pair["against"]) == (name, against):
                return pair["ratio"], pair["ci95"]
            if (pair["run"], pair["against"]) == (against, name):
                return 1 / pair["ratio"], [1 / end for end in reversed(pair["ci95"])]
        raise ValueError(f"{name}, {against}: no such pair in the study")


def budget(run: Row) -> int:
    """Training tokens of all experts together, rounded."""
    return comparison.rounded(run["n_tokens"])


def rate(run: Row) -> Any:
    """The learning rate; None if that of the config."""
    return run["setting"].get("train.lr")


def is_dense(model: Row) -> bool:
    return model["model"].startswith("dense")


def model(run: Row, name: str) -> Row:
    """A model of a run, by its name in the table."""
    return next(row for row in run["models"] if row["model"] == name)


def per_parameter(run: Row) -> float:
    """Training tokens of all experts together for each parameter of one model."""
    return run["n_tokens"] / model(run, "dense")["active_parameters"]


def against(run: Row, system: str, other: str) -> tuple[float, list[float]]:
    """The ratio of two mixtures of a run by the beginnings of their names, with its interval."""
    for pair in run["comparisons"]:
        if pair["system"].startswith(system) and pair["against"].startswith(other):
            return pair["ratio"], pair["ci95"]
    raise ValueError(f"{run['run']}: {system} was not compared with {other}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def filled(template: str, parts: Mapping[str, Sequence[str]]) -> str:
    """A text of this folder with the lines of a part in place of each mark `<!-- part -->`."""
    text = (Path(__file__).parent / template).read_text("utf-8")
    for name, lines in parts.items():
        text = text.replace(f"<!-- {name} -->\n", "".join(f"{line}\n" for line in lines))
    return text


def in_order(values: Iterable[object]) -> str:
    """`2, 4 and 8`."""
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def millions(n_tokens: float) -> str:
    return f"{n_tokens / 1e6:.1f} M" if n_tokens < 1e7 else f"{n_tokens / 1e6:.0f} M"


def over(run: Row, name: str, dense: str) -> Estimate:
    """A model of a run over one of the run's dense models."""
    ratio = model(run, name)["ratios"][dense]
    return ratio["ratio"], ratio["ci95"]


def judged(estimate: Estimate, below: str, above: str) -> str:
    """What an interval says about 1."""
    ci95 = estimate[1]
    if ci95 is None:
        return "unclear"
    return below if ci95[1] < 1 else above if ci95[0] > 1 else "no clear difference"


def shown(estimate: Estimate) -> str:
    return verdict.interval(*estimate)
