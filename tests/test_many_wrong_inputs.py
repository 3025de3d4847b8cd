"""Configs, corpora and paths that people give by mistake: each ends in a result or in one line, and soon.

tests/test_hostile_corpora.py has what damages and attackers make, tests/test_other_files.py what other
programs write, tests/test_doctor_first.py models and tokenizers.
"""

import gzip
import io
import json
import os
import socket
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_hostile_corpora import LINES, ROW, file, one_line, parquet, sharded, soon, tokenizer_json

from cbtm_pipeline import config, plan
from cbtm_pipeline.ops import planned, which_run
from made_project import ROOT

__all__ = ["soon", "tokenizer_json"]  # fixtures
Make = Callable[[Path], Any]

# --- configs: laid over config.yaml -------------------------------------------------------------------------

GOOD = [
    "{}",
    '{"seed": 3}',
    "---\nseed: 3\n...\n",
    "seed: 0x10",
    "seed: 010",
    "train: {lr: 2E-4}",
    "train: {lr: 1}",
    "base: &base {k: 2}\ncluster: *base\n",  # an unknown section, so one line
    "cluster: &c {k: 2}\n",
    "cluster:\n  <<: {k: 3}\n",
    "outdir: ./a//b/\n",
    "outdir: ../mine\n",
    "outdir: Ergebnisse ü\n",
    "outdir: a b 'c' \"d\" $HOME;e\n",
    "corpus: {train: a.jsonl, eval: [b.jsonl]}",
    "corpus: {train: ['x y.jsonl', \"z'.jsonl\"]}",
    "corpus: {id_field: null}",
    "corpus: {text_field: ''}",
    "corpus: {text_field: a.b.c}",
    "tags: {licence: cc-by, experts: {0: {owner: me}}}",
    "eval: {tasks: mine.yaml}",
    "train: {controls: []}",
    "train: {controls: [random, random, dense-batch]}",
    "route: {top_k: all}",
    "route: {top_k: [4, 4, 1]}",
    "route: {fix_after: []}",
    "model: {scratch: {model_type: gpt2, id2label: {0: a}}}",
    "seed: 9223372036854775807",
    "train: {steps: 9223372036854775807, batch_size: 1}",
]
BAD = [
    "",
    "# only a comment",
    "just text",
    "- a\n- b\n",
    "42",
    "null: 1",
    "1: 2",
    "true: 1",
    "? {a: b}\n: 1",
    "[outdir]: x",
    "outdir: 5",
    "outdir: 2024-01-01",
    "outdir: [a]",
    "outdir: null",
    "outdir: '   '",
    'outdir: "a\\nb"',
    'outdir: "a\\e[31m"',
    "outdir: /./",
    "outdir: file:///tmp/x",
    "seed: -1",
    "seed: 1.0",
    "seed: yes",
    "seed: '1'",
    "seed: 1_000_000_000_000_000_000_000",
    "seed: 1e400",
    "corpus: a.jsonl",
    "corpus: [a.jsonl]",
    "corpus: {train: {a: b}}",
    "corpus: {train: [[a]]}",
    "corpus: {train: [1]}",
    "corpus: {train: null}",
    "corpus: {eval_fraction: 0}",
    "corpus: {eval_fraction: 30%}",
    "corpus: {max_bad_share: 1.5}",
    "corpus: {shard_bytes: 16M}",
    "cluster: {k: four}",
    "cluster: {k: 1e3}",
    "cluster: {k: .inf}",
    "cluster: {K: 4}",
    "cluster: {balance: true}",
    "tokenizer: {vocab_size: 100}",
    "embed: {max_df: 0}",
    "embed: {idf_power: -1}",
    "model: {preset: 1B}",
    "model: {pretrained: ' '}",
    "model: {scratch: null}",
    "model: {scratch: {a: 2024-01-01}}",
    "model: {scratch: {a: !!set {b, c}}}",
    "model: {scratch: {a: !!binary aGk=}}",
    "model: {scratch: {a: [.nan]}}",
    "train: {lr: 0}",
    "train: {lr: 1e-400}",
    "train: {betas: [0.9]}",
    "train: {betas: [0.9, 1]}",
    "train: {controls: [dense]}",
    "train: {precision: fp16}",
    "train: {seq_len: 64, seed_share: 1}",
    "route: {top_k: [0]}",
    "route: {top_k: []}",
    "route: {top_k: [none]}",
    "route: {top_k: {all: 1}}",
    "route: {temperature: [0]}",
    "route: {routers: paper}\nrouters: [x]",
    "eval: {stride: 0}",
    "eval: {bootstrap: 0}",
    "eval: {tasks: ['']}",
    "run: {checkpoint_seconds: 601}",
    "run: {log_seconds: .inf}",
    "tags: {a: !!python/object/apply:os.system ['touch RAN']}",
    "tags: {a: null}",
    "tags: [a]",
    "<<: 5",
    "a: *b",
    "%YAML 9.9\n--- a",
    "a: b: c",
    "a: 'b",
    "corpus:\n train: a\n  eval: b",
    "seed: 1\n---\nseed: 2",
    "{" * 200,
    "a: " + "- " * 200,
    "seed: " + "9" * 6000,
]


def read_over_defaults(path: Path) -> config.Config:
    return config.validate(planned.read_config([str(ROOT / "config.yaml"), str(path)]))


@pytest.mark.parametrize("text", GOOD + BAD, ids=lambda text: repr(text[:40]))
def test_a_config_is_taken_or_one_line_for_each_key(text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("mine.yaml")
    path.write_text(text, "utf-8")
    try:
        cfg = read_over_defaults(path)
        config.write(cfg, "config.json")  # a start does, and the jobs read it
        assert config.read("config.json") == cfg
        orjson.dumps([plan.content(cfg, rule) for rule in ("tokenizer", "shard", "embed", "eval_ensemble")])
        plan.trainings(cfg)
        is_good = True
    except (ValueError, OSError) as error:
        assert all(line.count(". ") >= 1 for line in str(error).splitlines()), error
        for line in str(error).splitlines():
            one_line(ValueError(line))
        is_good = False
    known_good = text in GOOD and "unknown" not in text and not text.startswith("base:")
    assert is_good == known_good
    assert not Path("RAN").exists()
    try:
        which_run.configured([path])
    except (ValueError, OSError) as error:
        one_line(error)


# --- corpora ------------------------------------------------------------------------------------------------


def rows_of(**more: Any) -> bytes:
    return b"\n".join(orjson.dumps({"id": str(i), "text": f"one two {i}", **more}) for i in range(40))


def archive(kind: str) -> Make:
    def make(folder: Path) -> Path:
        path = folder / f"a.jsonl.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as opened:
                opened.writestr("a.jsonl", LINES)
        else:
            with tarfile.open(path, "w:gz") as opened:
                about = tarfile.TarInfo("a.jsonl")
                about.size = len(LINES)
                opened.addfile(about, io.BytesIO(LINES))
        return path

    return make


def two(*names: str) -> pa.Table:
    ids, texts = [str(i) for i in range(40)], [f"one {i}" for i in range(40)]
    return pa.Table.from_arrays([pa.array(ids if n == "id" else texts) for n in names], names=list(names))


def table(content: pa.Table) -> Make:
    def make(folder: Path) -> Path:
        pq.write_table(content, folder / "a.parquet")
        return folder / "a.parquet"

    return make


def folder_called(name: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "in" / name).mkdir(parents=True)
        (folder / "in" / name / "b.jsonl").write_bytes(LINES)
        return folder / "in"

    return make


def socket_of(folder: Path) -> Path:
    (folder / "in").mkdir()
    here = Path.cwd()
    os.chdir(folder / "in")  # the name of a socket may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("a.jsonl")
    finally:
        os.chdir(here)
    return folder / "in"


CORPORA: list[tuple[str, Make, Any]] = [
    ("two columns id", table(two("id", "id", "text")), "2 columns id"),
    ("two columns text", table(two("id", "text", "text")), "2 columns text"),
    ("two other columns of a name", table(two("id", "text", "x", "x")), 40),
    ("no column id", table(two("text")), 40),
    ("a column Text", table(two("id", "Text")), "no column text. Expected one of its columns, id, Text"),
    ("a Parquet file in gzip", file("a.parquet.gz", gzip.compress(LINES)), "unknown format"),
    ("a Parquet file of numbers", parquet(text=list(range(40))), "not a string"),
    ("a Parquet file of booleans", parquet(text=[True, False]), "not a string"),
    ("a Parquet file of one empty row", parquet(text=[""]), "empty"),
    (
        "ids that are null",
        parquet(id=pa.array([None] * 40, pa.string()), text=["one two"] * 40),
        1,
    ),
    (
        "ids that are fractions",
        parquet(id=[i + 0.5 for i in range(40)], text=[f"one {i}" for i in range(40)]),
        "",
    ),
    ("a socket", socket_of, "not a file"),
    ("a character device itself", lambda folder: "/dev/null", "unknown format"),
    ("a folder without files", lambda folder: (folder / "in").mkdir() or folder / "in", "no matching file"),
    ("a folder of hidden files", lambda folder: file(".a.jsonl", LINES)(folder).parent, "no matching file"),
    ("a folder called a.jsonl", folder_called("a.jsonl"), 40),
    ("a folder called *", folder_called("*"), 40),
    ("a folder called with a line end", folder_called("a\nb"), 40),
    ("a glob without a match", lambda folder: f"{folder}/*.jsonl", "no matching file"),
    ("a glob of no sense", lambda folder: f"{folder}/[.jsonl", ""),
    ("a zip archive", archive("zip"), "unknown format"),
    ("a tar archive", archive("tgz"), "unknown format"),
    ("a tar archive called gz", lambda f: archive("tgz")(f).rename(f / "a.jsonl.gz"), ""),
    ("upper case suffix", file("A.JSONL", LINES), 40),
    ("a suffix twice", file("a.jsonl.gz.gz", gzip.compress(gzip.compress(LINES))), "unknown format"),
    ("rows that are lists", file("a.jsonl", b"[1]\n" * 9), "not an object"),
    ("rows that are text", file("a.jsonl", b'"one"\n' * 9), "not an object"),
    ("a row of 5 MB", file("a.jsonl", b'{"text": "' + b"word " * 1_000_000 + b'"}'), 1),
    (
        "a number of 999 digits",
        file("a.jsonl", b'{"text": "x y", "n": ' + b"9" * 5000 + b"}\n" + LINES),
        "of the bytes",
    ),
    ("NaN in a field", file("a.jsonl", LINES.replace(b'"text"', b'"n": NaN, "text"')), 40),
    ("comments in JSON", file("a.jsonl", b"// mine\n" * 9 + LINES), "broken JSON"),
    ("single quotes", file("a.jsonl", LINES.replace(b'"', b"'")), "broken JSON"),
    ("a byte-order mark", file("a.jsonl", b"\xef\xbb\xbf" + LINES), 40),
    ("Windows line ends", file("a.jsonl", LINES.replace(b"\n", b"\r\n")), 40),
    ("no last line end", file("a.jsonl", LINES[:-1]), 40),
    ("empty lines between rows", file("a.jsonl", LINES.replace(b"\n", b"\n\n\n")), 40),
    ("a lone surrogate", file("a.jsonl", LINES.replace(b"one", b"\\ud800")), "surrogate"),
    ("text of NULs", file("a.jsonl", LINES.replace(b"one", b"\\u0000")), 40),
    ("text of spaces", file("a.jsonl", b'{"text": "  \\n "}\n' * 3), "empty"),
    (
        "ids that are lists",
        file("a.jsonl", LINES.replace(b'"id": "', b'"id": ["').replace(b'", "text', b'"], "text')),
        "id",
    ),
    ("ids that are empty", file("a.jsonl", rows_of(id="")), ""),
    ("one id for all", file("a.jsonl", rows_of(id="x")), "set corpus.id_field: null"),
    ("one row", file("a.jsonl", ROW % (1, 1)), 1),
    ("a text file of nothing", file("a.txt", b""), "empty"),
    ("a text file of bytes", file("a.txt", bytes(range(256)) * 9), "UTF-8"),
    ("an empty gzip", file("a.jsonl.gz", gzip.compress(b"")), "no rows"),
    ("an empty zstd frame", file("a.jsonl.zst", zstandard.compress(b"")), "no rows"),
    ("a JSON file of one object", file("a.json", b'{"id": "1", "text": "one"}'), 1),
    ("a JSON file of nothing", file("a.json", b"  "), "no rows"),
    ("a JSON array of nothing", file("a.json", b"[]"), "no rows"),
    ("an array of arrays", file("a.json", b"[[1], [2]]"), "not an object"),
    ("a notebook", file("a.json", b'{"cells": [{"source": ["a"]}], "nbformat": 4}'), "no text field"),
    ("a page of HTML", file("a.jsonl", b"<html>\n<p>no</p>\n" * 9), "broken JSON"),
    (
        "a pointer of Git LFS",
        file("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "unreadable",
    ),
]


@pytest.mark.parametrize(("make", "expected"), [case[1:] for case in CORPORA], ids=[c[0] for c in CORPORA])
def test_a_corpus_given_by_mistake_is_documents_or_one_line(
    make: Make, expected: Any, tmp_path: Path, tokenizer_json: Path
) -> None:
    found = sharded(make, tmp_path, tokenizer_json)
    listed = tmp_path / "s/quarantine.jsonl"
    reasons = listed.read_text("utf-8").splitlines() if listed.exists() else []
    assert all(json.loads(line)["source"] for line in reasons)
    if isinstance(expected, int):
        assert found == expected
    elif expected:
        assert expected in str(found)
