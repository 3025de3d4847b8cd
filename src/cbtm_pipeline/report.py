"""The result for people: report.html, one page that needs no network and no JavaScript."""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline import config, plan
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.html import charts
from cbtm_pipeline.html.page import Html, Number, count, decimals, flops, join, page, table, tag
from cbtm_pipeline.mixture import verdict
from cbtm_pipeline.mixture.routers import ROUTERS

Row = dict[str, Any]

COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
MAX_POINTS = 80  # of a loss curve


class Run(NamedTuple):
    """All that the report tells: `losses[expert]` are (tokens, loss) of its training log."""

    cfg: config.Config
    metrics: dict[str, Any]
    top_terms: list[list[str]]
    assignments: dict[str, Any]
    shards: dict[str, Any]
    losses: dict[str, list[tuple[float, float]]]


def read(
    cfg: config.Config,
    metrics: Path,
    top_terms: Path,
    assignments: Path,
    shards: Path,
    training: Iterable[Path],
) -> Run:
    """Read and check that all is of one run. Whose training log it is, the card.json beside it says. Raises ValueError."""
    result, terms = artifact.read_json(metrics, "metrics"), artifact.read_json(top_terms, "top_terms")
    clusters = artifact.read_json(assignments, "assignments")
    artifact.check_made_from(assignments, clusters, "shards", artifact.identity(shards))
    artifact.check_made_from(top_terms, terms, "clusterer", clusters["made_from"].get("clusterer"))
    losses = {}
    for path in training:
        card_path = path.with_name("card.json")
        card = artifact.read_json(card_path, "expert")
        name = card["expert"]
        if card["weights"] != result["weights"].get(name):
            raise ValueError(
                f"{card_path}: not the {name} of {metrics}. Expected the weights that were evaluated. Run eval_ensemble again."
            )
        if name in plan.cluster_experts(cfg):
            artifact.check_made_from(card_path, card, "assignments", artifact.identity(assignments))
        losses[name] = read_losses(path)
    if missing := [name for name in result["weights"] if name not in losses]:
        raise ValueError(
            f"--training: no log of {', '.join(missing)}. Expected the metrics.jsonl of every expert. Name it."
        )
    return Run(cfg, result, terms["top_terms"], clusters, artifact.read_json(shards, "shards"), losses)


def read_losses(path: Path) -> list[tuple[float, float]]:
    """(tokens seen, loss) for every step of a training log. Raises ValueError for a line that is no row."""
    points = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            points.append((float(row["n_tokens"]), float(row["loss"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: line {number} is no row of a training log. Expected n_tokens and loss. Train it again."
            ) from error
    return points


def downsample(points: Sequence[tuple[float, float]], n: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most n points: the means of equal runs of the points."""
    if len(points) <= n:
        return list(points)
    edges = [round(i * len(points) / n) for i in range(n + 1)]
    parts = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(a for a, _ in part) / len(part), sum(b for _, b in part) / len(part)) for part in parts]


def section(title: str, note: str, *content: object) -> Html:
    return tag("section", tag("h2", title), tag("p", note, class_="note"), *content)


def lead(run: Run) -> Html:
    """The headline, never without its controls beside it."""
    m, best = run.metrics, verdict.headline(run.metrics)
    low, high = best["ci95"]
    outcome = (
        "The ensemble wins." if high < 1 else "Dense wins." if low > 1 else "There is no clear difference."
    )
    dense = next(row for row in m["systems"] if row["system"] == "dense")
    how = {"batch": "a k times larger batch", "steps": "k times more steps"}[m["dense"]]
    compute = f"{dense['train_flops'] / best['train_flops']:.2f} times its" if best["train_flops"] else "no"
    claim = tag(
        "p",
        f"The mixture of k = {m['k']} experts ({verdict.label(best)}) has a perplexity of ",
        tag("strong", decimals(best["perplexity"])),
        f" on {count(m['n_documents'])} held-out documents: ",
        tag("strong", f"{best['ratio_to_dense']:.3f} times"),
        f" that of the dense model with {how} and {compute} training FLOPs, 95 % interval {low:.3f} to {high:.3f}. {outcome}",
        class_="claim",
    )
    rows = [
        row
        for row in verdict.main_rows(m)
        if row["system"] != "ensemble" or row["headline"] or row["top_k"] == 1
    ]
    cells = [
        (verdict.label(row), decimals(row["perplexity"]), decimals(row["ratio_to_dense"], 3)) for row in rows
    ]
    controls = table(
        ["", "perplexity", "to dense"], cells, marked=[i for i, row in enumerate(rows) if row is best]
    )
    said = tag("ul", *(tag("li", sentence) for sentence in m["verdict"][1:]))
    return tag(
        "div",
        tag("div", claim, said),
        tag("aside", tag("h3", "With its controls"), controls, class_="controls"),
        class_="lead",
    )


def systems_table(rows: Sequence[Row]) -> Html:
    others = [name for name in rows[0]["ratios"] if name != "dense"]
    header = [
        "system",
        "perplexity",
        "ratio to dense",
        *(f"ratio to {name}" for name in others),
        "bits per byte",
    ]
    body = [
        [
            verdict.label(row) + (" ★" if row["headline"] else ""),
            decimals(row["perplexity"]),
            *(Number(verdict.interval(**row["ratios"][name])) for name in ("dense", *others)),
            decimals(row["bits_per_byte"], 4),
            *(Number(verdict.short(row[key])) for key in ("temperature", "epsilon", "beta")),
            Number("–" if row["n_active"] is None else row["n_active"]),
            flops(row["train_flops"]),
        ]
        for row in rows
    ]
    header += ["T", "ε", "β", "models per token", "training FLOPs"]
    return table(header, body, marked=[i for i, row in enumerate(rows) if row["headline"]])


def systems(m: dict[str, Any]) -> Html:
    main = verdict.main_rows(m)
    note = (
        f"★ best of its router. T, ε, β and ★ were chosen on {m['calibration']['n_documents']} other held-out documents. "
        "Brackets: 95 % interval, paired bootstrap over documents. FLOPs: all training that the system needed, the seed's included."
    )
    estimates = [
        charts.Estimate(
            verdict.label(row),
            row["ratio_to_dense"],
            row["ci95"],
            ROUTERS[row["router"]].colour if row["router"] in ROUTERS else "grey",
        )
        for row in main
        if row["system"] != "dense"
    ]
    every = tag("details", tag("summary", f"All {len(m['systems'])} systems"), systems_table(m["systems"]))
    plot = charts.forest("Perplexity relative to dense, with 95 % intervals", estimates)
    return section("Systems", note, systems_table(main), every, tag("div", plot, class_="charts"))


def curves(m: dict[str, Any]) -> Html:
    """Perplexity over top_k at the chosen settings, and over the temperature for each router and top_k."""
    ensembles = [row for row in m["systems"] if row["system"] == "ensemble"]
    routers = list(dict.fromkeys(row["router"] for row in ensembles))
    levels = [
        charts.Series(row["system"], colour, [(1, row["perplexity"])], "dashed")
        for name, colour in (("dense", "grey"), ("uniform", "c4"), ("oracle", "c2"))
        for row in m["systems"]
        if row["system"] == name
    ]
    by_top_k = [
        charts.Series(
            router,
            ROUTERS[router].colour,
            sorted((row["top_k"], row["perplexity"]) for row in chosen),
            dots=True,
        )
        for router in routers
        if (chosen := [row for row in ensembles if row["router"] == router and row["calibrated"]])
    ]
    drawn = [
        charts.lines(
            "Experts mixed per token",
            "top_k, at the chosen settings",
            "perplexity",
            [*levels, *by_top_k],
            log_x=True,
        )
    ]
    for router in routers:
        top_ks = sorted({row["top_k"] for row in ensembles if row["router"] == router})
        series = [
            charts.Series(
                f"top_k {top_k}",
                COLOURS[i % len(COLOURS)],
                sorted(
                    (row["temperature"], row["perplexity"])
                    for row in ensembles
                    if (row["router"], row["top_k"]) == (router, top_k)
                ),
                dots=True,
            )
            for i, top_k in enumerate(top_ks)
        ]
        drawn.append(
            charts.lines(
                f"Temperature of the router {router}", "T", "perplexity", [levels[0], *series], log_x=True
            )
        )
    note = "On the reported documents; the settings were chosen on others."
    return section("Routers", note, tag("div", *drawn, class_="charts"))


def clusters(run: Run) -> Html:
    a, matrix = run.assignments, run.metrics["matrix"]
    total = sum(a["n_tokens"])
    rows = [
        [
            str(j),
            count(a["n_documents"][j]),
            count(a["n_tokens"][j]),
            tag(
                "td",
                charts.bar(
                    a["n_tokens"][j] / max(a["n_tokens"]), f"{a['n_tokens'][j] / total:.1%} of the tokens"
                ),
                class_="sizes",
            ),
            Number(f"{100 * a['n_tokens'][j] / total:.1f} %"),
            count(matrix["n_documents"][j]),
            tag("td", ", ".join(term.strip() for term in terms), class_="terms"),
        ]
        for j, terms in enumerate(run.top_terms)
    ]
    header = ["cluster", "documents", "tokens", "", "share", "reported documents", "terms that set it apart"]
    largest = max(a["n_tokens"]) * len(a["n_tokens"]) / total
    note = f"Training documents, balanced by {run.cfg.cluster.balance}. Largest cluster over the mean: {largest:.3f} in tokens."
    return section("Clusters", note, table(header, rows))


def heat_map(m: dict[str, Any]) -> Html:
    """Perplexity of each expert on each cluster, coloured by its ratio to dense there."""
    matrix = m["matrix"]
    logs = [
        math.log(p / d)
        for line in matrix["perplexity"]
        for p, d in zip(line, matrix["dense"], strict=True)
        if p and d
    ]
    scale = max(map(abs, logs), default=0) or 1.0

    def cell(perplexity: float | None, dense: float | None) -> Html:
        if perplexity is None or dense is None:
            return tag("td", "–")
        log_ratio = math.log(perplexity / dense)
        style = f"background: rgb(var(--{'good' if log_ratio < 0 else 'bad'}) / {0.75 * abs(log_ratio) / scale:.3f})"
        return tag("td", decimals(perplexity), style=style, title=f"{perplexity / dense:.3f} times dense")

    rows = [
        [f"expert {name}", *(cell(p, d) for p, d in zip(line, matrix["dense"], strict=True))]
        for name, line in zip(matrix["experts"], matrix["perplexity"], strict=True)
    ]
    rows.append(["dense", *(tag("td", decimals(d)) for d in matrix["dense"])])
    header = ["", *(Number(f"cluster {j}") for j in range(m["k"]))]
    note = "Perplexity on the reported documents of each cluster. Blue: below dense there; orange: above."
    return section("Experts and clusters", note, table(header, rows, class_="heat"))


def losses(run: Run) -> Html:
    """Training loss over tokens seen: the seed, and what branches off from it. The random control is left out."""
    seed = run.losses["seed"]
    start = seed[-1][0] if seed else 0.0
    series = [charts.Series("seed", "grey", downsample(seed))] if seed else []
    for i, name in enumerate(plan.cluster_experts(run.cfg)):
        series.append(
            charts.Series(
                "" if i else "experts",
                "c0",
                [(start + n, loss) for n, loss in downsample(run.losses[name])],
                "thin",
            )
        )
    for name, colour in zip(plan.dense_experts(run.cfg), ("c1", "c3", "c2"), strict=False):
        series.append(
            charts.Series(name, colour, [(start + n, loss) for n, loss in downsample(run.losses[name])])
        )
    values = sorted(loss for s in series for _, loss in s.points)
    chart = charts.lines(
        "Training loss", "tokens seen", "nats per token", series, y_top=values[int(0.97 * (len(values) - 1))]
    )
    note = "Means over runs of steps. Each expert's loss is on its own cluster, so that lines compare in shape, not in height."
    return section("Training", note, tag("div", chart, class_="charts"))


def compute(m: dict[str, Any]) -> Html:
    cost = m["flops"]
    names = ["seed", "experts", *(name for name in cost if name.startswith("dense")), "random"]
    trained = [(f"{name}, training", flops(cost[name])) for name in names if name in cost]
    actives = sorted({row["n_active"] for row in m["systems"] if row["n_active"]})
    run = [
        (f"{n} model{'s' if n > 1 else ''}, per token", flops(n * cost["forward_per_token"])) for n in actives
    ]
    note = "Training of seed, experts and controls apart. Embedding and clustering need no accelerator and are not counted."
    return section("Compute", note, table(["", "FLOPs"], [*trained, *run]))


def about(run: Run) -> Html:
    m, s = run.metrics, run.shards
    splits = [
        [
            {"train": "training text", "eval": "held-out text"}[split],
            *(
                count(sum(shard[key] for shard in s["shards"] if shard["split"] == split))
                for key in ("n_documents", "n_tokens", "n_bytes")
            ),
        ]
        for split in ("train", "eval")
    ]
    splits.append(
        ["chosen on", count(m["calibration"]["n_documents"]), count(m["calibration"]["n_tokens"]), Number("")]
    )
    splits.append(["reported on", *(count(m[key]) for key in ("n_documents", "n_tokens", "n_bytes"))])
    left_out = f"{count(s['n_quarantined'])} rows of the input were left out; shards/quarantine.jsonl says which and why. "
    note = left_out + f"Vocabulary: {count(s['vocab_size'])} tokens, encoded by {s['encoder']}."
    settings = [
        (f"{name}.{key}", json.dumps(value, ensure_ascii=False))
        for name, content in run.cfg.model_dump(exclude={"outdir", "run", "seed"}).items()
        for key, value in content.items()
    ]
    settings.append(("seed", str(run.cfg.seed)))
    every = tag("details", tag("summary", "Configuration"), table(["key", "value"], settings))
    return section("The run", note, table(["", "documents", "tokens", "bytes"], splits), every)


def render(run: Run) -> str:
    """The page, a function of the run alone."""
    title = f"Cluster-Branch-Train-Merge, k = {run.metrics['k']}"
    m = run.metrics
    parts = [systems(m), curves(m), clusters(run), heat_map(m), losses(run), compute(m), about(run)]
    return page(title, join([tag("h1", title), lead(run)]), *parts)


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--metrics", required=True, type=Path, help="eval/metrics.json")
    p.add_argument("--top-terms", required=True, type=Path, help="cluster/top_terms.json")
    p.add_argument("--assignments", required=True, type=Path, help="assignments/manifest.json")
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument(
        "--training",
        required=True,
        type=Path,
        nargs="+",
        help="metrics.jsonl of the seed and of every expert, in any order",
    )
    p.add_argument("--out", required=True, type=Path, help="report.html")
    args = p.parse_args()
    cli.start_logging("report", args.log)

    run = read(
        config.read(args.config), args.metrics, args.top_terms, args.assignments, args.shards, args.training
    )
    with artifact.publish(args.out) as tmp:
        tmp.write_text(render(run), "utf-8")
    cli.log.info("wrote %s", args.out)


if __name__ == "__main__":
    cli.run(main)
