"""The report as a page: well-formed, self-contained, escaped, complete."""

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import damaged
from cbtm_pipeline import config, plan, report
from cbtm_pipeline.base import artifact
from cbtm_pipeline.config import Config
from cbtm_pipeline.html import page, training
from cbtm_pipeline.mixture import verdict
from cbtm_pipeline.provenance import records
from made_run import QUICK, evaluate, make, make_config, make_report_inputs, render
from parsed_page import Page
from resealed import change_json

SECTIONS = ["Systems", "Routers", "Clusters", "Experts and clusters", "Training", "Compute", "The run"]


class Made(NamedTuple):
    folder: Path
    arguments: list[str]

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics without their seal."""
        content = json.loads((self.folder / "eval/metrics.json").read_text())
        return {key: value for key, value in content.items() if key != "seal"}


def make_run(folder: Path, cfg: Config) -> Made:
    files = make(folder, cfg)
    arguments = make_report_inputs(files)
    evaluate(files)
    return Made(folder, arguments)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path, make_config(outdir=str(tmp_path), cluster={"k": 3}, **QUICK))


def test_page_is_well_formed_and_stands_alone(made: Made):
    text = render(made.arguments)
    parsed = Page(text)
    assert parsed.headings == SECTIONS
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in parsed.tags}
    assert not any(set(attributes) & {"src", "href", "onclick", "onload"} for _, attributes in parsed.tags)
    assert not re.search(r"https?:|//|url\(|@import", text.replace("<!doctype html>", ""))
    for tag, attributes in parsed.tags:
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "nan" not in text.lower().split() and "None" not in parsed.text


def test_every_number_of_the_systems_is_there(made: Made):
    cells = Page(render(made.arguments)).cells
    for row in made.metrics["systems"]:
        at = [i for i, cell in enumerate(cells) if cell.removesuffix(" ★") == verdict.label(row)]
        expected = [
            str(page.decimals(row["perplexity"])),
            verdict.interval(row["ratio_to_dense"], row["ci95"]),
            verdict.interval(**row["ratios"]["dense-steps"]),
            f"{row['bits_per_byte']:.4f}",
            *(verdict.short(row[key]) for key in ("temperature", "epsilon", "beta")),
            *(verdict.short(row[key]) for key in ("hysteresis", "fix_after")),
            "–" if row["n_active"] is None else str(row["n_active"]),
            str(page.count(row["n_parameters"])),
            "–" if row["n_active"] is None else str(page.count(row["n_active_parameters"])),
            verdict.short(row["passes"]) or "–",
            str(page.flops(row["train_flops"])),
        ]
        assert expected in [cells[i + 1 : i + 15] for i in at]
    for line in [*made.metrics["matrix"]["perplexity"], made.metrics["matrix"]["dense"]]:
        assert set(map(page.decimals, line)) <= set(cells)


def test_the_claim_has_its_controls_beside_it_and_says_who_wins(made: Made):
    text = " ".join(Page(render(made.arguments)).text.split("Systems")[0].split())
    best = verdict.headline(made.metrics)
    assert (
        f"{best['ratios']['dense-steps']['ratio']:.3f} times that of dense-steps, the strongest dense model "
        "of equal compute (k times more steps, 1.00 times the training FLOPs)"
    ) in text
    assert text.count("The ensemble wins.") == 1
    for name in ("seed", "dense", "dense-steps", "random, uniform", "uniform", "paper top-1", "oracle"):
        assert name in text.split("With its controls")[1]
    for sentence in made.metrics["verdict"][1:]:
        assert sentence in text

    for row in (metrics := made.metrics)["systems"]:
        row["ratios"]["dense-steps"]["ci95"] = [1.1, 1.2]
    artifact.write_sealed(made.folder / "eval/metrics.json", metrics)
    assert "Dense-steps wins." in Page(render(made.arguments)).text


def test_the_page_warns_of_a_setting_at_the_end_of_its_list(made: Made):
    warnings = made.metrics["warnings"]
    assert warnings, "the lists of this run have two values"
    text = " ".join(Page(render(made.arguments)).text.split())
    assert all(warning in text for warning in warnings)


def test_every_name_is_explained_and_the_use_of_each_expert_is_shown(made: Made):
    parsed = Page(render(made.arguments))
    for name in ("seed", "oracle", "paper", "filter", "T", "ε", "β", "passes per token"):
        assert re.search(rf"<dt>([^<]*, )?{name}(,[^<]*)?</dt>", render(made.arguments)), name
    use = made.metrics["use"]
    assert sum(use["mean_weight"]) == pytest.approx(1) and sum(use["largest"]) == pytest.approx(1)
    for mean, largest in zip(use["mean_weight"], use["largest"], strict=True):
        cells = [f"{100 * mean:.1f} %", f"{100 * largest:.1f} %"]
        assert any(parsed.cells[i : i + 2] == cells for i in range(len(parsed.cells)))


def test_every_expert_has_its_curve_and_the_page_says_where_it_was_trained(made: Made):
    logs = made.arguments[made.arguments.index("--training") + 1 : made.arguments.index("--out")]
    assert "say neither when nor where" in Page(render(made.arguments)).text
    for i, path in enumerate(map(Path, logs)):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for j, row in enumerate(rows):
            row |= {"time": 1e9 + 100 * i + j, "tokens_per_s": 1000.0}
            row |= {"valid_loss": 5.0} if j % 10 == 0 else {}
        rows[0] |= {"machine": f"box {i % 2}", "version": "cbtm-pipeline 9"}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = path.with_name("files.json")
        content = artifact.read_sealed(record, "expert_files")
        change_json(record, files={**content["files"], path.name: artifact.identity(path)})
    text = render(made.arguments)
    parsed = Page(text)
    assert "Validation loss" in text and "Machines: box 0; box 1. Software: cbtm-pipeline 9." in parsed.text
    assert "Trained from 2001-09-09 01:46 to 2001-09-09 0" in parsed.text
    for name in "012":
        assert text.count(f"<title>expert {name}</title>") == 2, "a line of each chart"
    assert render(made.arguments) == text


def test_the_evaluation_goes_into_the_model_card_and_edits_stay(made: Made):
    card = made.folder / "experts/1/README.md"
    header = "---\nlicense: mit\n# evaluation\n# end of evaluation\n---\nMine.\n"
    card.write_text(f"{header}<!-- evaluation -->\nnot yet\n<!-- end of evaluation -->\nAlso mine.\n")
    (made.folder / "experts/2/README.md").write_text("All mine.\n")
    render(made.arguments)
    text = card.read_text()
    rows = {row["system"]: row for row in made.metrics["systems"]}
    perplexity = rows["expert-1"]["perplexity"]
    assert f"| all reported documents | {perplexity:.2f} | {rows['dense']['perplexity']:.2f} |" in text
    own = made.metrics["matrix"]["perplexity"][1][1]
    assert f"| reported documents of its cluster | {own:.2f} |" in text
    assert "&lt;script&gt;" in text and "Mine.\n" in text and text.endswith("Also mine.\n")
    about = yaml.safe_load(text.split("---\n")[1])
    (found,) = about["model-index"]
    assert found["name"] == "Expert 1" and about["license"] == "mit"
    assert found["results"][0]["metrics"] == [{"type": "perplexity", "value": round(perplexity, 4)}]
    before = card.stat().st_mtime_ns
    render(made.arguments)
    assert card.read_text() == text and card.stat().st_mtime_ns == before
    assert (made.folder / "experts/2/README.md").read_text() == "All mine.\n"
    assert not (made.folder / "experts/0/README.md").exists()


def test_the_built_in_corpus_has_its_licences_on_the_page(made: Made):
    assert "CC BY-SA 4.0" not in render(made.arguments)
    parsed = Page(render([*made.arguments, "--demo"]))
    assert "CC BY-SA 4.0" in parsed.cells and "Wikibooks Cookbook" in parsed.cells


def test_tables_scroll_by_keyboard_and_have_names(made: Made):
    regions = [a for tag, a in Page(render([*made.arguments, "--demo"])).tags if a.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["role"] == "region" for a in regions)
    names = [a["aria-label"] for a in regions]
    assert len(set(names)) == len(names) > 8 and "Table" not in names


def test_tasks_have_a_table_with_a_column_for_each_model(made: Made):
    content = {
        "models": ["seed", "ensemble", "0"],
        "rows": [
            {
                "task": "<b>topics",
                "metric": "acc",
                "n_shots": 8,
                "n_examples": 60,
                "results": {"seed": [0.25, 0.0411], "ensemble": [0.5, None]},
            },
        ],
    }
    path = made.folder / "eval/tasks.json"
    artifact.write_sealed(path, artifact.make_meta("tasks", {}, {}, **content))
    parsed = Page(render([*made.arguments, "--tasks", str(path)]))
    assert parsed.headings == [*SECTIONS[:2], "Tasks", *SECTIONS[2:]]
    at = parsed.cells.index("<b>topics")
    assert parsed.cells[at : at + 7] == ["<b>topics", "acc", "8", "60", "0.250 ± 0.041", "0.500", "–"]
    assert "expert 0" in parsed.cells or "expert 0" in parsed.text
    record = records.read_page(made.folder / "report.html")
    assert record["made_from"]["tasks"] == artifact.read_sealed(path, "tasks")["seal"]
    assert (
        "tasks"
        not in records.read_page(Path(render(made.arguments) and made.folder / "report.html"))["made_from"]
    )


def test_text_from_data_is_escaped(made: Made):
    text = render(made.arguments)
    assert "<script" not in text
    assert "term2, <script>alert(1)</script>, &amp;, ünï" in Page(text).cells


def test_the_run_is_described(made: Made):
    parsed = Page(render(made.arguments))
    assert "17 rows of the input were left out" in parsed.text
    assert "balanced by tokens" in parsed.text
    for cells in (
        ["training text", "1\u202f234", "370\u202f200"],
        ["held-out text", "40"],
        ["reported on", "28"],
        ["chosen on", "12"],
    ):
        at = parsed.cells.index(cells[0])
        assert parsed.cells[at : at + len(cells)] == cells
    assert str(made.folder) not in parsed.text


def test_argument_order_changes_no_byte(made: Made):
    first = render(made.arguments)
    logs = made.arguments[made.arguments.index("--training") + 1 : made.arguments.index("--out")]
    arguments = [a for a in made.arguments if a not in logs]
    at = arguments.index("--training") + 1
    assert render([*arguments[:at], *reversed(logs), *arguments[at:]]) == first


OTHERS = {
    "one expert": {"cluster": {"k": 1}},
    "many experts": {"cluster": {"k": 12}},
    "no controls, one setting": {
        "cluster": {"k": 2},
        "train": {"controls": [], "dense": "steps"},
        "route": {"routers": ["paper"], "top_k": [1], "temperature": [0.1]},
    },
    "a seed that was not trained": {"cluster": {"k": 2}, "model": {"pretrained": "some/folder"}},
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_runs_have_a_page_too(case: str, tmp_path: Path):
    changed = OTHERS[case]
    sections = {**QUICK, **changed, "route": {**QUICK["route"], **changed.get("route", {})}}
    parsed = Page(render(make_run(tmp_path, make_config(outdir=str(tmp_path), **sections)).arguments))
    assert parsed.headings == SECTIONS
    assert ("random, uniform" in parsed.cells) == ("controls" not in changed.get("train", {}))


def test_an_empty_cluster_has_a_dash(made: Made):
    metrics = made.metrics
    metrics["matrix"]["dense"][1] = None
    for line in metrics["matrix"]["perplexity"]:
        line[1] = None
    artifact.write_sealed(made.folder / "eval/metrics.json", metrics)
    cells = Page(render(made.arguments)).cells
    at = cells.index("expert 0")
    assert cells[at + 2] == "–" and cells[at + 3] == page.decimals(metrics["matrix"]["perplexity"][0][2])


# --- plans -------------------------------------------------------------------------------------------------


def plans_of(parsed: Page) -> dict[tuple[str, str], Any]:
    """The plans on a page: value by step and key."""
    cells = parsed.cells[parsed.cells.index("step") :]
    rows = [cells[i : i + 3] for i in range(3, len(cells), 3)]
    return {(step, key): json.loads(value) for step, key, value in rows}


def test_the_page_shows_the_plan_of_every_step(made: Made):
    cfg = config.read(made.folder / "config.json")
    found = plans_of(Page(render(made.arguments)))
    steps = {step for step, _ in found}
    assert steps == {
        *("shard", "fit_kmeans", "assign", "route", "score_expert", "eval_ensemble", "train_expert"),
        *(f"train_expert {name}" for name in plan.trained(cfg)),
    }
    for step in steps - {"shard"}:
        rule, _, expert = step.partition(" ")
        shown = {key: value for (name, key), value in found.items() if name == step}
        if rule != "train_expert":
            assert shown == plan.content(cfg, rule)
        elif expert:
            shared = {key: value for (name, key), value in found.items() if name == "train_expert"}
            assert not shown.keys() & shared.keys()
            assert shown | shared == plan.content(cfg, rule, expert)
    assert found["train_expert", "lr"] == cfg.train.lr and ("train_expert 0", "lr") not in found
    assert found["train_expert 1", "group"] == 1


def test_the_page_shows_the_plans_of_the_records_whatever_the_config_says(
    made: Made, monkeypatch: pytest.MonkeyPatch
):
    first = render(made.arguments)
    changed = make_config(cluster={"k": 3, "balance": "documents"}, train={"lr": 0.5}, eval={"stride": 7})
    config.write(changed, made.folder / "config.json")
    config.write(changed, made.folder / "config.yaml")
    monkeypatch.chdir(made.folder)
    assert render(made.arguments) == first
    assert plans_of(Page(first))["train_expert", "lr"] != 0.5


def test_another_plan_of_a_training_makes_another_page(made: Made):
    """More validations give the same weights, so all scores are what they were. The page is another one."""
    report_html = made.folder / "report.html"
    render(made.arguments)
    before = records.read_page(report_html)
    card = made.folder / "experts/1/card.json"
    change_json(card, made_with={**json.loads(card.read_text())["made_with"], "validations": 77})
    found = plans_of(Page(render(made.arguments)))
    assert found["train_expert 1", "validations"] == 77
    after = records.read_page(report_html)
    assert {key for key in after["made_from"] if after["made_from"][key] != before["made_from"][key]} == {
        "plans"
    }


# --- the record of the page --------------------------------------------------------------------------------


def test_the_page_has_its_record(made: Made):
    text = render(made.arguments)
    record = records.read_page(made.folder / "report.html")
    seals = {
        name: artifact.read_sealed(made.folder / path, kind)["seal"]
        for name, path, kind in (
            ("metrics", "eval/metrics.json", "metrics"),
            ("top_terms", "cluster/top_terms.json", "top_terms"),
            ("assignments", "assignments/manifest.json", "assignments"),
            ("shards", "shards/manifest.json", "shards"),
        )
    }
    assert {key: record["made_from"][key] for key in seals} == seals
    assert (record["kind"], record["made_with"]) == ("report", {})
    (element,) = [attributes for tag, attributes in Page(text).tags if attributes.get("name") == "cbtm"]
    assert json.loads(str(element["content"])) == record


def test_no_flipped_bit_of_a_page_goes_unnoticed(tmp_path: Path):
    record = artifact.make_meta("report", {"metrics": "3" * 32, "plans": "a" * 32}, {})
    path = tmp_path / "report.html"
    path.write_text(
        records.with_record('<html><head><title>k = "3" ü</title></head><p>&amp;</p></html>', record)
    )
    assert records.read_page(path) == {**record, "seal": records.read_page(path)["seal"]}
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        path.write_bytes(damaged.flipped(content, bit // 8, bit % 8))
        with pytest.raises(ValueError, match=r"report\.html: .*Make it again"):
            records.read_page(path)
    for n in range(len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"report\.html: .*Make it again"):
            records.read_page(path)


def test_a_page_with_a_changed_number_is_noticed(made: Made):
    text = render(made.arguments)
    path = made.folder / "report.html"
    number = str(page.decimals(made.metrics["systems"][0]["perplexity"]))
    path.write_text(text.replace(number, "1.00", 1))
    with pytest.raises(ValueError, match="changed since it was written"):
        records.read_page(path)
    for content in damaged.versions(text.encode(), 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"report\.html: "):
            records.read_page(path)


# --- what is refused ---------------------------------------------------------------------------------------

OTHER = "0" * 32


def origin(made: Made, path: str, **changes: str) -> None:
    """An artifact was made from something else."""
    found = json.loads((made.folder / path).read_text())["made_from"]
    change_json(made.folder / path, made_from={**found, **changes})


REFUSED = {
    "other terms": (
        lambda made: origin(made, "cluster/top_terms.json", clusterer=OTHER),
        "top_terms.json: made from another clusterer",
    ),
    "other training text": (
        lambda made: change_json(made.folder / "shards/manifest.json", identity_train=OTHER),
        "assignments/manifest.json: made from another shards",
    ),
    "other held-out text": (
        lambda made: change_json(made.folder / "shards/manifest.json", identity_eval=OTHER),
        "assignments/manifest.json: made from another held_out",
    ),
    "experts of another clustering": (
        lambda made: change_json(made.folder / "assignments/manifest.json", identity_groups=[OTHER] * 3),
        "experts/0/card.json: made from another tokens",
    ),
    "dense of another text": (
        lambda made: origin(made, "experts/dense/card.json", tokens=OTHER),
        "experts/dense/card.json: made from another tokens",
    ),
    "retrained": (
        lambda made: change_json(made.folder / "experts/1/card.json", weights=OTHER),
        "experts/1/card.json: not the 1 of",
    ),
    "not metrics": (
        lambda made: change_json(made.folder / "eval/metrics.json", kind="scores"),
        "metrics.json: scores. Expected metrics.",
    ),
    "files of another expert": (
        lambda made: origin(made, "experts/1/files.json", expert=OTHER),
        "experts/1/files.json: made from another expert",
    ),
    "a changed log": (
        lambda made: (made.folder / "experts/2/metrics.jsonl").write_text('{"n_tokens": 1, "loss": 2}\n'),
        "experts/2/metrics.jsonl: another file than it was",
    ),
    "no record": (
        lambda made: made.arguments.extend(["--records", str(made.folder / "eval/table.txt")]),
        "eval/table.txt: no record of a rule. Expected one of tokenizer/card.json",
    ),
}


def refusal(made: Made, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error. Nothing may have been written."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        render(made.arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert not (made.folder / "report.html").exists()
    return line


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_of_one_run_is_refused_in_one_line(
    case: str, made: Made, capsys: pytest.CaptureFixture[str]
):
    change, expected = REFUSED[case]
    change(made)
    assert expected in refusal(made, capsys)


@pytest.mark.parametrize(
    "name",
    [
        *("eval/metrics.json", "cluster/top_terms.json", "assignments/manifest.json", "shards/manifest.json"),
        *("experts/0/card.json", "experts/0/files.json", "experts/seed/metrics.jsonl"),
    ],
)
def test_no_flipped_bit_and_no_cut_of_an_input_goes_unnoticed(
    name: str, made: Made, capsys: pytest.CaptureFixture[str]
):
    path = made.folder / name
    for content in damaged.versions(path.read_bytes(), 30):
        with damaged.replaced(path, content):
            assert str(path.parent) in refusal(made, capsys)


@pytest.mark.parametrize("name", ["cluster/clusterer.npz", "route/distances.npz"])
def test_damage_to_arrays_that_the_page_does_not_show_changes_no_plan(name: str, made: Made):
    """Only the record is read, so damage elsewhere may go unnoticed here. But the page is the same."""
    first, path = render(made.arguments), made.folder / name
    for content in damaged.versions(path.read_bytes(), 100):
        with damaged.replaced(path, content), contextlib.suppress(SystemExit):
            assert render(made.arguments) == first


def test_a_missing_log_is_refused(made: Made, capsys: pytest.CaptureFixture[str]):
    log = made.folder / "experts/2/metrics.jsonl"
    made.arguments.remove(str(log))
    assert "--training: no log of 2." in refusal(made, capsys)


def test_a_line_that_is_no_row_of_a_log_is_named(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"n_tokens": 1, "loss": 2}\n{"n_tok')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not a row of a training log\."):
        report.read_log(log)


@given(st.integers(0, 500), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_downsampling_keeps_range_and_mean(n_points: int, n: int):
    points = [(float(i), math.sin(i)) for i in range(n_points)]
    kept = training.downsample(points, n)
    assert len(kept) == min(n, n_points)
    assert kept == sorted(kept)
    if n_points % n == 0 and n_points:
        assert sum(b for _, b in kept) / len(kept) == pytest.approx(
            sum(b for _, b in points) / n_points, abs=1e-9
        )
