"""Other programs open the results of a finished run: the lines of docs/elsewhere.md, as they stand."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbtm_pipeline import score_expert
from cbtm_pipeline.corpus import token_files
from cbtm_pipeline.training import model
from made_project import ROOT, TOPICS, snakemake_command

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the clients
PAGE = (ROOT / "docs/elsewhere.md").read_text()


def lines(language: str, word: str) -> str:
    """The block of the page in this language that holds the word."""
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", PAGE, re.S) if word in b]
    return found


@pytest.fixture
def project(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The finished run, as the current folder."""
    monkeypatch.chdir(finished)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return finished


def run(word: str, **names: Any) -> dict[str, Any]:
    """Run the page's Python block with this word. Returns its names."""
    exec(compile(lines("python", word), "docs/elsewhere.md", "exec"), names)
    return names


def test_duckdb_counts_the_documents_of_each_cluster(project: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    manifest = json.loads((project / "results/assignments/manifest.json").read_text())
    found = duckdb.sql(lines("sql", "assignments")).fetchall()
    expected = zip(manifest["n_documents"], manifest["n_tokens"], strict=True)
    assert found == [(j, *sizes) for j, sizes in enumerate(expected)]


def test_duckdb_says_the_perplexity_of_each_domain(project: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(lines("sql", "domain")).fetchall()
    assert [domain for domain, *_ in found] == sorted(TOPICS)
    whole = re.sub(r"domain, |GROUP BY.*", "", lines("sql", "domain"))
    ((ensemble, dense),) = duckdb.sql(whole).fetchall()
    systems = json.loads((project / "results/eval/metrics.json").read_text())["systems"]
    by_name = {row["system"]: row["perplexity"] for row in systems}
    assert dense == pytest.approx(by_name["dense-steps"])
    best = min((row for row in systems if row["headline"]), key=lambda row: row["calibration_nll"])
    assert ensemble == pytest.approx(best["perplexity"])


def test_polars_pandas_and_datasets_read_the_tables(project: Path) -> None:
    manifest = json.loads((project / "results/shards/manifest.json").read_text())
    train = [shard for shard in manifest["shards"] if shard["split"] == "train"]
    pytest.importorskip("polars")
    longest = run("polars")["longest"]
    assert len(longest) == 5 and longest["n_tokens"].is_sorted(descending=True)
    pytest.importorskip("pandas")
    sizes = run("pandas")["sizes"]
    route = np.load(project / "results/route/distances.npz")
    expected = np.bincount(route["cluster"], np.diff(route["offsets"]), 2)
    assert sizes.tolist() == expected[expected > 0].tolist()
    pytest.importorskip("datasets")
    texts = run("datasets")["texts"]
    assert len(texts) == sum(shard["n_documents"] for shard in train) and set(texts[0]["text"].split())


def test_tensorboard_shows_every_training(project: Path) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    logdir = lines("sh", "tensorboard").split("--logdir ")[1].strip()
    found = EventMultiplexer().AddRunsFromDirectory(logdir).Reload()
    names = {path.name for path in (project / "results/experts").iterdir()}
    assert {name.partition("/")[0] for name in found.Runs()} == names
    for tags in found.Runs().values():
        assert {"loss", "valid_loss", "lr"} <= set(tags["scalars"])


def test_the_harness_gives_the_log_probabilities_of_score_expert(project: Path) -> None:
    pytest.importorskip("lm_eval")
    names = run("HFLM")
    lm, context = names["lm"], json.loads((project / "results/config.json").read_text())["train"]["seq_len"]
    assert lm.max_length == context == lm.tokenizer.model_max_length
    documents, texts = [], []
    for path in sorted((project / "results/shards").glob("eval-*.arrow")):
        group = token_files.read_unverified(path, 0)
        documents += [group.values[a:b] for a, b in zip(group.offsets[:-1], group.offsets[1:], strict=True)]
    documents = documents[:12]
    texts = [lm.tokenizer.decode(document[1:].tolist()) for document in documents]
    assert max(map(len, documents)) > 2 * context, "some texts need more than one window"
    requests = [names["Instance"]("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    logprob_N = score_expert.score(model.load(Path("results/experts/0")).eval(), documents, context, context)
    ends = np.cumsum([0, *(len(document) - 1 for document in documents)])
    for i, nats in enumerate(found):
        n = ends[i + 1] - ends[i]
        assert nats / n == pytest.approx(logprob_N[ends[i] : ends[i + 1]].astype(float).sum() / n, abs=1e-5)


def test_a_tuned_model_still_learns_where_a_text_ends(project: Path) -> None:
    from transformers import DataCollatorForLanguageModeling

    names = run("DataCollatorForSeq2Seq")
    batch, separator = names["batch"], names["separator"]
    ends = [row[row != -100][-1].item() for row in batch["labels"]]
    assert ends == [separator, separator] and (batch["labels"] == -100).any(), "padding alone is hidden"
    assert (batch["attention_mask"][:, -1] == 1).all(), "padding is on the left"
    usual = DataCollatorForLanguageModeling(names["tokenizer"], mlm=False)
    hidden = usual([names["encode"]("The ship left.")])["labels"][0]
    assert hidden[-1] == -100, "what the page warns of"


def test_the_model_card_of_an_expert_works_as_it_stands(project: Path, monkeypatch, capsys) -> None:
    for folder in ("experts/seed", "experts/0", "experts/dense"):
        monkeypatch.chdir(project / "results" / folder)
        (use,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
        exec(compile(use, "README.md", "exec"), {})
        assert capsys.readouterr().out.startswith("<|endoftext|>Once upon a time")


def test_mergekit_averages_two_experts(project: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("mergekit") is None:
        pytest.skip("mergekit is not installed")
    from safetensors.numpy import load_file

    (tmp_path / "merge.yaml").write_text(lines("yaml", "merge_method"))
    command = lines("sh", "mergekit-yaml").split()
    command[:3] = [
        sys.executable,
        "-m",
        "mergekit.scripts.run_yaml",
        str(tmp_path / "merge.yaml"),
        str(tmp_path / "out"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    merged, one, two = (
        load_file(path / "model.safetensors")
        for path in (tmp_path / "out", project / "results/experts/0", project / "results/experts/1")
    )
    for name in one:
        np.testing.assert_allclose(merged[name], (one[name] + two[name]) / 2, atol=1e-6)


def shell(project: Path, *args: str) -> str:
    run = subprocess.run(
        snakemake_command(*args),
        cwd=project,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_snakemakes_own_tools_know_the_results(project: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    shell(project, "--report", str(page))
    text = page.read_text()
    for caption in (
        "who wins",
        "words that set it apart",
        "rows of the corpus that were left out",
        "hash of its weights",
    ):
        assert caption in text
    summary = shell(project, "--summary")
    for name in ("experts/0/card.json", "experts/seed/metrics.jsonl", "tokenizer/tokenizer_config.json"):
        assert f"results/{name}\t" in summary
    untracked = set(re.findall(r"^results/experts/0/(\S+)", shell(project, "--list-untracked"), re.M))
    assert untracked == {"README.md", "tensorboard/events.out.tfevents.0.cbtm"}
