"""The commands name a run or an ensemble in the same words, and what they cannot do in one line."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import made_ensemble as made
from cbtm_pipeline import (
    add_expert,
    clusters,
    config,
    ensemble,
    export,
    generate,
    preview,
    remove_expert,
    route_text,
    score,
    status,
)
from cbtm_pipeline.base import artifact
from cbtm_pipeline.inference import modeling_cbtm, package
from changed_config import changed


@pytest.fixture(scope="module")
def outdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.make(tmp_path_factory.mktemp("run") / "results").parent


@pytest.fixture(scope="module")
def less(outdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ensemble without expert 1."""
    out = tmp_path_factory.mktemp("less") / "ensemble"
    assert made.command(remove_expert.main, "1", "--from", outdir / "ensemble", "--out", out) == 0
    return out


def error(capsys: Any, main: Any, *argv: object) -> str:
    capsys.readouterr()
    assert made.command(main, *argv) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_a_changed_ensemble_is_exported_verified(less: Path, outdir: Path, tmp_path: Path, capsys) -> None:
    assert made.command(export.main, tmp_path / "copy", "--model", less) == 0
    assert package.verify(tmp_path / "copy") == package.verify(less)
    line = error(capsys, export.main, tmp_path / "moe", "--moe", "--model", less)
    assert line.startswith("--model: with --moe. Expected the run") and not (tmp_path / "moe").exists()


def test_the_experts_of_a_changed_ensemble_are_listed(less: Path, capsys) -> None:
    assert made.command(clusters.main, "--model", less) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "cluster"
    assert [line.split() for line in lines] == [
        ["0", "3.500", "butter", "flour"],
        ["2", "3.500", "rose", "soil"],
    ]
    assert made.command(clusters.main, "--model", less, "--json") == 0
    assert '"n_documents": null' in capsys.readouterr().out


def test_status_takes_outdir_as_the_other_commands_do(tmp_path: Path, capsys) -> None:
    for argv in ((tmp_path / "a",), ("--outdir", tmp_path / "a")):
        assert made.command(status.main, *argv) == 0
        assert capsys.readouterr().out.startswith(str(tmp_path / "a"))


def test_the_last_expert_runs_alone_and_the_card_says_so(less: Path, tmp_path: Path) -> None:
    assert made.command(remove_expert.main, "2", "--from", less, "--out", tmp_path / "one") == 0
    two, one = (artifact.read_json(folder / "config.json")["n_active"] for folder in (less, tmp_path / "one"))
    card = " ".join((tmp_path / "one/README.md").read_text().split())
    assert (two, one) == (2, 1)
    assert "the 2 experts with the largest weights run." in " ".join((less / "README.md").read_text().split())
    assert "# An ensemble of 1 expert " in card and "the expert with the largest weight runs." in card
    assert "1 expert language model, trained alone" in card
    assert modeling_cbtm.CBTMForCausalLM.from_pretrained(tmp_path / "one").config.n_active == 1


def test_the_new_folder_may_be_here_or_behind_a_link(outdir: Path, tmp_path: Path, monkeypatch) -> None:
    here, behind = tmp_path / "here", tmp_path / "behind"
    here.mkdir()
    behind.mkdir()
    (tmp_path / "link").symlink_to(behind)
    (tmp_path / "to_nothing").symlink_to(tmp_path / "new")
    monkeypatch.chdir(here)
    for out, folder in (
        (".", here),
        (tmp_path / "link", behind),
        (tmp_path / "to_nothing", tmp_path / "new"),
    ):
        assert made.command(remove_expert.main, "1", "--from", outdir / "ensemble", "--out", out) == 0
        record = package.verify(folder)
        assert {path.name for path in folder.iterdir()} == {
            name.split("/")[0] for name in record["files"]
        } | {package.FILES}
    assert Path.cwd() == here and (here / package.FILES).exists()


def test_a_page_that_has_no_name_is_one_line(outdir: Path, capsys) -> None:
    for name in ("/", "."):
        assert made.command(route_text.main, "butter", "--outdir", outdir, "--html", name) == 1
        line = capsys.readouterr().err
        assert line == f"{name}: a folder. Expected the name of a file to write. Give one.\n"


def test_a_missing_file_of_an_ensemble_says_what_to_do(outdir: Path, tmp_path: Path, capsys) -> None:
    for name in ("experts/1/model.safetensors", "tokenizer.json", "top_terms.json"):
        copy = shutil.copytree(outdir / "ensemble", tmp_path / name / "ensemble")
        (copy / name).unlink()
        for main, argv in {
            generate.main: ["butter", "--model", copy],
            export.main: [tmp_path / "out", "--model", copy],
            remove_expert.main: ["0", "--from", copy, "--out", tmp_path / "out"],
        }.items():
            line = error(capsys, main, *argv)
            assert (
                line.startswith(f"{copy / name}: missing. Expected ") and "Export or make it again." in line
            )
    assert not (tmp_path / "out").exists()


def test_an_expert_is_called_an_expert_and_no_damaged_ensemble(outdir: Path, capsys) -> None:
    for folder in (outdir / "experts/0", outdir / "ensemble/experts/0"):
        for main, argv in ((generate.main, ["butter"]), (route_text.main, ["butter"]), (clusters.main, [])):
            line = error(capsys, main, *argv, "--model", folder)
            assert line.startswith(f"{folder}: an expert. Expected an ensemble. Name the folder")


def test_a_folder_of_texts_is_scored_as_corpus_folders_are_read(outdir: Path, tmp_path: Path, capsys) -> None:
    law = tmp_path / "law"
    (law / "more").mkdir(parents=True)
    (law / "a.txt").write_text(made.text(20))
    (law / "more/b.jsonl").write_text('{"text": "butter ship"}\n')
    for name in ("notes.pdf", ".hidden.txt"):
        (law / name).write_text("x")
    assert made.command(score.main, law, "--outdir", outdir) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "documents" in line] == [
        str(law / "a.txt"),
        str(law / "more/b.jsonl"),
    ]
    (tmp_path / "empty").mkdir()
    line = error(capsys, score.main, tmp_path / "empty", "--outdir", outdir)
    assert "no matching file." in line and line.endswith("Correct FILE.\n")


def test_preview_and_doctor_elsewhere_say_where_to_go(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    expected = "No config.yaml here. Expected that of a project. Go to the project's folder, or name one with"
    expected += " --configfile."
    assert error(capsys, preview.main) == f"{expected}\n"
    run = subprocess.run(
        [sys.executable, "-m", "cbtm_pipeline", "doctor"], cwd=tmp_path, capture_output=True, text=True
    )
    assert f"FAIL  {expected}" in run.stdout


def test_one_expert_of_a_run_has_another_licence(outdir: Path, tmp_path: Path) -> None:
    tags = {"licence": "cc-by", "owner": "me", "experts": {"2": {"licence": "mit"}}}
    config.write(
        config.validate(changed(outdir=str(outdir), cluster__k=3, tags=tags)), tmp_path / "config.json"
    )
    out = tmp_path / "tagged"
    made.run(
        ensemble.main,
        ["--config", str(tmp_path / "config.json"), *made.arguments(outdir, out / "files.json")],
    )
    found = artifact.read_json(out / "config.json")["tags"]
    shared = {"licence": "cc-by", "owner": "me"}
    assert found == {"0": shared, "1": shared, "2": {"licence": "mit", "owner": "me"}}
    assert "license: unknown" in (out / "README.md").read_text(), "the whole has no single licence"
    assert modeling_cbtm.CBTMForCausalLM.from_pretrained(out, exclude=["tag:licence=cc-by"]).names == ["2"]
    before, after = package.read_record(outdir / "ensemble"), package.read_record(out)
    assert before["computes"] == after["computes"]


def test_add_expert_says_which_option_names_the_file(outdir: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.doc").write_text("court")
    config.write(config.validate(changed(outdir=str(outdir), cluster__k=3)), outdir / "config.json")
    line = error(capsys, add_expert.main, "law", "--corpus", tmp_path / "a.doc", "--outdir", outdir)
    assert "a.doc: unknown format." in line and line.endswith("Convert the file, or correct --corpus.\n")


def test_score_says_which_option_names_the_column(outdir: Path, tmp_path: Path, capsys) -> None:
    pq.write_table(pa.table({"body": ["butter"]}), tmp_path / "a.parquet")
    line = error(capsys, score.main, tmp_path / "a.parquet", "--outdir", outdir)
    assert "no column text." in line and line.endswith("Set --text-field.\n")
