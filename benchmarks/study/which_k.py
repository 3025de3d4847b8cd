"""docs/which-k.md: a rule of thumb from the stored metrics of the study."""

import rates
from stored import (
    LARGE,
    Estimate,
    Row,
    Study,
    filled,
    in_order,
    judged,
    millions,
    over,
    per_parameter,
    shown,
    table,
)

from cbtm_pipeline.mixture import comparison

PASSES = (1.5, 3, 5, 8, 16)  # expert passes per token that a user may afford


def best_within(study: Study, n_tokens: int, most: float) -> tuple[Row, Row] | None:
    """The run and its model that predict best with at most so many expert passes per token."""
    tried = [
        (run, row)
        for run in study.at(n_tokens).values()
        for row in run["models"]
        if row["router"] and row["passes"] and row["passes"] <= most
    ]
    return min(tried, key=lambda pair: pair[1]["perplexity"], default=None)


def gains(study: Study) -> tuple[list[Row], list[Row]]:
    """The runs with several dense models: those whose best ensemble is not clearly better, and the others."""
    with_gain = [run for run in study.controlled if judged(_gain(study, run), "wins", "loses") == "wins"]
    return [run for run in study.controlled if run not in with_gain], with_gain


def _gain(study: Study, run: Row) -> Estimate:
    return study.over_strongest(run, run["headline"]["model"])


def rule(study: Study) -> list[str]:
    """The rule of thumb, with the numbers that it rests on."""
    without, with_gain = gains(study)
    tokens = (
        "**Tokens first.** Count the training tokens of all experts together, for each parameter of one "
        "model. "
    )
    if without:
        few = in_order(map(_tokens, without))
        tokens += f"With {few}, the ensemble was no better than a dense model of equal compute. "
    tokens += (
        f"With {in_order(map(_tokens, with_gain))}, it was better. Between these, nothing was measured. "
        f"Below about {_tokens(with_gain[0])}, expect little: train one dense model, or train longer. "
        f"{_larger(with_gain)}"
    )
    lines = [
        tokens.strip(),
        "**Then many experts, if all can run at once, until more gain nothing.** With all experts active, "
        f"{_best_ks(study, float('inf'))}. {_last_step(study)}",
        "**Fewer experts where a token may cost little.** With at most 3 expert passes per token, "
        f"{_best_ks(study, 3)}. With at most 5, {_best_ks(study, 5)}. Where the second table below has 1 "
        "or more, the dense model was better.",
        *_unbalanced(study),
    ]
    return [f"{number}. {line}" for number, line in enumerate(lines, 1)] + [""]


def _larger(runs: list[Row]) -> str:
    """Whether a dense model with twice the layers was beaten, too, in words."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if LARGE in run["equal_dense"]:
            estimate = over(run, run["headline"]["model"], LARGE)
            found.setdefault(judged(estimate, "beaten", "better"), []).append(_tokens(run))
    told = ", ".join(f"{what} at {in_order(tokens)}" for what, tokens in found.items())
    return f"A dense model with twice the layers and equal compute is harder to beat: {told}." if told else ""


def ratios(study: Study) -> list[str]:
    """For each budget, the ensemble over the dense models of equal compute."""
    at_best = rates.ratios(study)
    rows = []
    for run in study.controlled:
        best = at_best.get(comparison.rounded(run["n_tokens"]))
        large = over(run, run["headline"]["model"], LARGE) if LARGE in run["equal_dense"] else None
        told = [shown(estimate) if estimate else "–" for estimate in (_gain(study, run), best, large)]
        rows.append([_tokens(run), *told])
    header = ["tokens per parameter", "over the strongest of an expert's size", "each at its best rate"]
    return table([*header, "over that with twice the layers"], rows)


def _tokens(run: Row) -> str:
    """Training tokens per parameter, in two or three digits."""
    tokens = per_parameter(run)
    return f"{tokens:.1f}" if tokens < 10 else f"{tokens:.0f}"


def _last_step(study: Study) -> str:
    """What the last doubling of k gained, in words."""
    *_, k, doubled = study.ks
    runs = [at for n in study.budgets if {k, doubled} <= set(at := study.at(n))]
    ratios = [at[doubled]["headline"]["perplexity"] / at[k]["headline"]["perplexity"] for at in runs]
    change = in_order(f"{100 * (ratio - 1):+.1f} %" for ratio in ratios)
    tokens = in_order(f"{_tokens(at[k])}" for at in runs)
    return f"From k = {k} to {doubled}, perplexity changed by {change} at {tokens}."


def _unbalanced(study: Study) -> list[str]:
    """What clusters that are not balanced gained, in words, where it was tried."""
    runs, estimates = study.changed("balance=none")
    if not runs:
        return []
    told = zip(runs, estimates, strict=True)
    found = in_order(f"{shown(estimate)} at {_tokens(run)}" for run, estimate in told)
    return [
        "**With few tokens, try clusters that are not balanced** (`cluster.balance: none`). Their perplexity "
        f"over that of balanced ones was {found} tokens per parameter. Balanced clusters are the default: no "
        "expert runs out of text before the others."
    ]


def _best_ks(study: Study, most: float) -> str:
    """The best k of each budget within a bound on the passes, in words."""
    found = {}
    for n_tokens in study.complete:
        best = best_within(study, n_tokens, most)
        if best:
            found[f"{_tokens(best[0])}"] = best[0]["k"]
    if len(set(found.values())) == 1:
        return f"k = {next(iter(found.values()))} was the best at {in_order(found)} tokens per parameter"
    return (
        "the best k was "
        + in_order(f"{k} at {tokens}" for tokens, k in found.items())
        + " tokens per parameter"
    )


def _cell(study: Study, found: tuple[Row, Row] | None) -> str:
    if found is None:
        return "–"
    run, row = found
    ratio = row["perplexity"] / study.strongest(run)["perplexity"]
    text = f"k = {run['k']}, {row['model']}: {ratio:.3f}"
    return f"**{text}**" if ratio < 1 else text


def evidence(study: Study) -> list[str]:
    """For each budget and each bound on the passes, the best k and setting."""
    rows = []
    for n_tokens in study.budgets:
        one = next(iter(study.at(n_tokens).values()))
        cells = [_cell(study, best_within(study, n_tokens, most)) for most in PASSES]
        rows.append([f"{per_parameter(one):.1f}", f"{millions(n_tokens)}{study.tried(n_tokens)}", *cells])
    return table(["tokens per parameter", "tokens", *(f"at most {most:g} passes" for most in PASSES)], rows)


def write(study: Study) -> str:
    """The page."""
    parts = {"rule": rule(study), "ratios": [*ratios(study), ""], "evidence": [*evidence(study), ""]}
    return filled("which_k.md", parts)
