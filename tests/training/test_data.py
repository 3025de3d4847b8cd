"""The tokens of an expert: files of another kind or another run, and damaged ones, are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import damaged
import made_training as made
from cbtm_pipeline import plan
from cbtm_pipeline.corpus import heldout
from cbtm_pipeline.training import data


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A small corpus."""
    out = tmp_path_factory.mktemp("data")
    made.write_corpus(out)
    return out


def make_plan(name: str) -> plan.TrainingPlan:
    return plan.train_expert(made.make_config(), name)


def test_data_of_another_kind_is_refused(outdir):
    with pytest.raises(ValueError, match=r"shards/manifest\.json: shards\. Expected assignments"):
        data.read(outdir / "shards/manifest.json", make_plan("0"))
    with pytest.raises(ValueError, match=r"random/manifest\.json: other clusters\. Expected clusters"):
        data.read(outdir / "random/manifest.json", make_plan("0"))
    with pytest.raises(ValueError, match=r"assignments/manifest\.json: other clusters\. Expected random"):
        data.read(outdir / "assignments/manifest.json", make_plan("random-0"))


def test_shards_of_another_run_are_refused(outdir, tmp_path):
    shutil.copytree(outdir / "assignments", tmp_path / "assignments")
    shutil.copy(outdir / "one/train-00001.arrow", tmp_path / "assignments")
    with pytest.raises(ValueError, match=r"train-00001\.arrow: not the file that its manifest speaks of"):
        data.read(tmp_path / "assignments/manifest.json", make_plan("0"))


def test_token_files_in_each_others_place_are_refused(outdir, tmp_path):
    for folder, name in (("shards", "dense"), ("assignments", "0"), ("random", "random-0")):
        shutil.copytree(outdir / folder, tmp_path / folder)
        shutil.copy(outdir / folder / "train-00000.arrow", tmp_path / folder / "train-00001.arrow")
        with pytest.raises(ValueError, match=r"train-00001\.arrow: .*that its manifest speaks of"):
            data.read(tmp_path / folder / "manifest.json", make_plan(name))


def test_a_missing_file_is_noticed(outdir, tmp_path):
    shutil.copytree(outdir / "shards", tmp_path / "shards")
    (tmp_path / "shards/train-00001.arrow").unlink()
    with pytest.raises(FileNotFoundError):
        data.read(tmp_path / "shards/manifest.json", make_plan("dense"))


@pytest.mark.parametrize(
    ("folder", "name"), [("shards", "dense"), ("assignments", "1"), ("random", "random-0")]
)
def test_a_damaged_token_file_is_refused_or_its_damage_is_never_read(outdir, folder, name):
    """Of 200 damages, no one changes the tokens of a training. Damage in another cluster's tokens is none."""
    manifest = outdir / folder / "manifest.json"
    expected = data.read(manifest, make_plan(name)).stream
    tokens = expected.read(0, expected.n_tokens)
    path, n_refused = manifest.with_name("train-00000.arrow"), 0
    for content in damaged.versions(path.read_bytes(), 200):
        with damaged.replaced(path, content):
            try:
                found = data.read(manifest, make_plan(name)).stream
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")
                n_refused += 1
                continue
            assert np.array_equal(found.read(0, found.n_tokens), tokens)
    assert n_refused > (120 if folder == "shards" else 70)


def test_every_flipped_bit_of_a_token_is_refused(outdir):
    path = outdir / "assignments/train-00000.arrow"
    how, content = make_plan("0"), path.read_bytes()
    own = data.read(path.with_name("manifest.json"), how).stream.read(0, 40).astype(np.uint16).tobytes()
    start = content.index(own)
    for bit in range(8 * len(own)):
        changed = damaged.flipped(content, start + bit // 8, bit % 8)
        with damaged.replaced(path, changed), pytest.raises(ValueError, match=r"group 0 is not the one"):
            data.read(path.with_name("manifest.json"), how)


@pytest.mark.parametrize(
    ("path", "expert"),
    [
        (f"assignments/{heldout.VALIDATION_FILE}", "0"),
        ("shards/eval-00000.arrow", "dense"),
        ("shards/eval-00000.parquet", "seed"),
    ],
)
def test_damaged_validation_text_is_refused_by_a_training_that_reads_it(tmp_path, path, expert):
    made.write_corpus(tmp_path)
    made.write_validation(tmp_path)
    manifest = (tmp_path / path).with_name("manifest.json")
    validated = plan.train_expert(made.make_config(validations=2), expert)
    assert data.read(manifest, validated).validation is not None
    with damaged.replaced(tmp_path / path, (tmp_path / path).read_bytes()[:-100]):
        with pytest.raises(ValueError, match=path):
            data.read(manifest, validated)
        assert data.read(manifest, make_plan(expert)).validation is None


def test_a_changed_manifest_is_refused(outdir, tmp_path):
    shutil.copytree(outdir / "shards", tmp_path / "shards")
    path = tmp_path / "shards/manifest.json"
    for content in damaged.versions(path.read_bytes(), 100):
        with damaged.replaced(path, content), pytest.raises(ValueError, match=r"shards/manifest\.json: "):
            data.read(path, make_plan("dense"))
