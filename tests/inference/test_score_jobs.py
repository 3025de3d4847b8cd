"""`cbtm score --cores`: a job for each model, with the numbers of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import made_ensemble as made
from cbtm_pipeline import score
from cbtm_pipeline.base import artifact
from made_project import write_corpus

pytestmark = pytest.mark.slow
FILES = ("new.jsonl", "note.txt", "more/new.jsonl", "new.jsonl")
MODELS = ("0", "1", "dense", "seed")


class Printed(NamedTuple):
    status: int
    out: str
    err: str


def jobs(project: Path, *argv: str) -> Printed:
    """Run `cbtm score` on the project's new files, by jobs."""
    words = [sys.executable, "-m", "cbtm_pipeline", "score", *FILES, "--cores", "2", "--name", "new", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True)
    return Printed(run.returncode, run.stdout, run.stderr)


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project with new files, scored by jobs. What was printed is in printed.json."""
    folder = tmp_path_factory.mktemp("scored") / "project"
    shutil.copytree(finished, folder, symlinks=True)
    shutil.rmtree(folder / "results/experts/dense-steps")  # a job less
    (folder / "more").mkdir()
    write_corpus(folder / "more/new.jsonl", 12, rng_seed=7)
    write_corpus(folder / "new.jsonl", 30, rng_seed=5)
    texts = [json.loads(line)["text"] for line in (folder / "new.jsonl").read_text().splitlines()]
    rows = [{"id": "the same", "text": text} for text in [*texts, " ".join(texts)]]
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    (folder / "note.txt").write_text("the ship left the harbour")
    printed = jobs(folder, "--json")
    assert printed.status == 0, printed.err
    (folder / "printed.json").write_text(printed.out)
    return folder


def here(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, *argv: str) -> dict[str, Any]:
    """What one process says of the same files."""
    monkeypatch.chdir(project)
    assert made.command(score.main, *FILES, "--json", *argv) == 0
    return json.loads(capsys.readouterr().out)


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """All is the same; numbers to 1e-5."""
    for file, other in zip(found["files"], expected["files"], strict=True):
        for row, other_row in zip(file.pop("systems"), other.pop("systems"), strict=True):
            assert row.pop("system") == other_row.pop("system")
            assert row == pytest.approx(other_row, rel=1e-5)
    assert found == expected


def test_jobs_say_what_one_process_says(project: Path, monkeypatch, capsys) -> None:
    expected = here(project, monkeypatch, capsys)
    assert expected["files"][0]["n_documents"] == 31 and len(expected["files"][0]["left_out"]) == 1
    assert len(expected["files"][0]["systems"]) == 1 + len(MODELS)
    check_equal(json.loads((project / "printed.json").read_text()), expected)


def test_a_further_start_scores_nothing_again_whatever_is_excluded(
    project: Path, monkeypatch, capsys
) -> None:
    scores = [project / f"results/scored/new/scores/{name}.npz" for name in MODELS]
    before = [path.stat().st_mtime_ns for path in scores]
    printed = jobs(project, "--json", "--exclude", "0")
    assert printed.status == 0 and "Nothing to be done" in printed.err, printed.err
    check_equal(json.loads(printed.out), here(project, monkeypatch, capsys, "--exclude", "0"))
    assert [path.stat().st_mtime_ns for path in scores] == before


def test_other_windows_do_not_go_into_the_same_folder(project: Path) -> None:
    printed = jobs(project, "--context", "16")
    assert printed.status == 1 and printed.err.count("\n") == 1
    assert "results/scored/new: was begun with another windows. Expected the same command." in printed.err


def test_a_damaged_score_is_made_again_as_the_error_says(project: Path) -> None:
    path = project / "results/scored/new/scores/1.npz"
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    printed = jobs(project)
    assert printed.status == 1 and printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith("results/scored/new/scores/1.npz: damaged (")
    assert last.endswith("Remove results/scored/new/scores/1.npz, and type the same command again.")
    path.unlink()
    shown = jobs(project, "--dry-run")
    assert shown.status == 0 and shown.out.count("rule score_expert:") == 1 and "rule shard" not in shown.out
    assert "perplexity" not in shown.out
    path.write_bytes(content)
    assert artifact.read_npz(path, "scores")[1]["made_from"].keys() == {"expert", "held_out"}
