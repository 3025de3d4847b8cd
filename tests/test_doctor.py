"""The whole command on a machine without Slurm. tests/slurm/test_doctor_slurm.py runs it on a real Slurm."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtm_pipeline import doctor
from cbtm_pipeline.ops import run_checks
from cbtm_pipeline.ops.facts import Facts
from cbtm_pipeline.ops.finding import Line
from made_project import make_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project on a machine without Slurm."""
    folder = make_project(tmp_path / "project")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(folder)
    return folder


def examine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["cbtm doctor", *args])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    code = end.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().out


def test_without_slurm(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (project / "enough.yaml").write_text("train: {steps: 100000}\n")  # tokens for experts to win
    code, printed = examine(monkeypatch, capsys, "--configfile", "small.yaml", "enough.yaml")
    assert code == 0
    assert "warn  Slurm: no sbatch in PATH, so local runs only" in printed
    assert "jobs       none on Slurm" in printed and printed.endswith("0 FAIL, 1 warn, 5 ok\n")
    code, printed = examine(monkeypatch, capsys, "--configfile", "small.yaml", "--profile", "slurm")
    assert code == 1 and "FAIL  Slurm: no sbatch in PATH" in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cluster: {kk: 2}", "cluster.kk: unknown key"),
        ("cluster: {k: 0}\ntrain: {steps: x}", "train.steps: 'x'"),
        ("corpus: {train: [nothing.jsonl]}", "nothing.jsonl: no such file"),
        ("corpus: {train: [gone.jsonl]}", "gone.jsonl: No such file or directory"),
        ("corpus: [", "mine.yaml: not YAML"),
        ("- 1", "mine.yaml: no sections"),
        ("outdir: /proc/results", "/proc"),
        ("model: {scratch: {hiden_size: 3}}", "model.scratch.hiden_size: unknown key"),
        ("model: {scratch: {hidden_size: 65536, num_hidden_layers: 200, vocab_size: 300}}", "disk: "),
    ],
)
def test_what_would_fail_fails_in_one_line(
    content: str, words: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (project / "mine.yaml").write_text(content)
    (project / "gone.jsonl").symlink_to("nowhere")
    code, printed = examine(monkeypatch, capsys, "--configfile", "small.yaml", "mine.yaml")
    assert code == 1
    (line,) = [line for line in printed.splitlines() if words in line]
    assert line.startswith("FAIL  ") and line.count(". ") >= 2 and line.endswith((".", "?"))


def test_a_missing_config_and_a_broken_check_are_findings(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code, printed = examine(monkeypatch, capsys, "--configfile", "none.yaml")
    assert code == 1 and "FAIL  none.yaml: No such file or directory" in printed

    def check_moon(facts: Facts) -> Iterator[Line]:
        yield "ok", "the moon: is there"
        raise KeyError("far side")

    monkeypatch.setattr(doctor, "CHECKS", (check_moon, run_checks.check_config))
    found = list(doctor.run(Facts(["small.yaml"], None)))
    assert [level for level, _ in found] == [
        "ok",
        "warn",
        "ok",
    ] and "check_moon: not done (KeyError: 'far side')" in found[1][1]
