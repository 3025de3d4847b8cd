"""The page of a study, or of runs side by side: pictures first, then every number."""

from collections.abc import Callable

from cbtm_pipeline.html import charts
from cbtm_pipeline.html.page import Html, Number, count, decimals, flops, join, page, section, table, tag
from cbtm_pipeline.mixture import comparison_table, verdict
from cbtm_pipeline.mixture.comparison import Content, Row, others_of

COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
LABELS = {"perplexity": "perplexity", "bits_per_byte": "bits per byte"}
RATIO = "perplexity, relative to the strongest dense model"
TOKENS = "training tokens of all experts together"


def render(content: Content, title: str) -> str:
    """The page. It depends on the content alone, not on time or place."""
    return page(
        title,
        join([tag("h1", title), _lead(content)]),
        *_budget(content),
        _cost(content),
        _runs(content),
        *_seeds(content),
        *([_pairs(content)] if content["pairs"] else []),
        _models(content),
    )


def _lead(content: Content) -> Html:
    """The best run, and the best k for each budget."""
    unit = content["unit"]
    best = min(content["runs"], key=lambda row: row["headline"][unit])
    claim = tag(
        "p",
        f"Of {len(content['runs'])} runs, ",
        tag("strong", best["run"]),
        f" predicts best: its mixture of k = {best['k']} experts ({best['headline']['model']}) has ",
        tag("strong", comparison_table.figure(best["headline"][unit], unit)),
        f" {LABELS[unit]}, {verdict.interval(best['headline']['ratio'], best['headline']['ci95'])} times the "
        f"perplexity of {best['dense']}, its strongest dense model of equal compute.",
        class_="claim",
    )
    items = [
        f"{comparison_table.setting_text(row['setting']) or 'At'}"
        f"{', at' if row['setting'] else ''} {charts.brief(row['n_tokens'])} tokens, k = {row['k']} is best "
        f"of {', '.join(map(str, row['tried']))} (ratio to dense {row['ratio']:.3f})."
        for row in content["best_k"]
    ]
    found = tag("ul", *(tag("li", text) for text in [*items, *comparison_table.notes(content)]))
    return tag("div", tag("div", claim, found), class_="lead")


def _budget(content: Content) -> list[Html]:
    """Ratio to dense and best k against tokens, if there are several budgets."""
    groups = content["groups"]
    if len({group["n_tokens"] for group in groups}) < 2:
        return []
    lines: dict[str, list[Row]] = {}
    for group in sorted(groups, key=lambda group: (group["k"], repr(others_of(group)))):
        others = comparison_table.setting_text(others_of(group))
        lines.setdefault(f"k = {group['k']}" + (f", {others}" if others else ""), []).append(group)
    ratios = _series(lines, lambda group: group["ratio"])
    ones = charts.Series("dense", "grey", [(1, 1)], "dashed")
    drawn = [charts.lines("Ratio to dense", TOKENS, RATIO, [ones, *ratios], log_x=True)]
    losses = _series(lines, lambda group: group[content["unit"]])
    drawn.append(charts.lines("Held-out loss", TOKENS, LABELS[content["unit"]], losses, log_x=True))
    best: dict[str, list[Row]] = {}
    for row in content["best_k"]:
        best.setdefault(comparison_table.setting_text(row["setting"]) or "best k", []).append(row)
    if best:
        points = _series(best, lambda row: row["k"])
        drawn.append(charts.lines("Best k", TOKENS, "k of the best ensemble", points, log_x=True))
    note = (
        "Below 1, the mixture of experts is better than the strongest dense model of equal compute. Runs "
        "that differ in their seed alone are one point, the geometric mean. The best k has the lowest "
        "held-out loss of those tried at the same budget."
    )
    return [section("Against the budget", note, tag("div", *drawn, class_="charts"))]


def _series(lines: dict[str, list[Row]], value: Callable[[Row], float]) -> list[charts.Series]:
    """A line for each name: a value over the tokens."""
    return [
        charts.Series(
            name,
            COLOURS[i % len(COLOURS)],
            sorted((row["n_tokens"], value(row)) for row in rows),
            dots=True,
        )
        for i, (name, rows) in enumerate(lines.items())
    ]


def _cost(content: Content) -> Html:
    """Quality against training FLOPs and against active parameters: one point for each model of each run."""
    unit = content["unit"]
    kinds: dict[str, list[tuple[Row, Row]]] = {}
    for row in content["runs"]:
        for model in row["models"]:
            if name := _kind(model):
                kinds.setdefault(name, []).append((row, model))
    drawn = []
    for title, key, label in (
        ("Quality against training", "train_flops", "training FLOPs, the seed's included"),
        ("Quality against inference", "active_parameters", "active parameters per token"),
    ):
        series = []
        for i, (name, models) in enumerate(
            sorted(kinds.items(), key=lambda kind: (kind[0] != "dense", kind[1][0][1]["k"] or 0))
        ):
            points = sorted((model[key], model[unit]) for _, model in models if model[key])
            colour = "grey" if name == "dense" else COLOURS[(i - 1) % len(COLOURS)]
            if points:
                series.append(charts.Series(name, colour, points, "points", dots=True))
        if series:
            drawn.append(charts.lines(title, label, LABELS[unit], series, log_x=True))
    note = (
        "One point for each model of each run; lower and further left is better. An ensemble has the "
        "parameters of its active experts; what new ones have to catch up is in the passes, below."
    )
    return section("Against the cost", note, tag("div", *drawn, class_="charts"))


def _kind(model: Row) -> str | None:
    """The group of points that a model belongs to; None for what is no system to choose."""
    if model["system"].startswith("dense"):
        return "dense"
    return f"ensemble, k = {model['k']}" if model["system"] == "ensemble" else None


def _runs(content: Content) -> Html:
    """The settings and the headline of each run."""
    unit, keys = content["unit"], comparison_table.short_keys(content["differs"])
    header = ["run", *keys, "tokens", "ensemble", LABELS[unit], "strongest dense", "ratio to it"]
    header += ["passes per token", "active parameters", "training FLOPs"]
    best = min(content["runs"], key=lambda row: row["headline"][unit])
    cells = [
        [
            row["run"],
            *(_value(row["setting"][key]) for key in content["differs"]),
            *(count(row["n_tokens"]), row["headline"]["model"]),
            Number(comparison_table.figure(row["headline"][unit], unit)),
            row["dense"],
            Number(verdict.interval(row["headline"]["ratio"], row["headline"]["ci95"])),
            Number(verdict.short(row["headline"]["passes"])),
            count(row["headline"]["active_parameters"]),
            flops(row["headline"]["train_flops"]),
        ]
        for row in content["runs"]
    ]
    marked = [i for i, row in enumerate(content["runs"]) if row is best]
    ratios = [
        charts.Estimate(row["run"], row["headline"]["ratio"], row["headline"]["ci95"], "c0")
        for row in content["runs"]
    ]
    plot = charts.forest("Ratio to the strongest dense model, with 95 % intervals", ratios)
    note = "The settings that differ. Bold: the run that predicts best. Brackets: 95 % interval."
    whole = table(header, cells, marked=marked, label="Runs")
    return section("Runs", note, whole, tag("div", plot, class_="charts"))


def _seeds(content: Content) -> list[Html]:
    """Settings that were run with several seeds, if there are any."""
    header, *rows = comparison_table.over_seeds(content) or [()]
    if not rows:
        return []
    cells = [[text, *(Number(value) for value in values)] for text, *values in rows]
    note = "Geometric means over random seeds. Intervals are of Student's t on the logarithms of the ratios."
    return [section("Over seeds", note, table(list(header), cells, label="Over seeds"))]


def _value(setting: object) -> str:
    text = comparison_table.value(setting)
    return Number(text) if isinstance(setting, int | float) else text


def _pairs(content: Content) -> Html:
    """The best ensembles of two runs, on the documents that both report."""
    per = content["pairs"][0]["per"]
    cells = [
        (
            *(pair["run"], pair["against"]),
            *(Number(comparison_table.pair_ratio(pair)), count(pair["n_documents"])),
        )
        for pair in content["pairs"]
    ]
    note = f"Ratios of perplexities per {per}, with 95 % intervals: paired bootstrap over these documents."
    return section(
        "Run against run", note, table(["run", "against", "ratio", "documents"], cells, label="Pairs")
    )


def _models(content: Content) -> Html:
    """Every main model of every run."""
    header = ["model", "run", "perplexity", "bits per byte", "ratio to dense", "ratio to the strongest dense"]
    header += ["models per token", "passes per token", "active parameters", "training FLOPs"]
    cells = [
        [
            *(model["model"] + (" ★" if model["is_headline"] else ""), row["run"]),
            *(decimals(model["perplexity"]), decimals(model["bits_per_byte"], 4)),
            Number(verdict.interval(**model["ratios"]["dense"])),
            Number(verdict.interval(model["ratio"], model["ci95"])),
            Number("–" if model["n_active"] is None else model["n_active"]),
            Number(verdict.short(model["passes"]) or "–"),
            Number("–") if model["active_parameters"] is None else count(model["active_parameters"]),
            flops(model["train_flops"]),
        ]
        for row in content["runs"]
        for model in row["models"]
    ]
    note = "★ best of its router. Each run reports on its own documents."
    details = tag(
        "details", tag("summary", f"All {len(cells)} models"), table(header, cells, label="All models")
    )
    return section("Models", note, details)
