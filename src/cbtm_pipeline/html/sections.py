"""Sections of the report that come from metrics.json alone: claim, systems, routers, heat map, compute."""

import math
from collections.abc import Sequence
from typing import Any

from cbtm_pipeline.html import charts
from cbtm_pipeline.html.names import names
from cbtm_pipeline.html.page import Html, Number, count, decimals, flops, section, table, tag
from cbtm_pipeline.mixture import search, task_table, verdict
from cbtm_pipeline.mixture.routers import ROUTERS

Metrics = dict[str, Any]
Row = dict[str, Any]  # an entry of `systems` in metrics.json

SETTINGS = ("temperature", "epsilon", "beta", "hysteresis", "fix_after")
HOW = {"k x batch": "a k times larger batch", "k x steps": "k times more steps"}  # other kinds say it
PARAMETERS = ("n_parameters", "n_active_parameters")  # older metrics.json lack them
COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
LEVELS = (
    ("dense", "grey"),
    ("uniform", "c4"),
    ("oracle", "c2"),
)  # systems drawn as dashed lines, with colours


def lead(metrics: Metrics) -> Html:
    """The headline result, with its control systems beside it.

    The sentences are made here again: those of an older metrics.json may begin with another dense model.
    """
    sentences = tag("ul", *(tag("li", sentence) for sentence in verdict.sentences(metrics)[1:]))
    warned = [tag("li", text) for text in metrics.get("warnings", [])]
    warnings = [tag("ul", *warned, class_="warnings")] if warned else []
    aside = tag("div", tag("p", "With its controls", class_="title"), _controls(metrics), class_="controls")
    return tag("div", tag("div", _claim(metrics), sentences, *warnings), aside, class_="lead")


def _claim(metrics: Metrics) -> Html:
    """Whether the best mixture of experts or the strongest dense model wins, and by how much."""
    best, name = verdict.headline(metrics), verdict.strongest_dense(metrics)
    ratio = best["ratios"][name]
    ci95 = ratio["ci95"]
    known = f"95 % interval {ci95[0]:.3f} to {ci95[1]:.3f}" if ci95 else "without an interval"
    kind = verdict.dense_kind(metrics, name)
    how = HOW.get(kind, kind)
    compute = verdict.compute_of(metrics, name).replace(" x", " times")
    return tag(
        "p",
        f"The mixture of k = {metrics['k']} experts ({verdict.label(best)}) has a perplexity of ",
        tag("strong", decimals(best["perplexity"])),
        f" on {count(metrics['n_documents'])} held-out documents: ",
        tag("strong", f"{ratio['ratio']:.3f} times"),
        f" that of {name}, the strongest dense model of equal compute ",
        f"({how}, {compute} the training FLOPs), ",
        f"{known}. {verdict.outcome(metrics)}",
        class_="claim",
    )


def _controls(metrics: Metrics) -> Html:
    """A short table: the main rows, and of the ensembles the best of each router and those of top_k 1."""
    best, strongest = verdict.headline(metrics), verdict.strongest_dense(metrics)
    rows = [
        row
        for row in verdict.main_rows(metrics)
        if row["system"] != "ensemble" or row["headline"] or (row["top_k"] == 1 and not verdict.stays(row))
    ]
    cells = [
        (
            verdict.label(row),
            decimals(row["perplexity"]),
            decimals(row["ratios"][strongest]["ratio"], 3),
        )
        for row in rows
    ]
    marked = [i for i, row in enumerate(rows) if row is best]
    return table(["system", "perplexity", f"to {strongest}"], cells, marked=marked, label="The main systems")


def systems(metrics: Metrics) -> Html:
    """Tables of the main systems and of all systems, and a plot of their ratios to dense."""
    note = (
        f"★ best of its router. T, ε, β and ★ were chosen on {metrics['calibration']['n_documents']} "
        "other held-out documents. Brackets: 95 % interval, paired bootstrap over documents. "
        "Sticky: an active expert is replaced only by one that weighs so many times more (hysteresis). "
        "Fixed: by none after so many tokens. Passes per token: expert passes, catching up included. "
        "FLOPs: all training that the system needed, the seed's included. "
        "Parameters per token: of the models that read a token, each with its embedding."
    )
    main, every = verdict.main_rows(metrics), metrics["systems"]
    strongest = verdict.strongest_dense(metrics)
    estimates = [
        charts.Estimate(verdict.label(row), ratio["ratio"], ratio["ci95"], _colour(row))
        for row in main
        if row["system"] != strongest and (ratio := row["ratios"][strongest])
    ]
    details = tag(
        "details", tag("summary", f"All {len(every)} systems"), _systems_table(every, "All systems")
    )
    title = f"Perplexity relative to {strongest}, with 95 % intervals"
    plot = charts.forest(title, estimates)
    whole = _systems_table(main, "Systems"), tag("div", plot, class_="charts"), names()
    return section("Systems", note, *whole, details)


def _colour(row: Row) -> str:
    """The colour of its router; grey for a system without one of the table."""
    return ROUTERS[row["router"]].colour if row["router"] in ROUTERS else "grey"


def _systems_table(rows: Sequence[Row], label: str) -> Html:
    others = [name for name in rows[0]["ratios"] if name != "dense"]
    searched = "search_flops" in rows[0]
    header = [
        *("system", "perplexity", "ratio to dense"),
        *(f"ratio to {name}" for name in others),
        *("bits per byte", "T", "ε", "β", "hysteresis", "fixed after"),
        *("models per token", "parameters", "parameters per token", "passes per token", "training FLOPs"),
        *(["FLOPs with search"] if searched else []),
    ]
    cells = [
        [
            verdict.label(row) + (" ★" if row["headline"] else ""),
            decimals(row["perplexity"]),
            *(Number(verdict.interval(**row["ratios"][name])) for name in ("dense", *others)),
            decimals(row["bits_per_byte"], 4),
            *(Number(verdict.short(row.get(key))) for key in SETTINGS),
            Number("–" if row["n_active"] is None else row["n_active"]),
            *(Number("–") if row.get(key) is None else count(row[key]) for key in PARAMETERS),
            Number(verdict.short(row.get("passes")) or "–"),
            flops(row["train_flops"]),
            *([flops(row["search_flops"])] if searched else []),
        ]
        for row in rows
    ]
    marked = [i for i, row in enumerate(rows) if row["headline"]]
    return table(header, cells, marked=marked, label=label)


def routers(metrics: Metrics) -> Html:
    """Perplexity over top_k at the chosen settings, and for each router over the temperature."""
    ensembles = [row for row in metrics["systems"] if row["system"] == "ensemble" and not verdict.stays(row)]
    levels = [
        charts.Series(row["system"], colour, [(1, row["perplexity"])], "dashed")
        for name, colour in LEVELS
        for row in metrics["systems"]
        if row["system"] == name
    ]
    names = list(dict.fromkeys(row["router"] for row in ensembles))
    by_name = {name: [row for row in ensembles if row["router"] == name] for name in names}
    drawn = [_top_k_chart(by_name, levels)]
    drawn += [_temperature_chart(name, rows, levels[0]) for name, rows in by_name.items()]
    note = "On the reported documents; the settings were chosen on others."
    return section("Routers", note, tag("div", *drawn, class_="charts"))


def _top_k_chart(by_router: dict[str, list[Row]], levels: list[charts.Series]) -> Html:
    """One line for each router: perplexity over top_k at the calibrated settings."""
    series = []
    for router, rows in by_router.items():
        points = sorted((row["top_k"], row["perplexity"]) for row in rows if row["calibrated"])
        series.append(charts.Series(router, ROUTERS[router].colour, points, dots=True))
    title, x_label = "Experts mixed per token", "top_k, at the chosen settings"
    return charts.lines(title, x_label, "perplexity", [*levels, *series], log_x=True)


def _temperature_chart(router: str, rows: list[Row], dense: charts.Series) -> Html:
    """One line for each top_k: perplexity of one router over the temperature."""
    series = []
    for i, top_k in enumerate(sorted({row["top_k"] for row in rows})):
        points = sorted((row["temperature"], row["perplexity"]) for row in rows if row["top_k"] == top_k)
        series.append(charts.Series(f"top_k {top_k}", COLOURS[i % len(COLOURS)], points, dots=True))
    title = f"Temperature of the router {router}"
    return charts.lines(title, "T", "perplexity", [dense, *series], log_x=True)


def tasks(content: dict[str, Any]) -> Html:
    """The results of the tasks. `content` is that of eval/tasks.json."""
    models = content["models"]
    rows = []
    for row in content["rows"]:
        task, *others = task_table.cells(row, models)
        rows.append([task, others[0], *map(Number, others[1:])])
    note = "Value ± standard error, by lm-evaluation-harness. ensemble-top1 runs one expert at a token."
    return section("Tasks", note, table(task_table.header(models), rows, label="Tasks"))


def heat_map(metrics: Metrics) -> Html:
    """Perplexity of each expert on each cluster, coloured by its ratio to dense there."""
    matrix = metrics["matrix"]
    log_ratios = [
        math.log(perplexity / dense)
        for line in matrix["perplexity"]
        for perplexity, dense in zip(line, matrix["dense"], strict=True)
        if perplexity and dense
    ]
    scale = max(map(abs, log_ratios), default=0) or 1.0

    def cell(perplexity: float | None, dense: float | None) -> Html:
        if perplexity is None or dense is None:
            return tag("td", "–")
        log_ratio = math.log(perplexity / dense)
        colour, opacity = "good" if log_ratio < 0 else "bad", 0.75 * abs(log_ratio) / scale
        style = f"background: rgb(var(--{colour}) / {opacity:.3f})"
        return tag("td", decimals(perplexity), style=style, title=f"{perplexity / dense:.3f} times dense")

    rows = [
        [f"expert {name}", *(cell(p, d) for p, d in zip(line, matrix["dense"], strict=True))]
        for name, line in zip(matrix["experts"], matrix["perplexity"], strict=True)
    ]
    rows.append(["dense", *(tag("td", decimals(dense)) for dense in matrix["dense"])])
    header = ["model", *(Number(f"cluster {j}") for j in range(metrics["k"]))]
    note = "Perplexity on the reported documents of each cluster. Blue: below dense there; orange: above."
    whole = table(header, rows, class_="heat", label="Perplexity of each expert on each cluster")
    return section("Experts and clusters", note, whole, *_use(metrics))


def _use(metrics: Metrics) -> list[Html]:
    """How much the headline mixture uses each expert, if metrics.json says it."""
    if "use" not in metrics:
        return []
    use, best = metrics["use"], verdict.headline(metrics)
    rows = [
        (f"expert {name}", Number(f"{100 * mean:.1f} %"), Number(f"{100 * largest:.1f} %"))
        for name, mean, largest in zip(
            metrics["matrix"]["experts"], use["mean_weight"], use["largest"], strict=True
        )
    ]
    header = ["model", "mean weight", "tokens where its weight is largest"]
    about = f"How much {verdict.label(best)} uses each expert, over all tokens of the reported documents."
    return [tag("p", about, class_="note"), table(header, rows, label="Use of each expert")]


def compute(metrics: Metrics) -> Html:
    """FLOPs of each training, and of a token for each number of models that run at once."""
    cost = metrics["flops"]
    names = [
        "seed",
        "parents",
        "first",
        "experts",
        *(name for name in cost if name.startswith("dense")),
        "random",
    ]
    training = [(f"{name}, training", flops(cost[name])) for name in names if name in cost]
    if "second_round" in cost:
        training.append(("second round, scoring of training documents", flops(cost["second_round"])))
    n_models = sorted({row["n_active"] for row in metrics["systems"] if row["n_active"]})
    inference = [
        (f"{n} model{'s' if n > 1 else ''}, per token", flops(n * cost["forward_per_token"]))
        for n in n_models
    ]
    large = cost.get("forward_per_token_dense-large")
    inference += [("dense-large, per token", flops(large))] if large else []
    note = (
        "Training of seed, experts and controls apart. "
        "Embedding and clustering need no accelerator and are not counted."
    )
    whole = table(["what", "FLOPs"], [*training, *inference], label="Compute")
    return section("Compute", note, whole, *_search(metrics))


def _search(metrics: Metrics) -> list[Html]:
    """The learning rates that were tried, if rates were searched: losses, FLOPs, and what was chosen."""
    found = metrics.get("search")
    if not found:
        return []
    rates = search.rates(found)
    rows = [
        [
            kind,
            Number(f"{choice['chosen']:g}"),
            *(decimals(row["validation_loss"], 4) for row in choice["candidates"]),
            flops(sum(row["train_flops"] for row in choice["candidates"])),
        ]
        for kind, choice in found.items()
    ]
    header = ["model", "chosen rate", *(f"loss with {rate:g}" for rate in rates), "FLOPs of all rates"]
    about = (
        f"Of {len(rates)} learning rates, each kind of model got the one with the lowest loss "
        "(nats per token) on validation documents, which are not reported on. A dash: the training diverged. "
        "The training FLOPs above are those of the chosen rates."
    )
    return [tag("p", about, class_="note"), table(header, rows, label="Search for learning rates")]
