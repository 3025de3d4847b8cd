"""Claims of the paper and of its relatives, and what the study says about each."""

import itertools
import math
from collections.abc import Sequence

import rates
import which_k
from stored import (
    LARGE,
    Estimate,
    Row,
    Study,
    against,
    in_order,
    judged,
    millions,
    model,
    over,
    rate,
    shown,
    table,
)


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
            ratios = ", ".join(f"{ratio:.3f}" for ratio in _of_seeds(study, group))
            about = f"k = {group['k']}, {millions(group['n_tokens'])} tokens, over `{group['dense']}`"
            rows.append(
                (
                    f"The same over {len(group['runs'])} random seeds",
                    judged(estimate, "holds", "does not hold"),
                    f"{about}: {shown(estimate)}, each {ratios}",
                )
            )
    return rows


def _of_seeds(study: Study, group: Row) -> list[float]:
    """The ratio to dense of each run of a group."""
    headlines = [study.by_name[run]["headline"] for run in group["runs"]]
    return [row["ratios"][group["dense"]]["ratio"] for row in headlines]


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
    tokens = in_order(map(millions, whole))
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


def why(study: Study) -> list[str]:
    """Why the best k does not grow with the budget, as far as the numbers tell; nothing if it does."""
    best = [study.best(n_tokens) for n_tokens in study.complete]
    largest = max(study.ks)
    if len(best) < 2 or best[0]["k"] != largest:
        return []
    last = sorted(study.at(study.complete[-1]).values(), key=lambda run: run["headline"]["perplexity"])[:2]
    apart = last[1]["headline"]["perplexity"] / last[0]["headline"]["perplexity"] - 1
    text = (
        f"Why the best k does not grow: with all experts active, the largest k that was tried, {largest}, is "
        f"the best at {millions(study.complete[0])} tokens already. At {millions(study.complete[-1])}, "
        f"k = {in_order(sorted(run['k'] for run in last))} differ by {100 * apart:.1f} %."
    )
    for group in study.content["groups"]:
        if group["ci95"]:
            ratios = _of_seeds(study, group)
            text += (
                f" Ratios to dense of {len(ratios)} seeds of k = {group['k']} differ by up to "
                f"{100 * (max(ratios) / min(ratios) - 1):.1f} %."
            )
    return [text, ""]


def _other_rates(study: Study) -> str:
    """Which budgets of the grid have another learning rate than the smallest one, in words."""
    smallest, *others = study.of(8)
    told = [
        f"{millions(run['n_tokens'])} tokens at {rate(run)}" for run in others if rate(run) != rate(smallest)
    ]
    return f". Learning rate {rate(smallest)}, but {' and '.join(told)}" if told else ""
