"""Corpora, tokenizers and models as other programs write them: each ends in a result or in one line."""

from pathlib import Path
from typing import Any

import pytest

import made_run
import made_texts
from cbtm_pipeline import shard
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import content, run_folders
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.html import sections
from cbtm_pipeline.mixture import verdict


def write(path: Path, text: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- the outdir lies in a folder of the corpus ----------------------------------------------------------------

WRITTEN = (
    "config.json",
    "shards/train-00000.parquet",
    "scored/a/shards/eval-00000.parquet",
    "tokenizer/vocab.txt",
)


@pytest.mark.parametrize("pattern", ["data", "data/**/*", "data/**/*.json*"])
def test_the_outdir_is_a_folder_of_the_corpus(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = write(tmp_path / "data/a.jsonl", '{"text": "a"}\n')
    before = corpus_files.find([pattern], None, "data/results")
    first = content.of_corpus([pattern], None, None, Path("data/results", content.SEEN))
    for name in WRITTEN:
        write(tmp_path / "data/results" / name)
    found = corpus_files.find([pattern], None, "data/results")
    assert found == before and [Path(file).absolute() for file in found] == [text]
    assert content.of_corpus([pattern], None, None, Path("data/results", content.SEEN)) == first
    assert not corpus_files.passed_over([pattern], Path("data/results"))


def test_another_run_lies_in_a_folder_of_the_corpus(tmp_path: Path) -> None:
    write(tmp_path / "data/a.jsonl", '{"text": "a"}\n')
    for name in (*WRITTEN, run_folders.PLANNED):
        write(tmp_path / "data/old" / name)
    mine = write(tmp_path / "data/old/mine/b.jsonl")  # no run writes there
    found = corpus_files.find([str(tmp_path / "data")], None, tmp_path / "results")
    assert found == [str(tmp_path / "data/a.jsonl"), str(mine)]


def test_the_shards_of_another_run_are_the_corpus(tmp_path: Path) -> None:
    for name in (*WRITTEN, run_folders.PLANNED):
        write(tmp_path / "old" / name)
    for pattern in ("old/shards", "old/shards/*.parquet"):
        assert corpus_files.find([str(tmp_path / pattern)], None, tmp_path / "results") == [
            str(tmp_path / "old/shards/train-00000.parquet")
        ]


@pytest.mark.parametrize("pattern", ["results/shards", "results/shards/*.parquet", "results/config.json"])
def test_the_outputs_of_this_run_are_the_corpus(pattern: str, tmp_path: Path) -> None:
    for name in WRITTEN:
        write(tmp_path / "results" / name)
    with pytest.raises(ValueError, match="among the outputs of this run.*Expected text from elsewhere"):
        corpus_files.find([str(tmp_path / pattern)], None, tmp_path / "results")


def test_the_demo_of_this_run_is_named_as_the_corpus(tmp_path: Path) -> None:
    demo = write(tmp_path / "results/demo/corpus.jsonl.zst")
    assert corpus_files.find([str(demo)], None, tmp_path / "results") == [str(demo)]


# --- too few documents are held out ---------------------------------------------------------------------------


def sharded(folder: Path, n_train: int, n_eval: int, **keys: Any) -> dict[str, Any]:
    made_texts.write_jsonl(folder / "train.jsonl", made_texts.rows(n_train))
    made_texts.write_jsonl(folder / "eval.jsonl", made_texts.rows(n_eval, 1))
    tokenizer_json = made_texts.make_tokenizer(folder / "tokenizer")
    plan = made_texts.shard_plan(train=[str(folder / "train.jsonl")], eval=[str(folder / "eval.jsonl")])
    out = folder / "shards/manifest.json"
    shard.make(plan, tokenizer_json, out, 1, None, folder / "seen", calibration_share=0.3, **keys)
    return artifact.read_sealed(out, "shards")


def test_one_document_is_held_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus\.eval: 1 held-out document\. Expected at least 2"):
        sharded(tmp_path, 20, 1)


@pytest.mark.parametrize(("n", "is_few"), [(2, True), (13, True), (14, False)])
def test_few_documents_are_held_out(
    n: int, is_few: bool, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    sharded(tmp_path, 20, n)
    said = [r.getMessage() for r in caplog.records if "no intervals and no verdict" in r.getMessage()]
    assert len(said) == is_few


@pytest.mark.parametrize(("n", "is_few"), [(2, True), (13, True), (14, False)])
def test_a_result_on_few_documents_has_no_interval_and_no_verdict(
    n: int, is_few: bool, tmp_path: Path
) -> None:
    cfg = made_run.make_config(outdir=str(tmp_path), cluster={"k": 3}, **made_run.QUICK)
    metrics = made_run.evaluate(made_run.make(tmp_path, cfg, n_documents=n))
    ratios = [ratio for row in metrics["systems"] for ratio in row["ratios"].values()]
    assert all((ratio["ci95"] is None) == is_few for ratio in [*ratios, *metrics["comparisons"]])
    assert all((verdict.TOO_FEW in sentence) == is_few for sentence in metrics["verdict"])
    assert (verdict.outcome(metrics) == "Too few documents for a verdict.") == is_few
    table = (tmp_path / "eval/table.txt").read_text()
    assert ("[-]" in table) == is_few and ("wins" not in table or not is_few)
    page = str(sections.lead(metrics)) + str(sections.systems(metrics))
    assert ("without an interval" in page) == is_few
