"""Write the result for people: one page that needs no network and no JavaScript.

The evaluation of each expert goes into its model card, too.

Its settings are those that the artifacts were made with, not those of a config.

    python -m cbtm_pipeline.report --metrics results/eval/metrics.json \\
        --top-terms results/cluster/top_terms.json --assignments results/assignments/manifest.json \\
        --shards results/shards/manifest.json --training results/experts/*/metrics.jsonl \\
        --out results/report.html
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline import plan, plan_training
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.corpus import demo_sources, heldout
from cbtm_pipeline.html import clusters, labels, sections, texts, training
from cbtm_pipeline.html.page import Html, Number, count, join, page, section, table, tag
from cbtm_pipeline.provenance import expert_files, made_from, records
from cbtm_pipeline.training import expert_card

SHOWN_CHARACTERS = 240  # of a document that stands for its cluster
ALL, OWN = (
    "all reported documents",
    "reported documents of its cluster",
)  # kinds of held-out text in model cards


class Report(NamedTuple):
    """Everything that the page shows."""

    metrics: dict[str, Any]
    top_terms: list[list[str]]  # of each cluster
    assignments: dict[str, Any]  # manifest
    shards: dict[str, Any]  # manifest
    logs: dict[str, training.Log]  # by expert
    plans: dict[str, dict[str, Any]]  # by rule, and of each training by expert: what each was made with
    made_from: dict[str, str]
    examples: Sequence[texts.Text] = ()  # documents coloured by expert
    tasks: dict[str, Any] | None = None  # eval/tasks.json
    typical: Sequence[Sequence[clusters.Example]] = ()  # documents of each cluster
    demo: bool = False  # whether the corpus is the built-in one


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
    demo: bool = False


def read(files: Files) -> Report:
    """Read all inputs. The card.json beside a training log says which expert it belongs to.

    Raises ValueError when the files are not of one run, or when the log of an expert is missing.
    """
    metrics, terms = (
        artifact.read_sealed(files.metrics, "metrics"),
        artifact.read_sealed(files.top_terms, "top_terms"),
    )
    assignments = artifact.read_sealed(files.assignments, "assignments")
    shards = artifact.read_sealed(files.shards, "shards")
    for name, split in (("shards", "train"), ("held_out", "eval")):
        artifact.check_made_from(files.assignments, assignments, name, shards[f"identity_{split}"])
    artifact.check_made_from(
        files.top_terms, terms, "clusterer", assignments["made_from"].get("clusterer", "")
    )
    others: dict[str, dict[str, Any]] = {}
    for path in files.records:
        rule = records.rule_of(path)
        others[rule] = artifact.read_record(path, records.PLACES[rule].kind)
    logs = {}
    for path in files.training:
        name, card, log = _read_training(path, files.metrics, metrics)
        data, group = plan.data_of(name)
        if data not in ("random", "first"):
            groups = plan_training.groups(group, card["made_with"].get("children", 1))
            tokens = made_from.tokens(groups, shards if data == "corpus" else assignments)
            artifact.check_made_from(path.with_name("card.json"), card, "tokens", tokens)
        logs[name] = log
        others[f"train_expert {name}"] = card
    if missing := [name for name in metrics["weights"] if name not in logs]:
        raise ValueError(
            f"--training: no log of {', '.join(missing)}. Expected the metrics.jsonl of every expert. "
            "Add it to the command line."
        )
    tasks = artifact.read_sealed(files.tasks, "tasks") if files.tasks else None
    identities = made_from.report(metrics, terms, assignments, shards, others, tasks)
    last = "second_round" if "second_round" in assignments else "assign"
    shown = {**others, "shard": shards, last: assignments, "eval_ensemble": metrics}
    order = list(records.PLACES)
    jobs = sorted(shown, key=lambda job: (order.index(job.partition(" ")[0]), job))
    plans = {job: shown[job]["made_with"] for job in jobs}
    examples, typical = read_texts(files, metrics, shards) if files.tokenizer else ([], [])
    return Report(
        *(metrics, terms["top_terms"], assignments, shards, logs, plans, identities),
        *(examples, tasks, typical, files.demo),
    )


def read_texts(
    files: Files, metrics: dict[str, Any], shards: dict[str, Any]
) -> tuple[list[texts.Text], list[list[clusters.Example]]]:
    """The documents of the entry `texts` of metrics.json, by token, and the begins of those of `typical`.

    Each held-out shard is verified.
    """
    from tokenizers import Tokenizer

    wanted = {one["row"]: one for one in metrics.get("texts", [])}
    typical = metrics.get("typical", [])
    begins = {one["row"]: "" for found in typical for one in found}
    tokenizer, found = Tokenizer.from_file(str(files.tokenizer)), {}
    held_out = heldout.documents(files.shards.parent, shards, None) if wanted or begins else ()
    for row, (_, document) in enumerate(held_out):
        if row in begins:
            text = tokenizer.decode(document[1 : 1 + SHOWN_CHARACTERS].tolist())
            words = " ".join(text.split())
            begins[row] = f"{words[:SHOWN_CHARACTERS]}…" if len(words) > SHOWN_CHARACTERS else words
        if one := wanted.get(row):
            ids, pieces, done = document[1 : 1 + len(one["expert"])].tolist(), [], ""
            for i in range(len(ids)):
                text = tokenizer.decode(ids[: i + 1], skip_special_tokens=False)
                whole = "" if text.endswith("\ufffd") and i + 1 < len(ids) else text[len(done) :]
                pieces.append(whole)  # a token within a character adds nothing
                done = text if whole else done
            found[row] = texts.Text(one["doc_id"], one["n_switches"], pieces, one["expert"])
    shown = [[(one["doc_id"], begins[one["row"]]) for one in of_cluster] for of_cluster in typical]
    return [found[row] for row in wanted if row in found], shown


def _read_training(
    path: Path, metrics: Path, result: dict[str, Any]
) -> tuple[str, dict[str, Any], training.Log]:
    """The name, the card and the log of an expert. Raises ValueError if it is not the one in `metrics`."""
    card_path = path.with_name("card.json")
    card = artifact.read_sealed(card_path, "expert")
    name = card["expert"]
    if card["weights"] != result["weights"].get(name):
        raise ValueError(
            f"{card_path}: not the {name} of {metrics}. Expected the weights that were evaluated. "
            f"{make_again(metrics)}"
        )
    expert_files.check_file(path, card)
    return name, card, read_log(path)._replace(begins=card["made_with"].get("begins", "seed"))


def read_log(path: Path) -> training.Log:
    """What the page shows of a training log. Raises ValueError for a line that is not a row."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({**row, "n_tokens": float(row["n_tokens"]), "loss": float(row["loss"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: line {number} is not a row of a training log. Expected n_tokens and loss. "
                "Train this expert again."
            ) from error
    times = [row["time"] for row in rows if "time" in row]
    seen = [0.0, *(row["n_tokens"] for row in rows)]
    seconds = [
        (b - a) / row["tokens_per_s"]
        for (a, b), row in zip(itertools.pairwise(seen), rows, strict=True)
        if row.get("tokens_per_s")
    ]
    return training.Log(
        [(row["n_tokens"], row["loss"]) for row in rows],
        [(row["n_tokens"], row["valid_loss"]) for row in rows if "valid_loss" in row],
        sum(seconds) if seconds else None,
        (times[0], times[-1]) if times else None,
        _distinct(rows, "machine"),
        _distinct(rows, "version"),
    )


def _distinct(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[str, ...]:
    """The values of a key, each once, in the order of the rows."""
    return tuple(dict.fromkeys(row[key] for row in rows if key in row))


def write_evaluations(report: Report, logs: Sequence[Path]) -> None:
    """Write into the model card of each expert, beside its log, how it was evaluated."""
    metrics, experts = report.metrics, report.metrics["matrix"]["experts"]
    on_all = {row["system"]: row["perplexity"] for row in metrics["systems"]}
    for path in logs:
        name = path.parent.name
        system = f"expert-{name}" if name in experts else name
        if system not in on_all:
            continue  # one on random clusters, or a parent
        perplexity, dense, terms = {ALL: on_all[system]}, {ALL: on_all["dense"]}, []
        if name in experts:
            j = experts.index(name)
            own = metrics["matrix"]["perplexity"][j][j]
            perplexity |= {} if own is None else {OWN: own}
            dense[OWN], terms = metrics["matrix"]["dense"][j], report.top_terms[j]
        found = expert_card.Evaluation(perplexity, dense, "dense", terms)
        title, _ = expert_card.names(artifact.read_sealed(path.with_name("card.json"), "expert"))
        expert_card.add_evaluation(path.parent, title, found)


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
    sizes_table = table(["text", "documents", "tokens", "bytes"], rows, label="Texts of the run")
    return section("The run", note, sizes_table, *([_licences()] if report.demo else []), plans)


def _licences() -> Html:
    """Where the texts of the built-in corpus come from, and under which terms they may be used."""
    rows = [
        (name, source.work, source.licence, f"{source.package} {source.version}", source.url.split("//")[-1])
        for name, source in demo_sources.SOURCES.items()
    ]
    header = ["domain", "work", "licence", "package", "source"]
    return tag("div", tag("h3", "Licences of the built-in corpus"), table(header, rows, label="Licences"))


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
    return table(["step", "key", "value"], rows, label="Plans")


def render(report: Report) -> str:
    """The page. It depends on the report alone, not on time or place."""
    metrics = report.metrics
    title = f"Cluster-Branch-Train-Merge, k = {metrics['k']}"
    first = ["seed", *metrics["matrix"]["experts"]]
    logs = {name: report.logs[name] for name in [*first, *sorted(set(report.logs) - set(first))]}
    whole = page(
        title,
        join([tag("h1", title), sections.lead(metrics)]),
        sections.systems(metrics),
        sections.routers(metrics),
        *([sections.tasks(report.tasks)] if report.tasks else []),
        clusters.clusters(
            report.assignments, metrics["matrix"]["n_documents"], report.top_terms, report.typical
        ),
        *([labels.by_label(metrics, report.assignments)] if "labels" in metrics else []),
        *([texts.texts_section(report.examples, metrics["matrix"]["experts"])] if report.examples else []),
        sections.heat_map(metrics),
        training.training(logs, metrics["matrix"]["experts"]),
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
    p.add_argument("--demo", action="store_true", help="the corpus is the built-in one: show its licences")
    p.add_argument("--out", required=True, type=Path, help="report.html")
    args = p.parse_args(argv)
    cli.start_logging("report", args.log)

    files = Files(
        *(args.metrics, args.top_terms, args.assignments, args.shards),
        *(args.training, args.records, args.tokenizer, args.tasks, args.demo),
    )
    report = read(files)
    with artifact.publish(args.out) as tmp:
        tmp.write_text(render(report), "utf-8")
    write_evaluations(report, args.training)
    cli.log.info("wrote %s", args.out)


if __name__ == "__main__":
    cli.run(main)
