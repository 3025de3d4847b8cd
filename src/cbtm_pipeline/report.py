"""Write the result for people: one page that needs no network and no JavaScript.

    python -m cbtm_pipeline.report --config config.yaml --metrics results/eval/metrics.json \\
        --top-terms results/cluster/top_terms.json --assignments results/assignments/manifest.json \\
        --shards results/shards/manifest.json --training results/experts/*/metrics.jsonl \\
        --out results/report.html
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline import config, plan
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.html import charts, sections
from cbtm_pipeline.html.page import Html, Number, count, join, page, section, table, tag

MAX_POINTS = 80  # of a loss curve
KEPT_SHARE = 0.97  # of the losses; the highest are cut off, so that the first steps do not flatten the curves

Curve = Sequence[tuple[float, float]]  # (tokens seen, loss)


class Report(NamedTuple):
    """Everything that the page shows."""

    cfg: config.Config
    metrics: dict[str, Any]
    top_terms: list[list[str]]  # of each cluster
    assignments: dict[str, Any]  # manifest
    shards: dict[str, Any]  # manifest
    losses: dict[str, Curve]  # by expert, from its training log


def read(
    cfg: config.Config,
    metrics: Path,
    top_terms: Path,
    assignments: Path,
    shards: Path,
    training: Iterable[Path],
) -> Report:
    """Read all inputs. The card.json beside a training log says which expert it belongs to.

    Raises ValueError when the files are not of one run, or when the log of an expert is missing.
    """
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
                f"{card_path}: not the {name} of {metrics}. Expected the weights that were evaluated. "
                "Run eval_ensemble again."
            )
        if name in plan.cluster_experts(cfg):
            artifact.check_made_from(card_path, card, "assignments", artifact.identity(assignments))
        losses[name] = read_losses(path)
    if missing := [name for name in result["weights"] if name not in losses]:
        raise ValueError(
            f"--training: no log of {', '.join(missing)}. Expected the metrics.jsonl of every expert. "
            "Add it to the command line."
        )
    return Report(cfg, result, terms["top_terms"], clusters, artifact.read_json(shards, "shards"), losses)


def read_losses(path: Path) -> Curve:
    """(tokens seen, loss) of every step of a training log. Raises ValueError for a line that is not a row."""
    points = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            points.append((float(row["n_tokens"]), float(row["loss"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: line {number} is not a row of a training log. Expected n_tokens and loss. "
                "Train this expert again."
            ) from error
    return points


def downsample(points: Curve, n: int = MAX_POINTS) -> Curve:
    """At most n points: cut the curve into n parts of about equal length, and take the mean of each."""
    if len(points) <= n:
        return list(points)
    edges = [round(i * len(points) / n) for i in range(n + 1)]
    parts = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(a for a, _ in part) / len(part), sum(b for _, b in part) / len(part)) for part in parts]


def clusters_section(report: Report) -> Html:
    """Size and top terms of each cluster."""
    n_documents, n_tokens = report.assignments["n_documents"], report.assignments["n_tokens"]
    reported = report.metrics["matrix"]["n_documents"]
    total, largest = sum(n_tokens), max(n_tokens)
    rows = [
        [
            str(j),
            count(n_documents[j]),
            count(n_tokens[j]),
            tag(
                "td",
                charts.bar(n_tokens[j] / largest, f"{n_tokens[j] / total:.1%} of the tokens"),
                class_="sizes",
            ),
            Number(f"{100 * n_tokens[j] / total:.1f} %"),
            count(reported[j]),
            tag("td", ", ".join(term.strip() for term in terms), class_="terms"),
        ]
        for j, terms in enumerate(report.top_terms)
    ]
    header = ["cluster", "documents", "tokens", "", "share", "reported documents", "terms that set it apart"]
    note = (
        f"Training documents, balanced by {report.cfg.cluster.balance}. "
        f"Largest cluster over the mean: {largest * len(n_tokens) / total:.3f} in tokens."
    )
    return section("Clusters", note, table(header, rows))


def training_section(report: Report) -> Html:
    """Training loss over tokens seen: the seed, then the experts and dense models that branch from it."""
    seed = report.losses["seed"]
    start = seed[-1][0] if seed else 0.0

    def branch(name: str, label: str, colour: str, style: str = "") -> charts.Series:
        points = [(start + n_tokens, loss) for n_tokens, loss in downsample(report.losses[name])]
        return charts.Series(label, colour, points, style)

    series = [charts.Series("seed", "grey", downsample(seed))] if seed else []
    for i, name in enumerate(plan.cluster_experts(report.cfg)):
        series.append(branch(name, "" if i else "experts", "c0", "thin"))
    for name, colour in zip(plan.dense_experts(report.cfg), ("c1", "c3", "c2"), strict=False):
        series.append(branch(name, name, colour))
    values = sorted(loss for s in series for _, loss in s.points)
    y_top = values[int(KEPT_SHARE * (len(values) - 1))]
    chart = charts.lines("Training loss", "tokens seen", "nats per token", series, y_top=y_top)
    note = (
        "Means over runs of steps. "
        "Each expert's loss is on its own cluster, so that lines compare in shape, not in height."
    )
    return section("Training", note, tag("div", chart, class_="charts"))


def run_section(report: Report) -> Html:
    """The corpus, the split of the held-out documents, and the configuration."""
    metrics, manifest = report.metrics, report.shards
    sizes = ("n_documents", "n_tokens", "n_bytes")
    rows = []
    for split, name in (("train", "training text"), ("eval", "held-out text")):
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        rows.append([name, *(count(sum(shard[size] for shard in shards)) for size in sizes)])
    calibration = metrics["calibration"]
    rows.append(["chosen on", count(calibration["n_documents"]), count(calibration["n_tokens"]), Number("")])
    rows.append(["reported on", *(count(metrics[size]) for size in sizes)])
    note = (
        f"{count(manifest['n_quarantined'])} rows of the input were left out; "
        "shards/quarantine.jsonl says which and why. "
        f"Vocabulary: {count(manifest['vocab_size'])} tokens, encoded by {manifest['encoder']}."
    )
    settings = [
        (f"{name}.{key}", json.dumps(value, ensure_ascii=False))
        for name, content in report.cfg.model_dump(exclude={"outdir", "run", "seed"}).items()
        for key, value in content.items()
    ]
    settings.append(("seed", str(report.cfg.seed)))
    every = tag("details", tag("summary", "Configuration"), table(["key", "value"], settings))
    return section("The run", note, table(["", "documents", "tokens", "bytes"], rows), every)


def render(report: Report) -> str:
    """The page. It depends on the report alone, not on time or place."""
    metrics = report.metrics
    title = f"Cluster-Branch-Train-Merge, k = {metrics['k']}"
    return page(
        title,
        join([tag("h1", title), sections.lead(metrics)]),
        sections.systems(metrics),
        sections.routers(metrics),
        clusters_section(report),
        sections.heat_map(metrics),
        training_section(report),
        sections.compute(metrics),
        run_section(report),
    )


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
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
    args = p.parse_args(argv)
    cli.start_logging("report", args.log)

    cfg = config.read(args.config)
    report = read(cfg, args.metrics, args.top_terms, args.assignments, args.shards, args.training)
    with artifact.publish(args.out) as tmp:
        tmp.write_text(render(report), "utf-8")
    cli.log.info("wrote %s", args.out)


if __name__ == "__main__":
    cli.run(main)
