"""Tasks of lm-evaluation-harness: task files, one model, the whole run."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_workflow import TASKS, jobs
from transformers import AutoModelForCausalLM, AutoTokenizer

import made_tiny_ensemble
from cbtm_pipeline import config, eval_task, plan, tasks_table
from cbtm_pipeline.base import artifact
from cbtm_pipeline.inference import harness
from cbtm_pipeline.provenance import made_from, records, stale, task_files
from made_project import ROOT, TOPICS, done, make_project, snakemake, snakemake_command
from made_run import make_config, run_rule

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
TEMPLATES = sorted((ROOT / "docs/tasks").glob("*.yaml"))
TASK: dict[str, Any] = {
    "task": "topics",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}},
    "fewshot_split": "train",
    "test_split": "test",
    "output_type": "multiple_choice",
    "num_fewshot": 1,
    "doc_to_text": "{{text}} The topic is",
    "doc_to_choice": sorted(TOPICS),
    "doc_to_target": "label",
}


def write_rows(path: Path, n_rows: int, labels: list[str], rng_seed: int = 0) -> None:
    """Examples whose text is of the topic with the number of the label."""
    rng = random.Random(rng_seed)
    topics = [TOPICS[name].split() for name in sorted(TOPICS)]
    rows = [(rng.randrange(len(labels)), rng) for _ in range(n_rows)]
    content = [{"text": " ".join(rng.choices(topics[i % len(topics)], k=6)), "label": i} for i, rng in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


def write_task(folder: Path, n_test: int = 12, **keys: Any) -> Path:
    """A task file with its data beside it. `keys` change TASK."""
    content = {**TASK, **keys}
    write_rows(folder / "train.jsonl", 10, content["doc_to_choice"], 1)
    write_rows(folder / "test.jsonl", n_test, content["doc_to_choice"], 2)
    (folder / "topics.yaml").write_text(yaml.safe_dump(content))
    return folder / "topics.yaml"


def refusal(tasks: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        task_files.check(tasks)
    assert "\n" not in str(error.value) and ". Expected " in str(error.value)
    return str(error.value)


# --- the list and the files ---------------------------------------------------------------------------------


def test_a_run_without_tasks_has_no_job_for_them() -> None:
    cfg = make_config()
    assert cfg.eval.tasks == [] and stale.task_models(cfg) == {}
    assert not {job.rule for job in stale.jobs(cfg)} & {"eval_task", "tasks_table"}
    task_files.check([])


def test_each_model_but_random_experts_has_a_job_and_the_report_reads_their_table() -> None:
    cfg = make_config(cluster={"k": 2}, eval={"tasks": "lambada_openai"})
    found = stale.jobs(cfg)
    names = ["seed", "dense", "dense-steps", "0", "1", "ensemble", "ensemble-top1"]
    assert [job.expert for job in found if job.rule == "eval_task"] == names
    assert found[stale.Job("eval_task", "ensemble-top1")] == [stale.Job("ensemble")]
    assert found[stale.Job("eval_task", "dense")] == [stale.Job("train_expert", "dense")]
    assert stale.Job("tasks_table") in found[stale.Job("report")]
    before: set[stale.Job] = set()
    for job, inputs in found.items():
        assert before.issuperset(inputs), job
        before.add(job)
    without = make_config(cluster={"k": 2}, eval={"tasks": ["x"]}, embed={"encoder": "me/encoder"})
    assert "ensemble" not in stale.task_models(without)


def test_the_config_of_an_older_version_has_no_tasks() -> None:
    content = make_config().model_dump()
    del content["eval"]["tasks"]
    assert config.validate(content).eval.tasks == []


def test_where_a_task_file_lies_is_no_other_plan_and_its_content_is_an_input(tmp_path: Path) -> None:
    one, other = (write_task(tmp_path / name) for name in ("a", "b"))
    contents = [
        plan.content(make_config(eval={"tasks": [str(p), "arc_easy"]}), "eval_task") for p in (one, other)
    ]
    assert contents[0] == contents[1] == {"tasks": ["topics.yaml", "arc_easy"]}
    assert task_files.identities([str(one), "arc_easy"]) == task_files.identities([str(other), "arc_easy"])
    for file in ("topics.yaml", "train.jsonl", "test.jsonl"):
        before = task_files.identities([str(other)])
        with (tmp_path / "b" / file).open("a") as f:
            f.write("\n")
        assert task_files.identities([str(other)]) != before, file


def test_included_files_and_functions_count(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    (tmp_path / "base.yaml").write_text(path.read_text())
    (tmp_path / "helper.py").write_text("def prompt(doc):\n    return doc['text']\n")
    path.write_text("include: base.yaml\ntask: mine\ndoc_to_text: !function helper.prompt\n")
    found = task_files.read(path)
    assert {file.name for file in found.files} == {
        *("topics.yaml", "base.yaml", "helper.py", "train.jsonl", "test.jsonl")
    }
    assert found.content["task"] == "mine" and found.content["num_fewshot"] == 1
    assert found.content["dataset_kwargs"]["data_files"]["test"] == str((tmp_path / "test.jsonl").resolve())
    function = harness._load_function(found.content["doc_to_text"])
    assert function({"text": "butter"}) == "butter"


def test_what_is_wrong_with_a_task_is_said_in_one_line(tmp_path: Path, monkeypatch) -> None:
    path = write_task(tmp_path)
    assert "no such file" in refusal([str(tmp_path / "none.yaml")])
    assert refusal([str(path), str(path)]) == (
        "eval.tasks: topics.yaml twice. Expected each task once. Rename or remove one."
    )
    for text, expected in (
        ("a: [", "not YAML"),
        ("- a", "no keys"),
        ("num_fewshot: 3", "no key task"),
        ("include: topics.yaml", "includes itself"),
        ("task: x\ndataset_kwargs: {data_files: {test: none.jsonl}}", "none.jsonl: no such file"),
    ):
        path.write_text(text)
        assert expected in refusal([str(path)])
    monkeypatch.setattr(task_files, "PACKAGE", "a_package_that_is_not_there")
    assert refusal(["arc_easy"]).endswith("Run pip install 'cbtm-pipeline[tasks]'.")


@pytest.mark.slow
def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    task_files.check_names(["lambada_openai", "mine.yaml"])
    with pytest.raises(ValueError, match=r"^eval\.tasks: lambada_openia\. .*Did you mean lambada_openai\?$"):
        task_files.check_names(["lambada_openia"])


@pytest.mark.slow
def test_a_bad_task_stops_a_dry_run_and_doctor_knows_a_good_one(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    path = write_task(tmp_path / "task")
    (project / "good.yaml").write_text(yaml.safe_dump({"eval": {"tasks": [str(path)]}}))
    path.with_name("bad.yaml").write_text(yaml.safe_dump({**TASK, "task": "bad", "output_typ": "x"}))
    (project / "bad.yaml").write_text(yaml.safe_dump({"eval": {"tasks": [str(path.with_name("bad.yaml"))]}}))
    bad = f"{path.with_name('bad.yaml')}: TypeError: "
    doctor = [sys.executable, "-m", "cbtm_pipeline", "doctor", "--configfile"]
    for words, name, line in (
        (snakemake_command("-n", configfiles=["small.yaml"]), "bad", bad),
        ([*doctor, "small.yaml"], "good", f"ok    tasks: {path}."),
    ):
        run = subprocess.run([*words, f"{name}.yaml"], cwd=project, capture_output=True, text=True)
        assert line in run.stdout + run.stderr and "Traceback" not in run.stderr, run
        assert (run.returncode == 0) == (name == "good"), run
    assert not (project / "results").exists()


def test_a_task_file_that_makes_no_task_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write_task(tmp_path)
    harness.check([str(path)])
    for keys, line in (
        ({"output_typ": "x"}, "TypeError"),
        ({"output_type": "none"}, "Expected"),
        ({"metadata": {"cbtm": {"limits": 3}}}, "metadata.cbtm.limits: unknown key."),
        ({"test_split": "text"}, "Expected"),
    ):
        path.write_text(yaml.safe_dump({**TASK, **keys}))
        with pytest.raises(ValueError) as error:
            harness.check([str(path)])
        assert str(path) in str(error.value) and "\n" not in str(error.value) and line in str(error.value)


def test_texts_about_an_ensemble_are_no_other_model() -> None:
    files = {
        "config.json": "1",
        "experts/0/model.safetensors": "2",
        "README.md": "3",
        "experts/0/card.json": "4",
    }

    def identity(**changed: str) -> str:
        of_this = made_from.computes({"n_active": 2}, {**files, **changed})
        return made_from.eval_task({"kind": "ensemble", "computes": of_this}, {})["model"]

    assert identity() == identity(**{"README.md": "9", "experts/0/card.json": "9"})
    assert (
        len(
            {
                identity(),
                identity(**{"router.safetensors": "9"}),
                identity(**{"experts/0/model.safetensors": "9"}),
            }
        )
        == 3
    )


def test_other_tags_are_no_other_model_and_another_router_is_one() -> None:
    config = {"router": "paper", "tags": {"0": {"licence": "mit"}}}
    found = made_from.computes(config, {"config.json": "1", "router.safetensors": "2"})
    assert found == made_from.computes(
        {"router": "paper", "tags": {}}, {"config.json": "9", "router.safetensors": "2"}
    )
    assert found != made_from.computes(
        {**config, "router": "filter"}, {"config.json": "1", "router.safetensors": "2"}
    )


def test_other_tags_pack_the_ensemble_again_and_give_nobody_a_task() -> None:
    cfg = make_config(eval={"tasks": "lambada_openai"})

    def ran(*reasons: stale.Reason, downstream: bool = False, anew: tuple[str, ...] = ()) -> set[str]:
        states: stale.States = {}
        for job, inputs in stale.jobs(cfg).items():
            own = list(reasons) if job.rule == "ensemble" else []
            waits = any(states[i].runs and not stale.spares(job, i, states) for i in inputs)
            states[job] = stale.State(own, waits or (downstream and job.rule == "ensemble"), {})
        return {job.rule for job in stale.start(cfg, states, stale.Asked([], anew, False, False)).run}

    tags = stale.Reason("its plan has changed", "tags", None, {"licence": "mit"})
    assert ran(tags) == {"ensemble"}
    rest = {"ensemble", "eval_task", "tasks_table", "report"}
    assert ran(tags, stale.Reason("its input clusterer has changed")) == rest
    assert ran(tags, downstream=True) == rest
    assert ran(anew=("ensemble",)) == rest


# --- rows of results ----------------------------------------------------------------------------------------


def test_the_mean_of_seeds_has_the_error_of_examples_and_seeds() -> None:
    def runs(values: list[float], stderr: float | None) -> list[harness.Row]:
        return harness.mean_of_seeds([[{"task": "t", "value": value, "stderr": stderr}] for value in values])

    assert runs([0.5, 0.5], 0.1) == [{"task": "t", "value": 0.5, "stderr": pytest.approx(0.1)}]
    (row,) = runs([0.4, 0.6], 0.0)
    assert row["value"] == pytest.approx(0.5) and row["stderr"] == pytest.approx((0.02 / 2) ** 0.5)
    assert runs([0.4], 0.3)[0]["stderr"] == 0.3 and runs([0.4, 0.6], None)[0]["stderr"] is None


def test_rows_of_a_result_leave_out_what_is_no_metric() -> None:
    values = {
        "alias": "t",
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "em,strict": float("nan"),
        "em_stderr,strict": 1,
    }
    rows = harness.rows_of(
        {"results": {"t": values}, "n-shot": {"t": 2}, "n-samples": {"t": {"effective": 7}}}
    )
    about = {"task": "t", "n_examples": 7, "n_shots": 2}
    assert rows == [
        {**about, "metric": "acc", "value": 0.5, "stderr": None},
        {**about, "metric": "em (strict)", "value": None, "stderr": 1.0},
    ]


def test_models_with_other_tasks_are_not_put_side_by_side(tmp_path: Path) -> None:
    paths = [tmp_path / "seed.json", tmp_path / "0.json"]
    for path, h in zip(paths, "ab", strict=True):
        meta = artifact.make_meta("task_results", {"model": h, "task-t.yaml": h}, {"tasks": ["t.yaml"]})
        artifact.write_sealed(path, {**meta, "model": path.stem, "rows": []})
    with pytest.raises(ValueError, match="other tasks than in"):
        tasks_table.read(paths)


# --- one model ----------------------------------------------------------------------------------------------


def logprob(model: Any, tokenizer: Any, context: str, label: str) -> tuple[float, int]:
    """Log-probability of a label after a context, and its number of tokens."""
    label_ids = tokenizer(label, add_special_tokens=False).input_ids
    context_ids = tokenizer(context, add_special_tokens=False).input_ids or [model.config.bos_token_id]
    ids = torch.tensor([context_ids + label_ids])
    with torch.inference_mode():
        found = model(ids[:, :-1]).logits.float().log_softmax(-1)[0]
    return sum(float(found[len(context_ids) - 1 + i, t]) for i, t in enumerate(label_ids)), len(label_ids)


@pytest.mark.slow
@pytest.mark.parametrize("n_active", [None, 1])
def test_the_scores_are_those_that_their_formulas_give(n_active: int | None, tmp_path: Path) -> None:
    ensemble = made_tiny_ensemble.make(tmp_path / "made", max_loaded=None)
    labels, domain = ["rose", "a ship", "an onion", "b"], "It is"
    keys = {
        "doc_to_choice": labels,
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "acc"},
            {"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    path = write_task(tmp_path, 40, metadata={"cbtm": {"domain": domain, "limit": 30}}, **keys)
    settings = {"n_active": n_active} if n_active else {}
    found = {row["metric"]: row for row in harness.evaluate(ensemble.folder, [str(path)], **settings)}
    model = AutoModelForCausalLM.from_pretrained(ensemble.folder, dtype=torch.float32, **settings)
    tokenizer = AutoTokenizer.from_pretrained(ensemble.folder)
    n_right: dict[str, int] = dict.fromkeys(("acc", "acc_token_mean", "acc_mutual_info", "acc_dcpmi"), 0)
    for line in (tmp_path / "test.jsonl").read_text().splitlines()[:30]:
        row = json.loads(line)
        scores: dict[str, list[float]] = {name: [] for name in n_right}
        for label in labels:
            own, n = logprob(model, tokenizer, f"{row['text']} The topic is", f" {label}")
            scores["acc"].append(own)
            scores["acc_token_mean"].append(own / n)
            scores["acc_mutual_info"].append(own - logprob(model, tokenizer, "", f" {label}")[0])
            scores["acc_dcpmi"].append(own - logprob(model, tokenizer, domain, f" {label}")[0])
        for name, values in scores.items():
            n_right[name] += max(range(len(labels)), key=values.__getitem__) == row["label"]
    assert len(set(n_right.values())) > 1, "the scores must differ for this to show anything"
    for name, n in n_right.items():
        assert found[name]["value"] == pytest.approx(n / 30), name
        assert found[name]["n_examples"] == 30


@pytest.mark.slow
def test_a_copy_of_each_template_runs_with_one_edit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(TEMPLATES) == 6
    ensemble = made_tiny_ensemble.make(tmp_path / "made", rng_seeds=(0, 1))
    tasks = []
    for template in TEMPLATES:
        labels = yaml.safe_load(template.read_text())["doc_to_choice"]
        for name in ("train", "test"):
            write_rows(tmp_path / f"data/{template.stem}-{name}.jsonl", 8 if name == "train" else 3, labels)
        text, n = re.subn(
            r"data_files: \{.*?\}",
            f"data_files: {{train: data/{template.stem}-train.jsonl, test: data/{template.stem}-test.jsonl}}",
            template.read_text(),
        )
        assert n == 1
        (tmp_path / template.name).write_text(text)
        tasks.append(str(tmp_path / template.name))
    task_files.check(tasks)
    rows = harness.evaluate(ensemble.folder, tasks)
    expected = {"acc", "acc_token_mean", "acc_mutual_info", "acc_dcpmi"}
    for template in TEMPLATES:
        own = [row for row in rows if row["task"] == f"{template.stem}_fewshot"]
        assert {row["metric"] for row in own} == expected
        assert {(row["n_shots"], row["n_examples"]) for row in own} == {(8, 3)}
        content = yaml.safe_load(template.read_text())
        assert content["metadata"]["cbtm"]["seeds"] == [100, 13, 21, 42, 87]
        assert all(label == label.lower() for label in content["doc_to_choice"])
        assert content["doc_to_text"].endswith(content["metadata"]["cbtm"]["domain"])


@pytest.mark.slow
def test_a_task_that_cannot_be_run_is_one_line(tmp_path: Path) -> None:
    ensemble = made_tiny_ensemble.make(tmp_path / "made", rng_seeds=(0,))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"doc_to_text": "{{text"}, "eval.tasks: "),
        ({"metadata": {"cbtm": {"shots": 3}}}, "metadata.cbtm.shots: unknown key"),
    ]
    for keys, expected in cases:
        with pytest.raises(ValueError, match=expected) as error:
            harness.evaluate(ensemble.folder, [str(write_task(tmp_path, **keys))])
        assert "\n" not in str(error.value) and ". Expected " in str(error.value)


# --- a run --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_a_task_shows_it_everywhere_and_reruns_it_alone(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    results = project / "results"
    task = write_task(project / "mine", num_fewshot=0)
    (project / "tasks.yaml").write_text("eval: {tasks: mine/topics.yaml}\n")
    files = ["small.yaml", "tasks.yaml"]
    printed = snakemake(project, "--cores", "2", configfiles=files)
    assert set(done(printed)) == TASKS | {"tasks_table", "report"}
    assert "Running loglikelihood" not in printed, "no bars"
    table = (results / "eval/tasks.txt").read_text()
    assert table in printed and records.tasks_table(results) == table
    header, _, first = table.splitlines()[:3]
    assert header.split("  ")[0] == "task" and "ensemble-top1" in header and first.startswith("topics")
    page = (results / "report.html").read_text()
    content = artifact.read_sealed(results / "eval/tasks.json", "tasks")
    assert content["models"] == ["seed", "dense", "dense-steps", "ensemble", "ensemble-top1", "0", "1"]
    for row in content["rows"]:
        for value, stderr in row["results"].values():
            assert f"{value:.3f} ± {stderr:.3f}" in page
    assert jobs(snakemake(project, "-n", configfiles=files)) == set()

    (project / "tags.yaml").write_text("tags: {licence: cc-by, experts: {1: {licence: mit}}}\n")
    planned = snakemake(project, "-n", configfiles=[*files, "tags.yaml"])
    assert jobs(planned) == {"ensemble"} and re.search(r"(?m): 1 of \d+ jobs: ensemble$", planned)

    with (project / "mine/test.jsonl").open("a") as file:
        file.write(json.dumps({"text": "mast", "label": 0}) + "\n")
    assert jobs(snakemake(project, "-n", configfiles=files)) == TASKS | {"tasks_table", "report"}
    write_task(project / "mine", num_fewshot=0)
    assert jobs(snakemake(project, "-n", configfiles=files)) == set()
    task.write_text(task.read_text().replace("The topic is", "It is"))
    assert jobs(snakemake(project, "-n", configfiles=files)) == TASKS | {"tasks_table", "report"}

    assert done(snakemake(project, "--cores", "2")) == ["report"]
    assert not list((results / "eval").glob("tasks*"))
    assert (results / "report.html").read_bytes() == (finished / "results/report.html").read_bytes()


@pytest.mark.slow
def test_an_unknown_task_stops_a_run_before_anything_is_done(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    (project / "tasks.yaml").write_text("eval: {tasks: [lambada_openia]}\n")
    printed = snakemake(project, "--cores", "2", configfiles=["small.yaml", "tasks.yaml"], ok=False)
    assert done(printed) == [] and "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if "eval.tasks: lambada_openia. " in line]
    assert line.endswith("Did you mean lambada_openai?")


@pytest.mark.slow
def test_a_model_that_was_changed_is_refused(finished: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(finished / "results/experts/0", tmp_path / "0")
    path = tmp_path / "0/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    cfg = make_config(eval={"tasks": [str(write_task(tmp_path))]})
    config.write(cfg, tmp_path / "config.json")
    arguments = ["--config", str(tmp_path / "config.json"), "--name", "0", "--model", str(path)]
    with pytest.raises(SystemExit):
        run_rule(eval_task.main, [*arguments, "--out", str(tmp_path / "out.json")])
    assert "another file than it was" in capsys.readouterr().err and not (tmp_path / "out.json").exists()
