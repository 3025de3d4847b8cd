"""What other learning rates do to each kind of model, and each kind at its own best rate."""

from collections.abc import Mapping
from typing import NamedTuple

from stored import LARGE, Estimate, Row, Study, budget, judged, millions, rate, shown, table

ENSEMBLE = "best ensemble"


class Tried(NamedTuple):
    """The rates of one budget: by rate, the run and the perplexities of its ensemble and dense models."""

    n_tokens: int
    runs: Mapping[float, Row]
    perplexities: Mapping[float, Mapping[str, float]]

    def best(self, name: str) -> float:
        """The rate with which one of `names` has the lowest held-out perplexity."""
        return min((found[name], lr) for lr, found in self.perplexities.items())[1]

    @property
    def names(self) -> list[str]:
        """The kinds of models that were trained with every rate."""
        first, *others = self.perplexities.values()
        return [name for name in first if all(name in found for found in others)]


def tried(study: Study) -> list[Tried]:
    """The budgets at which the base's k has run with several rates, all else equal."""
    found = []
    for n_tokens in study.budgets:
        base = study.at(n_tokens)[8]
        same = [run for run in study.runs if _differs_in_rate(run, base)]
        runs = {rate(base): base} | {rate(run): run for run in same}
        if len(runs) > 1:
            named = {lr: _perplexities(study, run) for lr, run in sorted(runs.items())}
            found.append(Tried(n_tokens, runs, named))
    return found


def _differs_in_rate(run: Row, base: Row) -> bool:
    keys = {key for key in run["setting"] | base["setting"] if key != "train.controls"}
    different = {key for key in keys if run["setting"].get(key) != base["setting"].get(key)}
    return budget(run) == budget(base) and different == {"train.lr"}


def _perplexities(study: Study, run: Row) -> dict[str, float]:
    dense = {name: model["perplexity"] for name, model in sorted(study.dense(run).items())}
    return {ENSEMBLE: run["headline"]["perplexity"], **dense}


def at_best(study: Study, of: Tried) -> tuple[str, Estimate]:
    """The strongest dense model of an expert's size, and the ensemble over it, each at its own best rate.

    The interval is known if these are one rate.
    """
    at = {name: of.best(name) for name in of.names if name != LARGE}
    mine = at.pop(ENSEMBLE)
    name, lr = min(at.items(), key=lambda item: of.perplexities[item[1]][item[0]])
    if lr == mine:
        run = of.runs[lr]
        return f"`{name}` at {lr}", study.over_strongest(run, run["headline"]["model"])
    ratio = of.perplexities[mine][ENSEMBLE] / of.perplexities[lr][name]
    return f"`{name}` at {lr}, the ensemble at {mine}", (ratio, None)


def ratios(study: Study) -> dict[int, Estimate]:
    """The ratio of `at_best` for each budget with several rates."""
    return {of.n_tokens: at_best(study, of)[1] for of in tried(study)}


def claim(study: Study) -> list[tuple[str, str, str]]:
    """The first claim, with each kind of model at its own best rate."""
    found = [(of, *at_best(study, of)) for of in tried(study)]
    if not found:
        return []
    verdicts = [f"{millions(of.n_tokens)}: {_verdict(estimate)}" for of, _, estimate in found]
    told = [f"{millions(of.n_tokens)} tokens: {shown(estimate)} ({at})" for of, at, estimate in found]
    return [("The same, each at the best of the rates that were tried", "; ".join(verdicts), "; ".join(told))]


def _verdict(estimate: Estimate) -> str:
    ratio, ci95 = estimate
    if ci95 is None:
        return f"{'below' if ratio < 1 else 'not below'} 1"
    return judged(estimate, "holds", "does not hold")


def section(study: Study) -> list[str]:
    """A table of all rates and all models that were trained with several."""
    found = tried(study)
    if not found:
        return []
    names = list(dict.fromkeys(name for of in found for name in of.names))
    rows = []
    for of in found:
        for lr, perplexities in of.perplexities.items():
            cells = [_cell(of, name, lr, perplexities) for name in names]
            rows.append([millions(of.n_tokens), str(lr), *cells])
    about = (
        "k = 8. All models of a run have one rate. Held-out perplexity; bold: the best rate of each model."
    )
    return ["## Learning rates", "", about, "", *table(["tokens", "rate", *names], rows), ""]


def _cell(of: Tried, name: str, lr: float, perplexities: Mapping[str, float]) -> str:
    if name not in of.names:
        return "–"
    text = f"{perplexities[name]:.1f}"
    return f"**{text}**" if of.best(name) == lr else text
