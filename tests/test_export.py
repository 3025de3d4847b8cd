"""`cbtm export`: a verified copy of the ensemble."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import made_ensemble as made
from cbtm_pipeline import export
from cbtm_pipeline.inference import moe_folder, package
from damaged import flipped, replaced


@pytest.fixture(scope="module")
def outdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.make(tmp_path_factory.mktemp("run") / "results").parent


def test_the_copy_is_whole_readable_and_no_link(outdir: Path, tmp_path: Path, capsys) -> None:
    to = tmp_path / "new/copy"
    mask = os.umask(0o077)
    try:
        assert made.command(export.main, to, "--outdir", outdir) == 0
    finally:
        os.umask(mask)
    assert capsys.readouterr().out.startswith(f"{to}: an ensemble of ")
    assert package.verify(to) == package.verify(outdir / "ensemble")
    assert {path.relative_to(to) for path in to.rglob("*")} == {
        path.relative_to(outdir / "ensemble") for path in (outdir / "ensemble").rglob("*")
    }
    for path in [to, *to.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)
        assert path.is_dir() or path.stat().st_nlink == 1


def test_a_folder_that_is_not_empty_stays_as_it_is(outdir: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine").write_text("mine")
    assert made.command(export.main, tmp_path, "--outdir", outdir) == 1
    assert capsys.readouterr().err == f"{tmp_path}: not empty. Expected a new folder. Give another name.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert made.command(export.main, tmp_path / "mine", "--outdir", outdir) == 1
    assert made.command(export.main, outdir / "ensemble/copy", "--outdir", outdir) == 1
    assert not (outdir / "ensemble/copy").exists()


def test_a_damaged_ensemble_is_not_copied(outdir: Path, tmp_path: Path, capsys) -> None:
    path = outdir / "ensemble/experts/1/config.json"
    with replaced(path, flipped(path.read_bytes(), 30)):
        assert made.command(export.main, tmp_path / "copy", "--outdir", outdir) == 1
    assert str(path) in capsys.readouterr().err and not (tmp_path / "copy").exists()


def test_without_a_result_one_line_says_so(tmp_path: Path, capsys) -> None:
    assert made.command(export.main, tmp_path / "copy", "--outdir", tmp_path / "none") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/none/ensemble: no ensemble. Expected ")


def test_a_mixture_of_experts_needs_the_run_for_its_routers(outdir: Path, tmp_path: Path, capsys) -> None:
    run = shutil.copytree(outdir, tmp_path / "results")
    (run / "assignments/manifest.json").unlink()
    assert made.command(export.main, tmp_path / "moe", "--moe", "--outdir", run) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--steps", "3"], "--steps: without --moe. Expected both. Add --moe, or leave --steps out.\n"),
        (["--measure"], "--measure: without --moe. Expected both. Add --moe, or leave --measure out.\n"),
        (["--moe", "--steps=-1"], "--steps: -1. Expected a whole number of at least 0. Change it.\n"),
    ],
)
def test_options_that_do_not_fit_together_are_refused_in_one_line(
    outdir: Path, tmp_path: Path, capsys, options: list[str], line: str
) -> None:
    assert made.command(export.main, tmp_path / "copy", "--outdir", outdir, *options) == 1
    assert capsys.readouterr().err == line and not (tmp_path / "copy").exists()


def test_a_mixture_of_experts_within_the_ensemble_is_refused(outdir: Path, capsys) -> None:
    to = outdir / "ensemble/moe"
    assert made.command(export.main, to, "--moe", "--outdir", outdir) == 1
    line = f"{to}: within {outdir}/ensemble. Expected a folder elsewhere. Give another name.\n"
    assert capsys.readouterr().err == line and not to.exists()


def test_a_mixture_of_experts_is_there_whole_or_not_at_all(outdir: Path, tmp_path: Path) -> None:
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**made.SIZES, vocab_size=made.VOCAB_SIZE))
    (tmp_path / "empty").mkdir()
    for to in (tmp_path / "new", tmp_path / "empty"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(TypeError):  # it ends after the weights, where it writes the card
            moe_folder.save(net, outdir / "ensemble", None, to)  # type: ignore
        assert sorted(tmp_path.rglob("*")) == before
        moe_folder.save(net, outdir / "ensemble", "A card.", to)
        assert (to / "README.md").read_text() == "A card." and (to / "tokenizer.json").exists()
        again = AutoModelForCausalLM.from_pretrained(to)
        assert torch.equal(again.lm_head.weight, net.lm_head.weight)
