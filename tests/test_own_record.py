"""The results folder is its own record: what a start runs, wherever the folder is, whoever started before."""

import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from test_workflow import CHANGES, MERGE, TRAINING, jobs, kill_at, retrained

from cbtm_pipeline import config
from cbtm_pipeline.ops import planned
from cbtm_pipeline.provenance import chosen, stale
from cbtm_pipeline.provenance.stale import Asked
from made_project import done, make_project, snakemake, snakemake_command, write_corpus

pytestmark = pytest.mark.slow

NOTHING = "Nothing to be done"


def copy_of(project: Path, to: Path) -> Path:
    shutil.copytree(project, to, symlinks=True)
    return to


def as_it_is(project: Path) -> Path:
    return project


def moved_outdir(project: Path) -> Path:
    """The results lie in another folder; Snakemake has never seen it."""
    (project / "results").rename(project / "elsewhere")
    (project / "moved.yaml").write_text("outdir: elsewhere\n")
    return project


def second_clone(project: Path) -> Path:
    """Another folder with its own workflow, unknown to Snakemake; outdir and corpus by absolute path."""
    other = make_project(project.with_name("clone"))
    paths = {"outdir": str(project / "results"), "corpus": {"train": [str(project / "corpus.jsonl")]}}
    (other / "moved.yaml").write_text(yaml.safe_dump(paths))
    return other


def without_snakemakes_records(project: Path) -> Path:
    shutil.rmtree(project / ".snakemake")
    return project


def touched_and_copied(project: Path) -> Path:
    """The corpus lies in another folder and is newer; all times of the results are random."""
    (project / "data").mkdir()
    shutil.copyfile(project / "corpus.jsonl", project / "data/corpus.jsonl")
    (project / "corpus.jsonl").unlink()
    rng = random.Random(0)
    for path in (project / "results").rglob("*"):
        seconds = rng.uniform(1e9, 2e9)
        os.utime(path, (seconds, seconds))
    (project / "moved.yaml").write_text("corpus: {train: ['./data/*.jsonl']}\n")
    return project


SETTINGS = [as_it_is, moved_outdir, second_clone, without_snakemakes_records, touched_and_copied]


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda setting: setting.__name__)
def setting(
    finished: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("record")
    yield request.param(copy_of(finished, folder / "project"))
    shutil.rmtree(folder)


def configfiles(project: Path, *more: str) -> list[str]:
    moved = ["moved.yaml"] if (project / "moved.yaml").exists() else []
    return ["small.yaml", *moved, *more]


def planned_jobs(project: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The jobs of a start with a changed config, as the workflow computes them."""
    monkeypatch.chdir(project)
    content = planned.read_config(["config.yaml", *configfiles(project)])
    cfg = config.validate(planned.merge(content, yaml.safe_load(change) or {}))
    run = stale.start(cfg, stale.look(cfg), Asked([], [], False, False)).run
    adopted = {str(job._replace(rule="adopt")) for job in run if chosen.is_adopted(cfg, *job)}
    others = {job for job in run if not chosen.is_adopted(cfg, *job)}
    return adopted | {job.rule if job.rule == "choose" else str(job) for job in others}


def test_config_changes_rerun_the_same_jobs_wherever_the_results_are(
    setting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NOTHING in snakemake(setting, "-n", configfiles=configfiles(setting))
    for change, expected in CHANGES.items():
        assert planned_jobs(setting, change, monkeypatch) == expected, change


def test_snakemake_runs_what_the_records_say(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "change.yaml").write_text("train: {lr: 0.001}")
    printed = snakemake(finished, "-n", configfiles=configfiles(finished, str(tmp_path / "change.yaml")))
    assert jobs(printed) == TRAINING


def test_the_report_of_a_moved_run_shows_what_was_trained(finished: Path, tmp_path: Path) -> None:
    project = moved_outdir(copy_of(finished, tmp_path / "project"))
    report = project / "elsewhere/report.html"
    before = report.read_bytes()
    report.unlink()
    assert done(snakemake(project, "--cores", "2", configfiles=configfiles(project))) == ["report"]
    assert report.read_bytes() == before
    page = before.decode()
    assert "train_expert dense" in page and "<td>lr</td>" in page.replace(' class="n"', "")


def trained(project: Path) -> set[str]:
    """The experts whose last job has trained them."""
    logs = (project / "results/logs/train_expert").iterdir()
    return {path.stem for path in logs if " step 1/" in path.read_text()}


def timeless(page: bytes) -> bytes:
    """The report without what it says of when, and how long, models were trained; and without its seal."""
    times = (
        rb'<meta name="cbtm"[^>]*>|Trained from [^<]* together took [^<]*?\. |<td class="n">[^<]*[smhd]</td>'
    )
    return re.sub(times, b"", page)


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a results folder whose bytes do not depend on time or place; the report without times."""
    times = {"metrics.jsonl", "files.json", ".corpus.json", ".corpus-files.json"}
    times |= {"config.json", ".lock"}
    return {
        str(path.relative_to(folder)): timeless(path.read_bytes())
        if path.name == "report.html"
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not {"logs", "tensorboard", "kept", "work", "slurm"} & set(path.relative_to(folder).parts)
        and path.name not in times
    }


def test_deleted_weights_are_noticed_and_made_again(finished: Path, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "project")
    (project / "results/experts/1/model.safetensors").unlink()
    expected = {"train_expert 1", "score_expert 1"} | MERGE
    printed = snakemake(project, "--cores", "2")
    assert set(done(printed)) == expected
    assert "experts/1/model.safetensors is missing: train_expert 1" in printed
    assert printed.count("nothing to do") >= 3, "scores, table and report are what they were"
    assert files_of(project / "results") == files_of(finished / "results")


def test_an_expert_that_lacks_a_file_is_trained_again(finished: Path, tmp_path: Path) -> None:
    """What is kept of it lacks the file, too, and must not come back."""
    project = copy_of(finished, tmp_path / "project")
    (project / "results/experts/1/config.json").unlink()
    printed = snakemake(project, "--cores", "2")
    assert set(done(printed)) == {"train_expert 1", "score_expert 1"} | MERGE
    assert "nothing to do" not in (project / "results/logs/train_expert/1.log").read_text()
    assert files_of(project / "results") == files_of(finished / "results")


@pytest.mark.parametrize(
    ("file", "job"),
    [
        ("tokenizer/tokenizer_config.json", "tokenizer"),
        ("shards/train-00000.parquet", "shard"),
        ("embed/train-00000.npy", "embed"),
        ("cluster/top_terms.json", "fit_kmeans"),
        ("assignments/validation.arrow", "assign"),
        ("experts/0/config.json", "train_expert 0"),
        ("experts/0/files.json", "train_expert 0"),
        ("scores/0.npz", "score_expert 0"),
        ("eval/table.txt", "eval_ensemble"),
    ],
)
def test_a_deleted_file_is_noticed(
    finished: Path, tmp_path: Path, file: str, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(finished, tmp_path / "project")
    (project / "results" / file).unlink()
    assert job in planned_jobs(project, "", monkeypatch)


@pytest.mark.parametrize(
    ("file", "job"),
    [
        ("embed/embedder.npz", "embed"),
        ("cluster/top_terms.json", "fit_kmeans"),
        ("eval/table.txt", "eval_ensemble"),
    ],
)
def test_a_file_overwritten_by_hand_is_made_again(
    finished: Path, tmp_path: Path, file: str, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(finished, tmp_path / "project")
    (project / "results" / file).write_text("[]\n")
    assert job in planned_jobs(project, "", monkeypatch)


def test_what_no_record_fits_is_made_again(finished: Path, tmp_path: Path) -> None:
    """A start runs what its lines announce, also where the file is there and its record is damaged."""
    project = copy_of(finished, tmp_path / "project")
    for file in ("report.html", "experts/1/card.json"):
        (project / "results" / file).write_text("{}\n")
    printed = snakemake(project, "--cores", "2")
    assert set(done(printed)) == {"train_expert 1", "score_expert 1"} | MERGE
    assert files_of(project / "results") == files_of(finished / "results")


def test_an_edited_readme_of_an_expert_trains_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy_of(finished, tmp_path / "project")
    folder = project / "results/experts/1"
    (folder / "README.md").write_text("Ours.\n")
    shutil.rmtree(folder / "tensorboard")
    assert planned_jobs(project, "", monkeypatch) == set()
    (project / "results/scores/1.npz").unlink()
    assert "score_expert 1" in done(snakemake(project, "--cores", "2")), "the expert is read as it is"
    assert (folder / "README.md").read_text() == "Ours.\n"


def test_preview_of_a_target_that_does_not_exist_says_so(finished: Path) -> None:
    command = [*snakemake_command()[:1], "-m", "cbtm_pipeline", "preview", "train_exprt"]
    command += ["--configfile", "small.yaml"]
    run = subprocess.run(command, cwd=finished, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "train_exprt: nothing of" in run.stderr


def test_preview_of_a_corpus_that_is_gone_says_so(finished: Path, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "project")
    (project / "corpus.jsonl").unlink()
    command = [*snakemake_command()[:1], "-m", "cbtm_pipeline", "preview", "--configfile", "small.yaml"]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.startswith("corpus.jsonl: no such file.") and run.stderr.count("\n") == 1


ANOTHER_RATE = "train: {lr: 0.001, controls: []}"


@pytest.fixture(scope="module")
def another_rate(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project after a run with another rate, without controls; its terminal is another.txt."""
    project = copy_of(finished, tmp_path_factory.mktemp("rate") / "project")
    (project / "change.yaml").write_text(ANOTHER_RATE)
    printed = snakemake(project, "--cores", "2", configfiles=["small.yaml", "change.yaml"])
    (project / "another.txt").write_text(printed)
    return project


def test_another_rate_says_what_it_replaces_keeps_it_and_ends_as_a_fresh_run(
    finished: Path, another_rate: Path, tmp_path: Path
) -> None:
    printed = (another_rate / "another.txt").read_text()
    assert "train.lr 0.008 -> 0.001" in printed and "replaces 4 trained models" in printed
    assert len(list((another_rate / "results/kept/experts").iterdir())) == 7
    fresh = make_project(tmp_path / "fresh", train={"lr": 0.001, "controls": []})
    snakemake(fresh, "--cores", "2")
    assert files_of(another_rate / "results") == files_of(fresh / "results")
    assert files_of(another_rate / "results") != files_of(finished / "results")


def test_experts_on_another_disk_are_kept_and_come_back_unless_they_were_damaged(
    finished: Path, another_rate: Path, tmp_path: Path
) -> None:
    project = copy_of(another_rate, tmp_path / "project")
    experts, kept = project / "results/experts", project / "results/kept/experts"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other_disk:
        shutil.copytree(experts, Path(other_disk, "experts"))
        shutil.rmtree(experts)
        experts.symlink_to(Path(other_disk, "experts"))
        assert NOTHING in snakemake(project, "-n", configfiles=["small.yaml", "change.yaml"])
        weights = next(kept.glob("1-*/model.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert "kept models" in snakemake(project, "--cores", "2")
        assert trained(project) == {"1"}, "the others were whole"
        assert experts.is_symlink()
        assert files_of(experts) == files_of(finished / "results/experts")
        there = {path.name for path in (another_rate / "results/experts").iterdir() if path.is_dir()}
        found = {path.parent.name.split("-")[0]: path for path in kept.glob("*/model.safetensors")}
        assert found.keys() == there
        for name, path in found.items():
            assert (
                path.read_bytes() == (another_rate / f"results/experts/{name}/model.safetensors").read_bytes()
            )


def test_fewer_clusters_leave_nothing_that_looks_like_a_result(finished: Path, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "project")
    (project / "change.yaml").write_text(
        "cluster: {k: 1}\ntrain: {controls: []}\nrun: {keep_replaced: false}\n"
    )
    changed = ["small.yaml", "change.yaml"]
    printed = snakemake(project, "--cores", "2", configfiles=changed)
    assert "takes 4 trained models out of the run" in printed and "cluster.k 2 -> 1" in printed
    results = project / "results"
    assert {path.name for path in (results / "experts").iterdir()} == {"seed", "0", "dense"}
    assert {path.stem for path in (results / "scores").iterdir()} == {"seed", "0", "dense"}
    assert not (results / "random").exists() and not (results / "kept").exists()
    assert NOTHING in snakemake(project, "-n", configfiles=changed)


def test_new_held_out_text_trains_nothing_again(tmp_path: Path) -> None:
    corpus = {"eval": ["held-*.jsonl"]}
    project = make_project(tmp_path / "project", corpus=corpus, cluster={"k": 1}, train={"controls": []})
    write_corpus(project / "held-1.jsonl", 30, rng_seed=1)
    held_out = (project / "held-1.jsonl").read_text().replace('"id": "', '"id": "held-')
    (project / "held-1.jsonl").write_text(held_out)
    snakemake(project, "--cores", "2")
    weights = {path: path.stat().st_ino for path in (project / "results/experts").glob("*/model.safetensors")}
    before = json.loads((project / "results/eval/metrics.json").read_text())
    text = held_out.replace('"id": "', '"id": "new-').replace('"text": "', '"text": "x ')
    (project / "held-2.jsonl").write_text(text)
    printed = snakemake(project, "--cores", "2")
    assert "tokenizer" not in done(printed) and trained(project) == set()
    assert {path: path.stat().st_ino for path in weights} == weights
    metrics = json.loads((project / "results/eval/metrics.json").read_text())
    assert metrics["n_documents"] > before["n_documents"]
    assert metrics["weights"] == before["weights"]
    row = {**json.loads((project / "corpus.jsonl").read_text().splitlines()[0]), "id": "taken"}
    (project / "held-3.jsonl").write_text(json.dumps(row) + "\n")
    snakemake(project, "--cores", "2", "results/experts/seed/model.safetensors")
    assert trained(project) == {"seed"}, "a document that training loses changes the models"


# A start that replaces models is killed when it has published such a file.
KILL_POINTS = ["experts/seed/card.json", "experts/0/model.safetensors"]


def test_killed_while_it_replaces_models_and_started_again_either_way(
    finished: Path, another_rate: Path, tmp_path: Path
) -> None:
    """With the old config, the run ends as it was before; with the new one, as one that was never killed."""
    project = copy_of(finished, tmp_path / "project")
    (project / "change.yaml").write_text(ANOTHER_RATE)
    changed = ["small.yaml", "change.yaml"]
    for point in KILL_POINTS:
        kill_at(project, point, changed)
    left = project / "results/experts/1/.staging/README.md"  # by a training that was killed as it published
    left.parent.mkdir(parents=True)
    left.touch()
    snakemake(project, "--cores", "2")
    assert trained(project) == set(), "the old models were kept"
    assert files_of(project / "results") == files_of(finished / "results")
    snakemake(project, "--cores", "2", configfiles=changed)
    assert files_of(project / "results") == files_of(another_rate / "results")


def test_preview_says_in_a_dozen_lines_what_a_start_would_do(finished: Path, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "project")
    (project / "change.yaml").write_text("cluster: {k: 3}")
    command = [*snakemake_command()[:1], "-m", "cbtm_pipeline", "preview", "--configfile", "small.yaml"]
    run = subprocess.run([*command, "change.yaml"], cwd=project, capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) <= 12
    assert "cluster.k 2 -> 3" in run.stdout
    assert "replaces 5 trained models" in run.stdout and "results/kept" in run.stdout
    assert "7 trainings" in run.stdout and "tokens/s" in run.stdout
    run = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    assert run.stdout == "results: nothing to do\n"


def test_new_scores_only_where_an_expert_is_another(finished: Path) -> None:
    printed = snakemake(finished, "-n", "--forcerun", "results/experts/1/model.safetensors")
    assert jobs(printed) == retrained({"1"}) | MERGE
