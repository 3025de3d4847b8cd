"""Write the result for people: one page that needs no network and no JavaScript.

Its settings are those that the artifacts were made with, not those of a config.

    python -m cbtm_pipeline.report --metrics results/eval/metrics.json \\
        --top-terms results/cluster/top_terms.json --assignments results/assignments/manifest.json \\
        --shards results/shards/manifest.json --training results/experts/*/metrics.jsonl \\
        --out results/report.html
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline import plan
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.corpus import heldout
from cbtm_pipeline.html import charts, sections, texts
from cbtm_pipeline.html.page import Html, Number, count, join, page, section, table, tag
from cbtm_pipeline.provenance import expert_files, made_from, records

MAX_POINTS = 80  # of a loss curve
KEPT_SHARE = 0.97  # of the losses; the highest are cut off, so that the first steps do not flatten the curves

Curve = Sequence[tuple[float, float]]  # (tokens seen, loss)


class Report(NamedTuple):
    """Everything that the page shows."""

    metrics: dict[str, Any]
    top_terms: list[list[str]]  # of each cluster
    assignments: dict[str, Any]  # manifest
    shards: dict[str, Any]  # manifest
    losses: dict[str, Curve]  # by expert, from its training log
    plans: dict[str, dict[str, Any]]  # by rule, and of each training by expert: what each was made with
    made_from: dict[str, str]
    examples: Sequence[texts.Text] = ()  # documents coloured by expert
    tasks: dict[str, Any] | None = None  # eval/tasks.json


class Files(NamedTuple):
    """The files that the page is made from. `records`: further artifacts whose plans it shows."""

    metrics: Path
    top_terms: Path
    assignments: Path
    shards: Path
    training: Sequence[Path]
    records: Sequence[Path]
    tokenizer: Path | None = None
    tasks: Path | None = None


def read(files: Files) -> Report:
    """Read all inputs. The card.json beside a training log says which expert it belongs to.

    Raises ValueError when the files are not of one run, or when the log of an expert is missing.
    """
    metrics, terms = (
        artifact.read_sealed(files.metrics, "metrics"),
        artifact.read_sealed(files.top_terms, "top_terms"),
    )
    clusters = artifact.read_sealed(files.assignments, "assignments")
    shards = artifact.read_sealed(files.shards, "shards")
    for name, split in (("shards", "train"), ("held_out", "eval")):
        artifact.check_made_from(files.assignments, clusters, name, shards[f"identity_{split}"])
    artifact.check_made_from(files.top_terms, terms, "clusterer", clusters["made_from"].get("clusterer", ""))
    others: dict[str, dict[str, Any]] = {}
    for path in files.records:
        rule = records.rule_of(path)
        others[rule] = artifact.read_record(path, records.PLACES[rule].kind)
    losses = {}
    for path in files.training:
        name, card, curve = _read_training(path, files.metrics, metrics)
        data, group = plan.data_of(name)
        if data != "random":
            tokens = made_from.tokens(group, clusters if data == "clusters" else shards)
            artifact.check_made_from(path.with_name("card.json"), card, "tokens", tokens)
        losses[name] = curve
        others[f"train_expert {name}"] = card
    if missing := [name for name in metrics["weights"] if name not in losses]:
        raise ValueError(
            f"--training: no log of {', '.join(missing)}. Expected the metrics.jsonl of every expert. "
            "Add it to the command line."
        )
    tasks = artifact.read_sealed(files.tasks, "tasks") if files.tasks else None
    identities = made_from.report(metrics, terms, clusters, shards, others, tasks)
    shown = {**others, "shard": shards, "assign": clusters, "eval_ensemble": metrics}
    order = list(records.PLACES)
    jobs = sorted(shown, key=lambda job: (order.index(job.partition(" ")[0]), job))
    plans = {job: shown[job]["made_with"] for job in jobs}
    shown_texts = read_texts(files, metrics, shards) if files.tokenizer else []
    found_terms = terms["top_terms"]
    return Report(metrics, found_terms, clusters, shards, losses, plans, identities, shown_texts, tasks)


def read_texts(files: Files, metrics: dict[str, Any], shards: dict[str, Any]) -> list[texts.Text]:
    """The documents of the entry `texts` of metrics.json, by token. Each held-out shard is verified."""
    from tokenizers import Tokenizer

    wanted = {one["row"]: one for one in metrics.get("texts", [])}
    tokenizer, found = Tokenizer.from_file(str(files.tokenizer)), {}
    held_out = heldout.documents(files.shards.parent, shards, None) if wanted else ()
    for row, (_, document) in enumerate(held_out):
        if one := wanted.get(row):
            ids, pieces, done = document[1 : 1 + len(one["expert"])].tolist(), [], ""
            for i in range(len(ids)):
                text = tokenizer.decode(ids[: i + 1], skip_special_tokens=False)
                whole = "" if text.endswith("\ufffd") and i + 1 < len(ids) else text[len(done) :]
                pieces.append(whole)  # a token within a character adds nothing
                done = text if whole else done
            found[row] = texts.Text(one["doc_id"], one["n_switches"], pieces, one["expert"])
    return [found[row] for row in wanted if row in found]


def _read_training(path: Path, metrics: Path, result: dict[str, Any]) -> tuple[str, dict[str, Any], Curve]:
    """The name, the card and the losses of an expert. Raises ValueError if it is not the one in `metrics`."""
    card_path = path.with_name("card.json")
    card = artifact.read_sealed(card_path, "expert")
    name = card["expert"]
    if card["weights"] != result["weights"].get(name):
        raise ValueError(
            f"{card_path}: not the {name} of {metrics}. Expected the weights that were evaluated. "
            f"{make_again(metrics)}"
        )
    expert_files.check_file(path, card)
    return name, card, read_losses(path)


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
        f"Training documents, balanced by {report.assignments['balance']}. "
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
    for i, name in enumerate(report.metrics["matrix"]["experts"]):
        series.append(branch(name, "" if i else "experts", "c0", "thin"))
    dense = sorted(name for name in report.losses if name.startswith("dense"))
    for name, colour in zip(dense, ("c1", "c3", "c2"), strict=False):
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
    plans = tag("details", tag("summary", "What each step was made with"), _plans_table(report.plans))
    return section("The run", note, table(["", "documents", "tokens", "bytes"], rows), plans)


def _plans_table(plans: dict[str, dict[str, Any]]) -> Html:
    """The plan of every step, as its record says. What all trainings share stands once."""
    trainings = {name: content for name, content in plans.items() if name.startswith("train_expert ")}
    first = next(iter(trainings.values()), {})
    shared = {
        key: value
        for key, value in first.items()
        if all(key in content and content[key] == value for content in trainings.values())
    }
    rows = []
    for name, content in {**plans, "train_expert": shared}.items():
        own = {k: v for k, v in content.items() if name not in trainings or k not in shared}
        rows += [(name, key, json.dumps(value, ensure_ascii=False)) for key, value in own.items()]
    rows.sort(key=lambda row: row[0] in trainings)
    return table(["step", "key", "value"], rows)


def render(report: Report) -> str:
    """The page. It depends on the report alone, not on time or place."""
    metrics = report.metrics
    title = f"Cluster-Branch-Train-Merge, k = {metrics['k']}"
    whole = page(
        title,
        join([tag("h1", title), sections.lead(metrics)]),
        sections.systems(metrics),
        sections.routers(metrics),
        *([sections.tasks(report.tasks)] if report.tasks else []),
        clusters_section(report),
        *([texts.texts_section(report.examples, metrics["matrix"]["experts"])] if report.examples else []),
        sections.heat_map(metrics),
        training_section(report),
        sections.compute(metrics),
        run_section(report),
    )
    return records.with_record(whole, artifact.make_meta("report", report.made_from, {}))


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__, config=False)
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
    p.add_argument(
        "--records", type=Path, nargs="*", default=[], help="further artifacts whose plans the page shows"
    )
    p.add_argument("--tokenizer", type=Path, help="tokenizer.json, to show texts coloured by expert")
    p.add_argument("--tasks", type=Path, help="eval/tasks.json, if the models were given tasks")
    p.add_argument("--out", required=True, type=Path, help="report.html")
    args = p.parse_args(argv)
    cli.start_logging("report", args.log)

    files = Files(
        *(args.metrics, args.top_terms, args.assignments, args.shards),
        *(args.training, args.records, args.tokenizer, args.tasks),
    )
    report = read(files)
    with artifact.publish(args.out) as tmp:
        tmp.write_text(render(report), "utf-8")
    cli.log.info("wrote %s", args.out)


if __name__ == "__main__":
    cli.run(main)
