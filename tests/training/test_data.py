"""The tokens of an expert: files of another kind or another run are refused."""

import json
import shutil
from pathlib import Path

import pytest

import made_training as made
from cbtm_pipeline import plan
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
    with pytest.raises(ValueError, match=r"train-00001\.arrow: made from something else than its manifest"):
        data.read(tmp_path / "assignments/manifest.json", make_plan("0"))


def test_missing_tokens_are_noticed(outdir, tmp_path):
    shutil.copytree(outdir / "shards", tmp_path / "shards")
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    del manifest["shards"][1]["split"]  # not a training shard any more
    manifest["shards"][0]["n_tokens"] += 1
    manifest["shards"][1]["split"] = "train"
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"\d+ tokens in its files\. Expected \d+"):
        data.read(tmp_path / "shards/manifest.json", make_plan("dense"))
