"""Corpora, tokenizers and models as other programs write them: each ends in a result or in one line."""

import datetime as dt
import decimal
import gzip
import json
import shlex
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import made_project
import made_run
import made_texts
from cbtm_pipeline import shard
from cbtm_pipeline import tokenizer as tokenizer_rule
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import (
    blocks,
    content,
    encoding,
    pretrained_tokenizer,
    rows,
    run_folders,
    tokenizer_config,
)
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus.records import Fields
from cbtm_pipeline.html import sections
from cbtm_pipeline.mixture import verdict
from cbtm_pipeline.ops import planned
from cbtm_pipeline.training import model


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


def test_a_tokenizer_with_bpe_dropout_gives_the_same_ids_each_time(tmp_path: Path) -> None:
    text = " ".join(TEXTS)
    source = tokenizer_folder(tmp_path / "source", bpe(dropout=0.5), bos_token="<|endoftext|>")
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


# --- ids of other types -------------------------------------------------------------------------------------

UUIDS = [uuid.UUID(int=(i + 1) << 90) for i in range(3)]
WHEN = dt.datetime(2024, 1, 5, 12, 0, 0)
STAMPS = ["2024-01-05 12:00:00", "2024-01-05 12:00:01", "2024-01-05 12:00:02"]


def duckdb_file(path: Path, of_id: str) -> None:
    import duckdb

    duckdb.sql(
        f"COPY (SELECT {of_id} AS id, 'text ' || i AS text FROM range(3) t(i)) TO '{path}' (FORMAT parquet)"
    )


def column(values: Any, type_: pa.DataType | None = None) -> Any:
    def make(path: Path) -> None:
        ids = values if isinstance(values, pa.Array) else pa.array(values, type_)
        pq.write_table(pa.table({"id": ids, "text": [f"text {i}" for i in range(3)]}), path)

    return make


IDS: dict[str, tuple[Any, list[str]]] = {
    "pyarrow uuid": (column([u.bytes for u in UUIDS], pa.uuid()), [str(u) for u in UUIDS]),
    "fixed 16 bytes": (column([u.bytes for u in UUIDS], pa.binary(16)), [u.hex for u in UUIDS]),
    "binary of hashes": (column([u.bytes for u in UUIDS]), [u.hex for u in UUIDS]),
    "large binary": (column([u.bytes for u in UUIDS], pa.large_binary()), [u.hex for u in UUIDS]),
    "binary of text": (column([b"a", b"b", "ä".encode()]), ["a", "b", "ä"]),
    "dates": (
        column([WHEN.date() + dt.timedelta(i) for i in range(3)]),
        [f"2024-01-0{5 + i}" for i in range(3)],
    ),
    "timestamps": (column([WHEN + dt.timedelta(0, i) for i in range(3)], pa.timestamp("ns")), STAMPS),
    "timestamps in UTC": (
        column([WHEN + dt.timedelta(0, i) for i in range(3)], pa.timestamp("us", "UTC")),
        [f"{s}Z" for s in STAMPS],
    ),
    "times": (column([dt.time(1, 2, i) for i in range(3)]), [f"01:02:0{i}" for i in range(3)]),
    "categories": (column(pa.array(["a", "b", "c"]).dictionary_encode()), ["a", "b", "c"]),
    "decimals": (column([decimal.Decimal(f"1.{i}") for i in range(3)]), ["1.0", "1.1", "1.2"]),
    "DuckDB's UUID": (
        lambda path: duckdb_file(path, f"('{str(UUIDS[0])[:-1]}' || i)::UUID"),
        [f"{str(UUIDS[0])[:-1]}{i}" for i in range(3)],
    ),
    "DuckDB's TIMESTAMP": (lambda path: duckdb_file(path, f"TIMESTAMP '{WHEN}' + to_seconds(i)"), STAMPS),
    "DuckDB's DATE": (
        lambda path: duckdb_file(path, "(DATE '2024-01-05' + i::INT)"),
        [f"2024-01-0{5 + i}" for i in range(3)],
    ),
    "DuckDB's BLOB": (lambda path: duckdb_file(path, r"('\xFF\x0' || i)::BLOB"), ["ff00", "ff01", "ff02"]),
    "DuckDB's ENUM": (
        lambda path: duckdb_file(path, "('a' || i)::ENUM ('a0', 'a1', 'a2')"),
        ["a0", "a1", "a2"],
    ),
}


def documents_of(path: Path, **keys: Any) -> list[rows.Document | rows.BadRow]:
    files = corpus_files.name([path])
    fields = Fields(**{"text": "text", "id": "id", **keys})
    parts = blocks.parts(files, 1 << 20, fields, txt_documents="file")
    return [row for part in parts for row in rows.read(part, fields)]


@pytest.mark.parametrize("name", IDS)
def test_ids_of_other_types_are_their_usual_strings(name: str, tmp_path: Path) -> None:
    make, expected = IDS[name]
    make(tmp_path / "a.parquet")
    found = documents_of(tmp_path / "a.parquet")
    assert [getattr(row, "id", row) for row in found] == expected


def test_ids_that_are_none_say_that_documents_need_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [[1], [2]], "text": ["a b", "c d"]}), tmp_path / "a.parquet")
    plan = made_texts.shard_plan(train=[str(tmp_path / "a.parquet")])
    tokenizer_json = made_texts.make_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"id is neither a string nor a number.*set corpus\.id_field: null"):
        shard.make(plan, tokenizer_json, tmp_path / "shards/manifest.json", 1, None, tmp_path / "seen")


# --- seeds --------------------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("scaling", "n_positions"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),  # named with it
        ({"type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "linear", "factor": 2.0}, 64),
        ({"rope_type": "default"}, 64),
        (None, 64),
    ],
)
def test_positions_that_are_stretched_count(scaling: dict[str, Any] | None, n_positions: int) -> None:
    keys = {"max_position_embeddings": 64, "rope_scaling": scaling}
    assert tokenizer_config.n_positions(keys) == n_positions
    if scaling is not None and "rope_type" in scaling:
        config = CONFIG_MAPPING["llama"](**{**LLAMA, "rope_parameters": {"rope_theta": 10000.0, **scaling}})
        assert tokenizer_config.n_positions(config) == n_positions
        net = AutoModelForCausalLM.from_config(config)
        model.check(net, "model.pretrained: x", 300, n_positions)
        with pytest.raises(ValueError, match=f"{n_positions} positions"):
            model.check(net, "model.pretrained: x", 300, n_positions + 1)


SCRATCH_KEYS: dict[str, dict[str, Any]] = {
    "head_dim": {
        **LLAMA,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 16,
        "num_key_value_heads": 2,
        "num_experts": 4,
    },
    "rope_theta": LLAMA,
}


@pytest.mark.parametrize(("key", "value"), [("head_dim", 24), ("rope_theta", 5000.0)])
def test_a_key_of_scratch_that_the_class_takes_but_does_not_declare(key: str, value: float) -> None:
    net = model.scratch({**SCRATCH_KEYS[key], key: value}, 300, 0, 32, 0)
    config = net.config.to_dict()
    assert value in (config.get(key), (config.get("rope_parameters") or {}).get(key))
    if key == "head_dim":
        layers: Any = net.base_model.layers
        assert layers[0].self_attn.q_proj.weight.shape[0] == 2 * value
    with pytest.raises(ValueError, match=r"model\.scratch\.hed_dim: unknown key\. .*Did you mean"):
        model.scratch({**SCRATCH_KEYS[key], "hed_dim": value}, 300, 0, 32, 0)


# --- command lines and disks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", [["--configfile", "a", "--configfile", "b"], ["--configfile=a", "--configfiles", "b"]]
)
def test_configfile_is_given_twice(argv: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--configfile: given 2 times.*Write --configfile FILE FILE\."):
        planned.check_given_once(["snakemake", *argv, "--cores", "1"])
    planned.check_given_once(["snakemake", "--configfile", "a", "b"])


def test_a_log_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A limit of the size of files stands for the disk."""
    path = tmp_path / "rule.log"
    code = (
        "from cbtm_pipeline.base import cli; from pathlib import Path; import resource;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9));"
        f"cli.start_logging('x', Path({str(path)!r})); [cli.log.info('a line') for _ in range(3)]"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    assert said.count(f"{path}: File too large. Lines are missing there.") == 1
    assert said.count("a line") == 3 and "Traceback" not in said and "Logging error" not in said


def test_a_training_log_on_a_full_disk_names_its_file(tmp_path: Path) -> None:
    """A limit of the size of files stands for the disk."""
    path = tmp_path / "metrics.jsonl"
    code = (
        "from cbtm_pipeline.base import cli; from cbtm_pipeline.training import training_log;"
        "from pathlib import Path; import resource;"
        f"m = training_log.Metrics(Path({str(path)!r}), 0); m.add({{'step': 1}});"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); cli.run(m.sync)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.startswith(f"{path}: File too large. Expected to read or write it.") and run.returncode


# --- files of other programs --------------------------------------------------------------------------------

ROWS = [{"id": f"d{i}", "text": f"text {i}\nmore"} for i in range(6)]


def of_datasets(folder: Path, **options: Any) -> Any:
    from datasets import Dataset

    found = Dataset.from_list(ROWS)
    return found.save_to_disk(str(folder / "saved"), **options)


def of_splits(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts: Any = {"a": Dataset.from_list(ROWS[:3]), "b": Dataset.from_list(ROWS[3:])}
    DatasetDict(parts).save_to_disk(str(folder / "saved"))


def shuffled(folder: Path) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS * 2).select(range(6)).shuffle(seed=0).save_to_disk(str(folder / "saved"))


def arrow(name: str, new: Any, **options: Any) -> Any:
    def make(folder: Path) -> None:
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(folder / name), "wb") as sink, new(sink, table.schema, **options) as writer:
            writer.write_table(table, max_chunksize=2)

    return make


def spark(folder: Path) -> None:
    """A table that Spark has written by the values of a column, and what a killed task has left."""
    for i, lang in enumerate(("en", "de")):
        part = folder / f"lang={lang}/part-0000{i}-5e.c000.snappy.parquet"
        part.parent.mkdir()
        pq.write_table(
            pa.Table.from_pylist(ROWS[3 * i : 3 * i + 3]), part, compression="snappy", version="1.0"
        )
        write(part.with_name(f".{part.name}.crc"), b"crc")
    write(folder / "_SUCCESS")
    write(folder / "_temporary/0/part-00000.json", "broken")


def delta(folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "part-0.parquet")
    write(folder / "_delta_log/00000000000000000000.json", '{"commitInfo": {}}\n')


def polars_file(name: str, **options: Any) -> Any:
    def make(folder: Path) -> None:
        import polars as pl

        frame = pl.DataFrame(ROWS)
        getattr(
            frame, f"write_{'ipc' if name.endswith('.arrow') else 'ndjson' if 'json' in name else 'parquet'}"
        )(folder / name, **options)

    return make


def duckdb_table(copy: str, name: str) -> Any:
    def make(folder: Path) -> None:
        import duckdb

        documents = pa.Table.from_pylist(ROWS)  # noqa: F841 (duckdb finds it by its name)
        duckdb.sql(f"COPY (SELECT *, length(text) AS n FROM documents) TO '{folder / name}' ({copy})")

    return make


def pandas_file(name: str, **options: Any) -> Any:
    def make(folder: Path) -> None:
        import pandas as pd

        frame = pd.DataFrame(ROWS)
        frame.to_parquet(folder / name) if "parquet" in name else frame.to_json(folder / name, **options)

    return make


TOOLS: dict[str, Any] = {
    "datasets, saved": of_datasets,
    "datasets, saved in shards": lambda folder: of_datasets(folder, num_shards=3),
    "datasets, saved with splits": of_splits,
    "datasets, shuffled": shuffled,
    "an Arrow file": arrow("a.arrow", pa.ipc.new_file),
    "an Arrow stream": arrow("a.arrow", pa.ipc.new_stream),
    "a compressed Arrow file": arrow(
        "a.arrow", pa.ipc.new_file, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ),
    "Spark, partitioned": spark,
    "Delta Lake": delta,
    "polars, Parquet": polars_file("a.parquet"),
    "polars, Arrow of string views": polars_file("a.arrow"),
    "polars, Arrow with lz4": polars_file("a.arrow", compression="lz4"),
    "polars, JSON lines": polars_file("a.jsonl"),
    "DuckDB, Parquet": duckdb_table("FORMAT parquet", "a.parquet"),
    "DuckDB, Parquet with zstd": duckdb_table("FORMAT parquet, COMPRESSION zstd", "a.parquet"),
    "DuckDB, Parquet by partitions": duckdb_table("FORMAT parquet, PARTITION_BY (n)", "parts"),
    "DuckDB, JSON lines": duckdb_table("FORMAT json", "a.json"),
    "DuckDB, a JSON array": duckdb_table("FORMAT json, ARRAY true", "a.json"),
    "DuckDB, JSON with gzip": duckdb_table("FORMAT json, COMPRESSION gzip", "a.json.gz"),
    "pandas, Parquet": pandas_file("a.parquet"),
    "pandas, JSON lines": pandas_file("a.jsonl", orient="records", lines=True),
    "pandas, a JSON array": pandas_file("a.json", orient="records", indent=2),
}


@pytest.mark.parametrize("name", TOOLS)
def test_a_corpus_that_another_program_has_written(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    TOOLS[name](folder)
    found = [row for path in corpus_files.input_files([str(folder)]) for row in documents_of(path)]
    texts = {row.id: row.text.decode() if isinstance(row, rows.Document) else row for row in found}  # pyright: ignore
    assert texts == {row["id"]: row["text"] for row in ROWS} and len(found) == len(ROWS)


@pytest.mark.parametrize("make", [lambda c: c[:-20], lambda c: c[:40], lambda c: b"", lambda c: b"x" * 300])
def test_a_damaged_arrow_file_is_one_line(make: Any, tmp_path: Path) -> None:
    arrow("a.arrow", pa.ipc.new_file)(tmp_path)
    path = tmp_path / "a.arrow"
    path.write_bytes(make(path.read_bytes()))
    with pytest.raises(ValueError, match="a.arrow: unreadable .*Expected an Arrow file"):
        documents_of(path)


def test_an_arrow_file_without_the_text_column_is_one_line(tmp_path: Path) -> None:
    arrow("a.arrow", pa.ipc.new_file)(tmp_path)
    with pytest.raises(ValueError, match=r"no column body\. Expected one of its columns, id, text\."):
        documents_of(tmp_path / "a.arrow", text="body")


@pytest.mark.parametrize("name", ["a.csv", "a b.tsv", "a.csv.gz"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_table_of_text_says_how_to_convert_it(name: str, as_folder: bool, tmp_path: Path) -> None:
    """And what it says works."""
    sign = "\t" if "tsv" in name else ","
    lines = f"id{sign}text\r\n" + "".join(f'{row["id"]}{sign}"{row["text"]}"\r\n' for row in ROWS)
    path = write(tmp_path / "in" / name, gzip.compress(lines.encode()) if name.endswith("gz") else lines)
    with pytest.raises(ValueError) as error:
        corpus_files.input_files([str(path.parent if as_folder else path)])
    command = str(error.value).partition("Convert it: python ")[2]
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    (made,) = corpus_files.input_files([str(path.parent)])
    found = [(row.id, row.text.decode()) for row in documents_of(made)]  # pyright: ignore
    assert found == [(row["id"], row["text"]) for row in ROWS]


@pytest.mark.slow
def test_an_outdir_with_two_slashes_and_a_configfile_given_twice(tmp_path: Path) -> None:
    folder = made_project.make_project(tmp_path / "project", outdir="a//b/")  # pyright: ignore
    printed = made_project.snakemake(folder, "--dry-run")
    assert (
        "a/b/shards/manifest.json" in printed
        and "a//b/shards" not in printed
        and "contains double" not in printed
    )
    twice = made_project.snakemake(folder, "-n", "--configfile", "small.yaml", ok=False)
    assert "--configfile: given 2 times" in twice and "Traceback" not in twice
