"""The result of a real run: the ensemble that it leaves, and the commands that use it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import made_encoder
import made_ensemble as made
from cbtm_pipeline import clusters, export, generate, route_text, score
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import heldout, shard_files
from cbtm_pipeline.inference import package
from cbtm_pipeline.mixture import verdict
from made_project import ROOT, done, snakemake

pytestmark = pytest.mark.slow


@pytest.fixture
def results(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of a finished run, in whose project folder the test works."""
    monkeypatch.chdir(finished)
    return finished / "results"


def reported_texts(results: Path) -> list[str]:
    """The held-out documents that the table is about."""
    manifest = artifact.read_sealed(results / "shards/manifest.json", "shards")
    metrics = artifact.read_sealed(results / "eval/metrics.json", "metrics")
    ids, texts = [], []
    for entry in shard_files.entries(results / "shards/manifest.json", manifest, "eval"):
        table = pq.read_table(results / "shards" / f"{entry['name']}.parquet")
        ids += table["doc_id"].to_pylist()
        texts += table["text"].to_pylist()
    plan = metrics["made_with"]
    is_calibration = heldout.calibration_documents(ids, plan["calibration_share"], plan["rng_seed"])
    return [text for text, chosen in zip(texts, is_calibration, strict=True) if not chosen]


def test_the_scores_of_the_reported_text_are_those_of_the_table(
    results: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "reported.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in reported_texts(results)))
    assert made.command(score.main, path, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["files"]
    metrics = artifact.read_sealed(results / "eval/metrics.json", "metrics")
    expected = {row["system"].replace("-", " ", 1): row for row in metrics["systems"]}
    expected["ensemble"] = verdict.headline(metrics)
    expected["dense-steps"] = expected.pop("dense steps")
    assert (found["n_tokens"], found["n_bytes"]) == (metrics["n_tokens"], metrics["n_bytes"])
    systems = {row["system"]: row for row in found["systems"]}
    assert list(systems) == ["ensemble", "expert 0", "expert 1", "dense", "dense-steps", "seed"]
    for name, row in systems.items():
        assert row["perplexity"] == pytest.approx(expected[name]["perplexity"], rel=1e-5), name
        assert row["bits_per_byte"] == pytest.approx(expected[name]["bits_per_byte"], rel=1e-5), name


def test_every_command_works_on_a_run(results: Path, tmp_path: Path, capsys) -> None:
    assert made.command(clusters.main) == 0
    assert made.command(generate.main, "butter and", "--max-new-tokens", 5) == 0
    assert made.command(route_text.main, "butter flour oven", "--html", tmp_path / "page.html") == 0
    assert made.command(export.main, tmp_path / "copy") == 0
    assert capsys.readouterr().err == ""
    assert package.verify(tmp_path / "copy")["made_from"] == package.verify(results / "ensemble")["made_from"]


def python_lines(page: Path) -> str:
    found = re.search(r"```python\n(.*?)```", page.read_text(), re.S)
    assert found
    return found[1]


def test_the_lines_of_the_readme_and_of_the_model_card_run(results: Path, tmp_path: Path) -> None:
    """Those of the card in a copy, without this package."""
    package.copy(results / "ensemble", tmp_path / "copy")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    alone = f"import sys; sys.modules['cbtm_pipeline'] = None\n{python_lines(tmp_path / 'copy/README.md')}"
    for folder, lines in ((tmp_path / "copy", alone), (results.parent, python_lines(ROOT / "README.md"))):
        run = subprocess.run(
            [sys.executable, "-c", lines], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert len(run.stdout) > 20


def test_an_encoder_takes_the_ensemble_out_of_the_run(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    made_encoder.write(project / "encoder")
    (project / "encoder.yaml").write_text("embed: {encoder: encoder}\nroute: {window_tokens: 8}\n")
    printed = snakemake(project, "--cores", "2", configfiles=["small.yaml", "encoder.yaml"])
    assert "report" in done(printed) and "ensemble" not in done(printed)
    assert not (project / "results/ensemble").exists()
    assert "ensemble" in done(snakemake(project, "--cores", "2"))
    assert (project / "results/ensemble/README.md").read_bytes() == (
        finished / "results/ensemble/README.md"
    ).read_bytes()
