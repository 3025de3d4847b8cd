"""Corpora, tokenizers and models as other programs write them: each ends in a result or in one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

import made_run
import made_texts
from cbtm_pipeline import shard
from cbtm_pipeline import tokenizer as tokenizer_rule
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import content, encoding, pretrained_tokenizer, run_folders, tokenizer_config
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.html import sections
from cbtm_pipeline.mixture import verdict


def write(path: Path, text: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- the outdir lies in a folder of the corpus --------------------------------------------------------------

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


# --- too few documents are held out -------------------------------------------------------------------------


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


# --- tokenizers ---------------------------------------------------------------------------------------------

TEXTS = ["the ship rose over the tide", "butter, flour and sugar"] * 20


def tokenizer_folder(folder: Path, tokenizer: tokenizers.Tokenizer, **roles: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(
        folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles})
    )
    return folder


def bpe(**keys: Any) -> tokenizers.Tokenizer:
    found = tokenizer_rule.train([text.encode() for text in TEXTS], 300)
    content = json.loads(found.to_str())
    content["model"] |= keys
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def unigram(**keys: Any) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, show_progress=False, special_tokens=["<|endoftext|>", "<unk>"], unk_token="<unk>"
    )
    found.train_from_iterator(TEXTS, trainer)
    for name, value in keys.items():
        setattr(found.model, name, value)
    return found


CHANCE = {
    "BPE dropout": lambda: bpe(dropout=0.5),
    "Unigram sampling": lambda: unigram(alpha=0.1, nbest_size=64),
}


@pytest.mark.parametrize("name", CHANCE)
def test_a_tokenizer_with_chance_gives_the_same_ids_each_time(name: str, tmp_path: Path) -> None:
    text = " ".join(TEXTS)
    source = tokenizer_folder(tmp_path / "source", CHANCE[name](), bos_token="<|endoftext|>")
    drawn = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    assert len({tuple(drawn.encode(text).ids) for _ in range(5)}) > 1
    encoder = encoding.TokenEncoder(source / "tokenizer.json")
    fast = [True] if not encoder.why_slow else []
    ids = {tuple(encoder.encode(text.encode(), f).tolist()) for f in [False] * 5 + fast * 5}
    assert len(ids) == 1
    (tmp_path / "made").mkdir()
    tokenizer_rule.save_pretrained("tokenizer.pretrained", str(source), None, tmp_path / "made")
    kept = tokenizers.Tokenizer.from_file(str(tmp_path / "made/tokenizer.json"))
    assert {tuple(kept.encode(text).ids) for _ in range(5)} == ids


@pytest.mark.parametrize(
    ("name", "content", "packages"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece protobuf"),
        (
            "sentencepiece.bpe.model",
            b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02",
            "sentencepiece protobuf",
        ),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
)
def test_a_folder_has_only_a_tokenizer_model(
    name: str, content: bytes, packages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the library that reads it. It may be here, for other tests."""
    monkeypatch.setitem(sys.modules, packages.split()[0], None)
    write(tmp_path / name, content)
    write(tmp_path / "config.json", '{"model_type": "llama"}')
    with pytest.raises(ValueError) as error:
        pretrained_tokenizer.load("model.pretrained", "mine", tmp_path)
    line = str(error.value)
    assert f"mine has only {name}, a vocabulary of {packages.split()[0]}, which cannot be read here" in line
    assert f"Run pip install --upgrade {packages} and start again." in line


def test_a_tokenizer_has_a_special_token_more_than_the_embedding_has_rows(tmp_path: Path) -> None:
    tokenizer = bpe()
    n = tokenizer.get_vocab_size()
    assert encoding.n_ids(tokenizer, 0) == n
    tokenizer.add_special_tokens(["[PAD]"])
    assert (tokenizer.get_vocab_size(), encoding.n_ids(tokenizer, 0)) == (n + 1, n)
    assert encoding.n_ids(tokenizer, n) == n + 1  # the separator is in every document
    text = encoding.TokenEncoder(tokenizer_folder(tmp_path, tokenizer) / "tokenizer.json")
    assert text.encode(b"a [PAD] of [PAD]", False).max() < n
    tokenizer.add_tokens(["<mine>"])
    assert encoding.n_ids(tokenizer, 0) == n + 2


def test_a_padding_token_beyond_the_embedding_is_replaced_beside_the_model(tmp_path: Path) -> None:
    tokenizer = bpe()
    n = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["[PAD]"])
    for n_rows, expected in ((n, "<|endoftext|>"), (n + 1, "[PAD]")):
        folder = tokenizer_folder(
            tmp_path / str(n_rows), tokenizer, bos_token="<|endoftext|>", pad_token="[PAD]"
        )
        tokenizer_config.write(folder, 32, n_rows, 0)
        loaded = AutoTokenizer.from_pretrained(folder)
        assert (loaded.pad_token, loaded.pad_token_id < n_rows) == (expected, True)
