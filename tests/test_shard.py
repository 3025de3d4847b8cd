import gzip
import json
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import changed_config
import made_corpus
import made_texts
from cbtm_pipeline import config, shard
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import content as corpus_content
from cbtm_pipeline.corpus import encoding, shard_block, shard_files, token_files
from cbtm_pipeline.corpus import rows as corpus_rows


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_texts.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Result:
    """The shards of a folder, read and checked against each other."""

    def __init__(self, folder: Path, tokenizer_json: Path):
        self.folder = folder
        self.manifest = artifact.read_sealed(folder / "manifest.json", "shards")
        self.quarantine = [
            json.loads(line) for line in (folder / "quarantine.jsonl").read_text("utf-8").splitlines()
        ]
        self.train: dict[str, str] = {}
        self.eval: dict[str, str] = {}
        self.ids: dict[str, list[int]] = {}
        self.labels: dict[str, str] = {}
        artifact.check_made_from("manifest", self.manifest, "tokenizer", artifact.identity(tokenizer_json))
        for entry in self.manifest["shards"]:
            table = pq.read_table(folder / f"{entry['name']}.parquet")
            labelled = [shard_files.LABEL] if shard_files.N_LABELLED in entry else []
            assert table.schema.names == [
                *shard_block.SCHEMA.names[:1],
                *labelled,
                *shard_block.SCHEMA.names[1:],
            ]
            assert table.drop_columns(labelled).schema.equals(shard_block.SCHEMA, check_metadata=False)
            self.labels |= (
                dict(zip(*(table[c].to_pylist() for c in ("doc_id", *labelled)), strict=True))
                if labelled
                else {}
            )
            arrow = folder / f"{entry['name']}.arrow"
            documents = token_files.read_unverified(arrow, 0)
            assert entry["n_documents"] == len(table) == len(documents) > 0
            assert entry["n_tokens"] == documents.n_tokens.sum() == sum(table["n_tokens"].to_pylist())
            assert entry["n_bytes"] == sum(table["n_bytes"].to_pylist())
            assert entry["identity_groups"] == [documents.identity]
            assert entry["identity_columns"] == {
                name: made_corpus.column_identity(table[name]) for name in table.schema.names
            }
            assert documents.n_tokens.tolist() == table["n_tokens"].to_pylist()
            for i, row in enumerate(table.to_pylist()):
                assert len(row["text"].encode()) == row["n_bytes"]
                stored = documents.values[documents.offsets[i] : documents.offsets[i + 1]].tolist()
                assert stored[0] == self.manifest["separator_id"]
                side = {"train": self.train, "eval": self.eval}[entry["split"]]
                assert row["doc_id"] not in side
                side[row["doc_id"]] = row["text"]
                self.ids[row["doc_id"]] = stored[1:]
        names = {entry["name"] for entry in self.manifest["shards"]}
        files = {f"{name}{suffix}" for name in names for suffix in (".parquet", ".arrow")}
        assert set(self.manifest["files"]) == files | {"quarantine.jsonl"}
        assert {path.name for path in folder.iterdir()} == files | {"manifest.json", "quarantine.jsonl"}
        assert self.manifest["n_quarantined"] == len(self.quarantine)
        assert not self.train.keys() & self.eval.keys()
        assert not set(self.train.values()) & set(self.eval.values())

    @property
    def all(self) -> dict[str, str]:
        return self.train | self.eval

    def reasons(self) -> list[tuple[str, int, str]]:
        return [
            (Path(row["source"]).name, row["line"], row["reason"].partition(":")[0])
            for row in self.quarantine
        ]


def make(tokenizer_json: Path, out: Path, *train: Path, workers: int = 1, **corpus: Any) -> Result:
    """Run the rule on files; eval_fraction defaults to a half, and any share of the rows may be bad."""
    corpus = {"train": [str(path) for path in train], "eval_fraction": 0.5, "max_bad_share": 1.0, **corpus}
    plan, seen = made_texts.shard_plan(**corpus), out.with_name(".corpus.json")
    shard.make(plan, tokenizer_json, out / "manifest.json", workers, None, seen)
    return Result(out, tokenizer_json)


# what is made


def test_documents_arrive_whole_in_order_and_tokenised(tmp_path: Path, tokenizer_json: Path) -> None:
    rows = made_texts.rows(200)
    result = make(
        tokenizer_json,
        tmp_path / "s",
        made_texts.write_jsonl(tmp_path / "a.jsonl", rows),
        shard_bytes=1 << 13,
    )
    assert result.all == {row["id"]: row["text"] for row in rows}
    order = [row["id"] for row in rows]
    assert list(result.train) == [name for name in order if name in result.train]
    assert list(result.eval) == [name for name in order if name in result.eval]
    assert len(result.manifest["shards"]) > 6
    assert result.manifest["encoder"] == "gigatoken"
    assert result.manifest["vocab_size"] == 320
    encoder = encoding.TokenEncoder(tokenizer_json)
    for name, text in result.all.items():
        assert result.ids[name] == encoder.encode(text.encode(), fast=False).tolist()


def test_split_is_by_text(tmp_path: Path, tokenizer_json: Path) -> None:
    rows = made_texts.rows(300)
    copies = [{"id": f"copy-{row['id']}", "text": row["text"]} for row in rows]
    result = make(
        tokenizer_json,
        tmp_path / "s",
        made_texts.write_jsonl(tmp_path / "a.jsonl", rows + copies),
        eval_fraction=0.2,
    )
    assert len(result.all) == 600, "exact duplicates are kept"
    for row in rows:
        held_out = corpus_rows.uniform(corpus_rows.text_hash(row["text"].encode())) < 0.2
        side = result.eval if held_out else result.train
        assert {row["id"], f"copy-{row['id']}"} <= side.keys()
    assert 0.1 < len(result.eval) / 600 < 0.3


@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(range(40)),
    cut=st.integers(1, 39),
    shard_bytes=st.sampled_from([4096, 1 << 20]),
    fraction=st.sampled_from([0.3, 0.6]),
)
def test_split_depends_on_nothing_but_the_text(
    tokenizer_json: Path,
    tmp_path_factory: pytest.TempPathFactory,
    order: list[int],
    cut: int,
    shard_bytes: int,
    fraction: float,
) -> None:
    rows, folder = made_texts.rows(40), tmp_path_factory.mktemp("split")
    made_texts.write_jsonl(folder / "in/a.jsonl", [rows[i] for i in order[:cut]])
    made_texts.write_jsonl(folder / "in/b.jsonl", [rows[i] for i in order[cut:]])
    result = make(
        tokenizer_json, folder / "s", folder / "in", shard_bytes=shard_bytes, eval_fraction=fraction
    )
    expected = {
        row["id"]
        for row in rows
        if corpus_rows.uniform(corpus_rows.text_hash(row["text"].encode())) < fraction
    }
    assert result.eval.keys() == expected
    assert result.train.keys() == {row["id"] for row in rows} - expected


@pytest.mark.slow
def test_shards_are_the_same_for_any_number_of_workers(tmp_path: Path, tokenizer_json: Path) -> None:
    rows = made_texts.rows(300)
    rows[250]["id"] = rows[3]["id"]
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", [*rows[:100], b"broken", *rows[100:]])
    cfg = made_texts.write_config(
        tmp_path / "c.json", corpus={"train": [str(corpus)], "shard_bytes": 1 << 13}
    )
    for workers in (1, 2):
        out = tmp_path / f"s{workers}/manifest.json"
        log = tmp_path / "shard.log"
        args = (
            "--config",
            cfg,
            "--tokenizer",
            tokenizer_json,
            "--out",
            out,
            "--workers",
            workers,
            "--log",
            log,
        )
        done = made_texts.run("shard", *args)
        assert done.returncode == 0, done.stderr
        assert "gigatoken encoded" in log.read_text()
    one, two = (Result(tmp_path / f"s{workers}", tokenizer_json) for workers in (1, 2))
    names = sorted(path.name for path in one.folder.iterdir())
    assert names == sorted(path.name for path in two.folder.iterdir())
    assert len(names) > 10
    for name in names:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name


def test_documents_do_not_depend_on_the_size_of_shards(tmp_path: Path, tokenizer_json: Path) -> None:
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(200))
    small, large = (make(tokenizer_json, tmp_path / str(n), corpus, shard_bytes=n) for n in (4096, 1 << 26))
    assert len(small.manifest["shards"]) > len(large.manifest["shards"]) == 2
    assert (small.train, small.eval, small.ids) == (large.train, large.eval, large.ids)


def test_every_format_gives_the_same_documents(tmp_path: Path, tokenizer_json: Path) -> None:
    rows = made_texts.rows(60)
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    array = json.dumps(rows, indent=1).encode()
    contents = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.json": array,
        "lines.json": lines,
        "a.json.gz": gzip.compress(array),
        "a.json.zst": zstandard.compress(array),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first = None
    for i, name in enumerate([*contents, "a.parquet"]):
        result = make(tokenizer_json, tmp_path / f"s{i}", tmp_path / name)
        assert result.quarantine == []
        first = first or result
        assert (result.train, result.eval) == (first.train, first.eval), name
    assert first and len(first.all) == 60


def test_text_files_as_documents_and_as_blocks(tmp_path: Path, tokenizer_json: Path) -> None:
    texts = made_texts.texts(30)
    for i in range(10):
        (tmp_path / f"in/{i}").mkdir(parents=True)
        content = "\r\n\r\n".join(texts[3 * i : 3 * i + 3]).encode()
        name, data = (
            ("a.txt.gz", gzip.compress(content)),
            ("a.txt.zst", zstandard.compress(content)),
            ("a.txt", content),
        )[i % 3]
        (tmp_path / f"in/{i}" / name).write_bytes(data)
    files = make(tokenizer_json, tmp_path / "s1", tmp_path / "in")
    assert files.all["2/a.txt:1"] == "\n\n".join(texts[6:9])
    assert len(files.all) == 10
    blocks = make(tokenizer_json, tmp_path / "s2", tmp_path / "in", txt_documents="block", shard_bytes=4096)
    assert blocks.all["2/a.txt:3"] == texts[8]
    assert sorted(blocks.all.values()) == sorted(texts)


def test_files_of_different_schemas_together(tmp_path: Path, tokenizer_json: Path) -> None:
    made_texts.write_jsonl(
        tmp_path / "in/a.jsonl",
        [{"doc": {"body": "nested text", "key": 1}}, {"doc.body": "dotted text", "doc": 5, "more": []}],
    )
    pq.write_table(pa.table({"doc": [{"body": "in a struct", "key": "p"}]}), tmp_path / "in/b.parquet")
    pq.write_table(
        pa.table({"n": [1.5], "doc.body": pa.array(["in a column"], pa.large_string())}),
        tmp_path / "in/c.parquet",
    )
    result = make(
        tokenizer_json,
        tmp_path / "s",
        tmp_path / "in",
        text_field="doc.body",
        id_field="doc.key",
        eval_fraction=0.3,
    )
    assert result.all == {
        "1": "nested text",
        "a.jsonl:2": "dotted text",
        "p": "in a struct",
        "c.parquet:1": "in a column",
    }


def test_documents_keep_their_label_beside_their_id(tmp_path: Path, tokenizer_json: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = made_texts.rows(40)
    for i, row in enumerate(rows):
        row["meta"] = {"source": ["news", "mail", 7, None][i % 4]}
    made_texts.write_jsonl(tmp_path / "in/a.jsonl", [*rows, rows[3]])
    (tmp_path / "in/b.txt").write_text("a text file")
    pq.write_table(pa.table({"text": ["a row"], "id": ["p"]}), tmp_path / "in/c.parquet")
    column = pa.array([{"source": "books"}])
    pq.write_table(
        pa.table({"text": ["another row"], "id": ["q"], "meta": column}), tmp_path / "in/d.parquet"
    )
    about = {"eval_fraction": 0.3, "shard_bytes": 4096}
    without = make(tokenizer_json, tmp_path / "none", tmp_path / "in", **about)
    assert without.labels == {}
    for workers in (1, 2):
        found = make(
            tokenizer_json,
            tmp_path / f"s{workers}",
            tmp_path / "in",
            workers=workers,
            label_field="meta.source",
            **about,
        )
        assert found.all == without.all and found.quarantine == without.quarantine
        expected = {row["id"]: ["news", "mail", "7", ""][i % 4] for i, row in enumerate(rows)}
        assert found.labels == {**expected, "b.txt:1": "", "p": "", "q": "books"}
        n_labelled = sum(entry[shard_files.N_LABELLED] for entry in found.manifest["shards"])
        assert n_labelled == sum(map(bool, found.labels.values()))
        for split in ("train", "eval"):
            name = f"identity_{split}"
            assert found.manifest[name] == without.manifest[name], "labels train nothing again"
            entries = [entry for entry in found.manifest["shards"] if entry["split"] == split]
            assert shard_files.identity_labels(entries)
            assert shard_files.labels(found.folder, entries[0]) == [
                found.labels[name]
                for name in pq.read_table(found.folder / f"{entries[0]['name']}.parquet")[
                    "doc_id"
                ].to_pylist()
            ]


def test_a_label_field_that_no_row_has(tmp_path: Path, tokenizer_json: Path) -> None:
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(9))
    with pytest.raises(
        ValueError, match=r"^corpus.label_field: domian: no document has it. Expected a field of"
    ):
        make(tokenizer_json, tmp_path / "s", corpus, label_field="domian")
    assert not (tmp_path / "s/manifest.json").exists()


def test_held_out_files(tmp_path: Path, tokenizer_json: Path) -> None:
    rows = made_texts.rows(80)
    train = [
        *rows[20:],
        {"id": "leak", "text": rows[5]["text"]},
        {"id": rows[7]["id"], "text": "another text"},
    ]
    a, b = (
        made_texts.write_jsonl(tmp_path / "a.jsonl", train),
        made_texts.write_jsonl(tmp_path / "b.jsonl", rows[:20]),
    )
    for shard_bytes in (4096, 1 << 20):
        result = make(tokenizer_json, tmp_path / f"s{shard_bytes}", a, eval=[str(b)], shard_bytes=shard_bytes)
        assert list(result.eval) == [row["id"] for row in rows[:20]]
        assert list(result.train) == [row["id"] for row in rows[20:]]
        assert sorted(result.reasons()) == [("a.jsonl", 61, "held-out text"), ("a.jsonl", 62, "duplicate id")]
        assert f"{b}:8" in result.quarantine[1]["reason"], "the held-out document keeps the id"


def test_all_documents_are_held_out_and_equal_texts_stay(tmp_path: Path, tokenizer_json: Path) -> None:
    rows = [*made_texts.rows(9), made_texts.rows(9)[0]]
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", rows)
    values = changed_config.changed(
        outdir=str(tmp_path), corpus__train=[str(corpus)], corpus__id_field="", corpus__max_bad_share=1.0
    )
    config.write(config.validate(values), tmp_path / "config.json")
    argv = ["--config", tmp_path / "config.json", "--tokenizer", tokenizer_json, "--held-out"]
    shard.main([str(word) for word in [*argv, "--out", tmp_path / "s/manifest.json"]])
    result = Result(tmp_path / "s", tokenizer_json)
    assert list(result.eval.values()) == [row["text"] for row in rows] and not result.train
    assert list(result.eval) == [f"a.jsonl:{line}" for line in range(1, 11)]


def test_file_on_both_sides_is_refused(tmp_path: Path, tokenizer_json: Path) -> None:
    path = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(20))
    with pytest.raises(ValueError, match=r"a\.jsonl is also in corpus\.train"):
        make(tokenizer_json, tmp_path / "s", tmp_path, eval=[str(path)])


def test_demo_file_stands_for_the_built_in_corpus(tmp_path: Path, tokenizer_json: Path) -> None:
    demo = made_texts.write_jsonl(tmp_path / "demo.jsonl", made_texts.rows(100))
    how = made_texts.shard_plan()
    assert how.train == ("builtin:demo",)
    shard.make(how, tokenizer_json, tmp_path / "s/manifest.json", 1, demo, tmp_path / "seen.json")
    assert len(Result(tmp_path / "s", tokenizer_json).all) == 100
    with pytest.raises(ValueError, match="--demo"):
        shard.make(how, tokenizer_json, tmp_path / "s/manifest.json", 1, None, tmp_path / "seen.json")


# what identifies it


def test_manifest_says_what_made_it(tmp_path: Path, tokenizer_json: Path) -> None:
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(40))
    manifest = make(tokenizer_json, tmp_path / "s", corpus).manifest
    plan = made_texts.shard_plan(train=[str(corpus)], eval_fraction=0.5, max_bad_share=1.0)
    assert manifest["made_with"] == plan.content() and not {"train", "eval"} & manifest["made_with"].keys()
    seen = tmp_path / "seen.json"
    assert manifest["made_from"] == {
        "tokenizer": artifact.identity(tokenizer_json),
        "corpus": corpus_content.of_corpus([str(corpus)], None, None, seen),
    }
    assert (tmp_path / ".corpus.json").exists() and seen.exists()
    assert str(tmp_path) not in json.dumps(manifest), "the folder of the corpus plays no part"


def test_copy_of_the_corpus_gives_the_same_bytes(tmp_path: Path, tokenizer_json: Path) -> None:
    manifests = []
    for folder in ("one", "another/place"):
        corpus = made_texts.write_jsonl(tmp_path / folder / "a.jsonl", made_texts.rows(40))
        make(tokenizer_json, tmp_path / folder / "s", corpus)
        manifests.append((tmp_path / folder / "s/manifest.json").read_bytes())
    assert manifests[0] == manifests[1]


IDENTITIES = ("identity_train", "identity_eval")


def make_held_out(
    tmp_path: Path, tokenizer_json: Path, held_out: list[dict[str, Any]], **corpus: Any
) -> Result:
    """Shards of 60 training documents and of these held-out documents."""
    train = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(60))
    path = made_texts.write_jsonl(tmp_path / "b.jsonl", held_out)
    return make(tokenizer_json, tmp_path / "s", train, eval=[str(path)], shard_bytes=4096, **corpus)


def test_new_held_out_text_leaves_the_training_text_as_it_was(tmp_path: Path, tokenizer_json: Path) -> None:
    few, more = (
        make_held_out(tmp_path, tokenizer_json, made_texts.rows(n, rng_seed=1)).manifest for n in (20, 50)
    )
    assert few["identity_train"] == more["identity_train"] and few["identity_eval"] != more["identity_eval"]
    assert few["made_from"]["corpus"] != more["made_from"]["corpus"] and few["seal"] != more["seal"]


@pytest.mark.parametrize("taken", ["text", "id"])
def test_held_out_text_that_takes_a_training_document_away_changes_the_training_text(
    tmp_path: Path, tokenizer_json: Path, taken: str
) -> None:
    """A training document with the text or the id of a held-out document goes to the quarantine."""
    held_out = made_texts.rows(20, rng_seed=1)
    before = make_held_out(tmp_path, tokenizer_json, held_out)
    held_out[3][taken] = made_texts.rows(60)[30][taken]
    after = make_held_out(tmp_path, tokenizer_json, held_out)
    assert before.train.keys() - after.train.keys() == {"0-30"}
    assert before.manifest["identity_train"] != after.manifest["identity_train"]


def test_changed_training_text_leaves_the_held_out_text_as_it_was(
    tmp_path: Path, tokenizer_json: Path
) -> None:
    held_out = made_texts.write_jsonl(tmp_path / "b.jsonl", made_texts.rows(20, rng_seed=1))
    found = []
    for i, rows in enumerate([made_texts.rows(60), made_texts.rows(61), made_texts.rows(60)[::-1]]):
        train = made_texts.write_jsonl(tmp_path / "a.jsonl", rows)
        found.append(make(tokenizer_json, tmp_path / f"s{i}", train, eval=[str(held_out)]).manifest)
    assert len({manifest["identity_train"] for manifest in found}) == 3
    assert len({manifest["identity_eval"] for manifest in found}) == 1


def test_ids_of_documents_are_part_of_their_identity(tmp_path: Path, tokenizer_json: Path) -> None:
    found = []
    for i, key in enumerate(("id", "key")):
        rows = [{key: row["id"], "text": row["text"]} for row in made_texts.rows(60)]
        corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", rows)
        found.append(make(tokenizer_json, tmp_path / f"s{i}", corpus))
    assert list(found[0].train.values()) == list(found[1].train.values())
    assert found[0].train.keys() != found[1].train.keys()
    for name in IDENTITIES:
        assert found[0].manifest[name] != found[1].manifest[name]


def test_another_tokenizer_changes_all_identities(tmp_path: Path, tokenizer_json: Path) -> None:
    """Also one that gives the same tokens, because later rules decode them."""
    shutil.copytree(tokenizer_json.parent, tmp_path / "t")
    other = tmp_path / "t/tokenizer.json"
    other.write_text(other.read_text() + "\n")
    card = artifact.read_sealed(tmp_path / "t/card.json", "tokenizer")
    del card["seal"]
    card["files"]["tokenizer.json"] = artifact.identity(other)
    artifact.write_sealed(tmp_path / "t/card.json", card)
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(60))
    one, two = (make(path, tmp_path / f"s{path.parent.name}", corpus) for path in (tokenizer_json, other))
    assert one.ids == two.ids
    for name in IDENTITIES:
        assert one.manifest[name] != two.manifest[name]


# what is left out


def test_bad_rows_go_to_the_quarantine_and_nothing_is_lost(tmp_path: Path, tokenizer_json: Path) -> None:
    good = made_texts.rows(40)
    bad = {
        b"{broken": "broken JSON",
        b"[1]": "not an object",
        b'{"id": "x1"}': "no text field",
        b'{"id": "x2", "text": 5}': "text is not a string",
        b'{"id": "x3", "text": null}': "text is not a string",
        b'{"id": "x4", "text": "caf\xe9"}': "invalid UTF-8",
        b'{"id": "x5", "text": "\\ud83d"}': "lone surrogate",
        b'{"id": "x6", "text": ""}': "empty text",
        b'{"id": "x7", "text": " \\t\\n\\u3000"}': "empty text",
        b'{"id": "0-1", "text": "the id of another"}': "duplicate id",
    }
    content: list[Any] = [*good[:20], *bad, *good[20:], b"", b'{"id": "nul", "text": "NUL \\u0000 stays"}']
    made_texts.write_jsonl(tmp_path / "in/a.jsonl", content)
    made_texts.write_jsonl(
        tmp_path / "in/b.jsonl",
        [{"id": 17, "text": "a number as id"}, {"id": "17", "text": "the same id as text"}],
    )
    for shard_bytes in (4096, 1 << 20):
        result = make(tokenizer_json, tmp_path / f"s{shard_bytes}", tmp_path / "in", shard_bytes=shard_bytes)
        assert {name: text for name, text in result.all.items() if name in {row["id"] for row in good}} == {
            r["id"]: r["text"] for r in good
        }
        assert result.all["nul"] == "NUL \0 stays"
        assert result.all["17"] == "a number as id"
        expected = [("a.jsonl", 21 + i, reason) for i, reason in enumerate(bad.values())] + [
            ("b.jsonl", 2, "duplicate id")
        ]
        assert sorted(result.reasons()) == sorted(expected)
        assert len(result.all) + len(result.quarantine) == len(content) - 1 + 2, "the empty line is no row"


@pytest.mark.parametrize(("shard_bytes", "row_group_bytes"), [(4096, 1 << 23), (1 << 20, 1000)])
def test_duplicate_ids_keep_the_first(
    tmp_path: Path,
    tokenizer_json: Path,
    shard_bytes: int,
    row_group_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_block, "_ROW_GROUP_BYTES", row_group_bytes)
    rows = made_texts.rows(100)
    rows[70]["id"] = rows[10]["id"]
    again = [{"id": row["id"], "text": f"again {row['text']}"} for row in rows[:50]]
    (tmp_path / "in").mkdir()
    made_texts.write_jsonl(tmp_path / "in/a.jsonl", rows)
    made_texts.write_jsonl(tmp_path / "in/b.jsonl", again)
    result = make(tokenizer_json, tmp_path / "s", tmp_path / "in", shard_bytes=shard_bytes)
    assert result.all == {row["id"]: row["text"] for i, row in enumerate(rows) if i != 70}
    expected = [("a.jsonl", 71, "duplicate id"), *(("b.jsonl", i + 1, "duplicate id") for i in range(50))]
    assert sorted(result.reasons()) == expected
    first = {row["line"]: row["reason"] for row in result.quarantine if row["source"].endswith("b.jsonl")}
    assert first[5] == f"duplicate id: 0-4 is also the id of {tmp_path}/in/a.jsonl:5"


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_truncated_file(tmp_path: Path, tokenizer_json: Path, suffix: str) -> None:
    rows = made_texts.rows(2000)
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    whole = gzip.compress(lines) if suffix.endswith("gz") else zstandard.compress(lines)
    (tmp_path / f"a{suffix}").write_bytes(whole[: len(whole) * 3 // 4])
    result = make(tokenizer_json, tmp_path / "s", tmp_path / f"a{suffix}")
    n = len(result.all)
    assert n > 100
    assert result.all == {row["id"]: row["text"] for row in rows[:n]}
    assert result.reasons() == [(f"a{suffix}", n + 1, "damaged file")]


def test_bom_and_windows_line_ends(tmp_path: Path, tokenizer_json: Path) -> None:
    rows = made_texts.rows(20)
    rows[0]["text"] += "\r\ninner line ends stay"
    content = b"\xef\xbb\xbf" + b"".join(json.dumps(row).encode() + b"\r\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(content)
    result = make(tokenizer_json, tmp_path / "s", tmp_path / "a.jsonl")
    assert result.quarantine == []
    assert result.all == {row["id"]: row["text"] for row in rows}


def test_single_long_document(tmp_path: Path, tokenizer_json: Path) -> None:
    page = "\n".join(made_texts.texts(500)) + "\n"
    text = page * (50_000_000 // len(page))
    made_texts.write_jsonl(tmp_path / "a.jsonl", [*made_texts.rows(20), {"id": "long", "text": text}])
    cfg = made_texts.write_config(
        tmp_path / "c.json", corpus={"train": [str(tmp_path / "a.jsonl")], "eval_fraction": 0.4}
    )
    done = made_texts.run(
        "shard", "--config", cfg, "--tokenizer", tokenizer_json, "--out", tmp_path / "s/manifest.json"
    )
    assert done.returncode == 0, done.stderr
    (entry,) = [
        e
        for e in artifact.read_sealed(tmp_path / "s/manifest.json", "shards")["shards"]
        if e["n_bytes"] > 40_000_000
    ]
    ids = pq.read_table(tmp_path / f"s/{entry['name']}.parquet", columns=["doc_id"])["doc_id"].to_pylist()
    (stored,) = pq.read_table(tmp_path / f"s/{entry['name']}.parquet", filters=[("doc_id", "=", "long")])[
        "text"
    ].to_pylist()
    assert stored == text
    documents, row = shard_files.documents(tmp_path / "s", entry), ids.index("long")
    expected = encoding.TokenEncoder(tokenizer_json).encode(text.encode(), fast=True)
    assert np.array_equal(documents.values[documents.offsets[row] + 1 : documents.offsets[row + 1]], expected)


def test_document_without_tokens(tmp_path: Path) -> None:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    made.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    about = {
        "separator_id": 0,
        "vocab_size": 2,
        "source": "test",
        "files": {"tokenizer.json": artifact.identity(tmp_path / "tokenizer.json")},
    }
    artifact.write_sealed(tmp_path / "card.json", artifact.make_meta("tokenizer", {}, **about))
    corpus = made_texts.write_jsonl(
        tmp_path / "a.jsonl", [{"text": "a " * (i + 1)} for i in range(10)] + [{"text": "\u200b"}]
    )
    result = make(tmp_path / "tokenizer.json", tmp_path / "s", corpus)
    assert result.reasons() == [("a.jsonl", 11, "no tokens")]
    assert result.manifest["encoder"] == "tokenizers"
    assert result.ids["a.jsonl:3"] == [1, 1, 1]


# what is refused


def refused(tmp_path: Path, tokenizer_json: Path, match: str, *train: Path, **corpus: Any) -> None:
    with pytest.raises(ValueError, match=match):
        make(tokenizer_json, tmp_path / "s", *train, **corpus)
    assert not (tmp_path / "s/manifest.json").exists()


def test_too_many_bad_rows_stop_the_run_and_the_quarantine_stays(
    tmp_path: Path, tokenizer_json: Path
) -> None:
    content = [*made_texts.rows(90), *[b"broken"] * 7, *[b'{"text": 1}'] * 3]
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", content)
    cfg = made_texts.write_config(tmp_path / "c.json", corpus={"train": [str(corpus)], "max_bad_share": 0.09})
    done = made_texts.run(
        "shard", "--config", cfg, "--tokenizer", tokenizer_json, "--out", tmp_path / "s/manifest.json"
    )
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert f"10 of 100 rows (10.00%) cannot be used: 7 x broken JSON ({corpus}:91: broken JSON: " in line
    assert f"3 x text is not a string ({corpus}:98: text is not a string: a number)" in line
    assert "9.00%" in line and str(tmp_path / "s/quarantine.jsonl") in line
    assert "Traceback" not in done.stderr
    assert len((tmp_path / "s/quarantine.jsonl").read_text().splitlines()) == 10
    assert not (tmp_path / "s/manifest.json").exists()
    assert len(make(tokenizer_json, tmp_path / "s", corpus, max_bad_share=0.1).quarantine) == 10


def test_cut_file_stops_the_run_though_only_one_row_says_so(tmp_path: Path, tokenizer_json: Path) -> None:
    whole = zstandard.compress(b"".join(json.dumps(row).encode() + b"\n" for row in made_texts.rows(2000)))
    (tmp_path / "a.jsonl.zst").write_bytes(whole[: len(whole) * 3 // 4])
    good = made_texts.write_jsonl(tmp_path / "b.jsonl", made_texts.rows(100, 7))
    corpus = (tmp_path / "a.jsonl.zst", good)
    refused(tmp_path, tokenizer_json, r"1 of 2 files \(50.00%\) are damaged", *corpus, max_bad_share=0.05)
    assert len(make(tokenizer_json, tmp_path / "s", *corpus, max_bad_share=0.5).quarantine) == 1


def test_one_bad_row_that_holds_most_of_the_text_stops_the_run(tmp_path: Path, tokenizer_json: Path) -> None:
    good = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(100))
    whole = json.dumps({"data": made_texts.rows(1000, 1)}).encode()
    other = made_texts.write_jsonl(tmp_path / "b.jsonl", [whole])
    match = r"1 of 101 rows cannot be used, and they hold 9\d\.\d\d% of the bytes: 1 x no text field"
    refused(tmp_path, tokenizer_json, match, good, other, max_bad_share=0.05)


def test_files_that_all_count_from_0_are_named_by_file_and_row(tmp_path: Path, tokenizer_json: Path) -> None:
    for name in "ab":
        made_texts.write_jsonl(
            tmp_path / f"in/{name}.jsonl",
            [{"id": i, "text": f"{name} {text}"} for i, text in enumerate(made_texts.texts(50))],
        )
    refused(tmp_path, tokenizer_json, r"set corpus\.id_field: null", tmp_path / "in", max_bad_share=0.05)
    result = make(tokenizer_json, tmp_path / "s", tmp_path / "in", max_bad_share=0, id_field=None)
    assert set(result.all) == {f"{name}.jsonl:{i + 1}" for name in "ab" for i in range(50)}


def test_file_that_vanishes_after_the_start_of_the_run_is_named(tmp_path: Path, tokenizer_json: Path) -> None:
    for name in "ab":
        made_texts.write_jsonl(tmp_path / f"in/{name}.jsonl", made_texts.rows(60, ord(name)))
    files = [tmp_path / "in/a.jsonl", tmp_path / "in/b.jsonl"]
    corpus_content.write_planned(map(str, files), tmp_path / "planned.json")
    cfg = made_texts.write_config(tmp_path / "c.json", corpus={"train": [str(tmp_path / "in")]})
    args = ("--config", cfg, "--tokenizer", tokenizer_json, "--planned", tmp_path / "planned.json", "--out")
    assert made_texts.run("shard", *args, tmp_path / "s/manifest.json").returncode == 0
    files[1].unlink()
    done = made_texts.run("shard", *args, tmp_path / "t/manifest.json")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{files[1]}: gone since the run was started. Expected the corpus to stay as it is." in line
    assert not (tmp_path / "t").exists()


def test_id_of_500_kb_makes_no_line_of_500_kb(
    tmp_path: Path, tokenizer_json: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*made_texts.rows(50), *[{"id": "x\x9b2J" * 100_000, "text": text} for text in ("a b", "c d")]]
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", rows)
    result = make(tokenizer_json, tmp_path / "s", corpus)
    assert len(result.all) == 51
    assert "\x9b" in result.quarantine[0]["reason"]
    assert "\x9b" not in (tmp_path / "s/quarantine.jsonl").read_text()
    assert max(map(len, (tmp_path / "s/quarantine.jsonl").read_text().splitlines())) < 1000
    assert max(map(len, caplog.messages)) < 1000


def test_corpora_without_documents(tmp_path: Path, tokenizer_json: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    refused(tmp_path, tokenizer_json, "no rows in its 1 files", empty)
    blank = made_texts.write_jsonl(tmp_path / "blank.jsonl", [{"text": " \n"}, {"text": ""}])
    refused(
        tmp_path,
        tokenizer_json,
        r"2 of 2 rows \(100.00%\) cannot be used: 2 x empty text",
        blank,
        max_bad_share=0.5,
    )
    refused(tmp_path, tokenizer_json, "2 of 2 rows", blank)
    (tmp_path / "empty.txt").touch()
    refused(tmp_path, tokenizer_json, "1 x empty text", tmp_path / "empty.txt", max_bad_share=0.5)
    (tmp_path / "folder").mkdir()
    refused(tmp_path, tokenizer_json, "folder: no matching file", tmp_path / "folder")


def test_nothing_held_out_or_nothing_to_train_on(tmp_path: Path, tokenizer_json: Path) -> None:
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(3))
    refused(
        tmp_path,
        tokenizer_json,
        "none of the 3 documents is held out.*Raise corpus.eval_fraction",
        corpus,
        eval_fraction=1e-6,
    )
    refused(
        tmp_path,
        tokenizer_json,
        "none of the 3 documents is left to train on",
        corpus,
        eval_fraction=0.999999,
    )
    blank = made_texts.write_jsonl(tmp_path / "b.jsonl", [{"text": ""}])
    refused(tmp_path, tokenizer_json, "is held out.*Add documents to corpus.eval", corpus, eval=[str(blank)])


def test_column_of_numbers_and_missing_column(tmp_path: Path, tokenizer_json: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2, 3], "body": ["a", "b", "c"]}), tmp_path / "a.parquet")
    refused(
        tmp_path,
        tokenizer_json,
        "3 of 3 rows.*text is not a string: a number",
        tmp_path / "a.parquet",
        max_bad_share=0.05,
    )
    refused(
        tmp_path,
        tokenizer_json,
        "no column words. Expected one of its columns, text, body",
        tmp_path / "a.parquet",
        text_field="words",
    )


def test_parquet_file_with_a_wrong_page_is_one_line(tmp_path: Path, tokenizer_json: Path) -> None:
    """Its checksum says so. Without it, the wrong text would be trained on."""
    rows, path = made_texts.rows(60), tmp_path / "a.parquet"
    pq.write_table(
        pa.Table.from_pylist(rows), path, write_page_checksum=True, compression="none", use_dictionary=False
    )
    path.write_bytes(path.read_bytes().replace(b"Document 0-33:", b"Document 0-3x:"))
    cfg = made_texts.write_config(tmp_path / "c.json", corpus={"train": [str(path)]})
    done = made_texts.run(
        "shard", "--config", cfg, "--tokenizer", tokenizer_json, "--out", tmp_path / "s/manifest.json"
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{path}: unreadable" in line and "CRC" in line and "Mend the file or leave it out." in line
    assert not (tmp_path / "s/manifest.json").exists()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_shard_that_is_damaged_before_it_is_written_again_is_refused(
    tmp_path: Path, tokenizer_json: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are read once more to take documents out whose id came before."""
    rows = made_texts.rows(60)
    rows[50]["id"] = rows[3]["id"]
    drop = shard_block.drop

    def damage_and_drop(setup: shard_block.Setup, work: tuple[dict[str, Any], np.ndarray]) -> object:
        path = setup.folder / f"{work[0]['name']}{suffix}"
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        return drop(setup, work)

    monkeypatch.setattr(shard_block, "drop", damage_and_drop)
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises((ValueError, OSError), match=rf"train-00000\{suffix}"):
        make(tokenizer_json, tmp_path / "s", corpus, eval_fraction=0.01)
    assert not (tmp_path / "s/manifest.json").exists()


def test_unreadable_files(tmp_path: Path, tokenizer_json: Path) -> None:
    made_texts.write_jsonl(tmp_path / "in/a.jsonl", made_texts.rows(5))
    (tmp_path / "in/b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    cfg = made_texts.write_config(tmp_path / "c.json", corpus={"train": [str(tmp_path / "in")]})
    args = ("--config", cfg, "--tokenizer", tokenizer_json, "--out", tmp_path / "s/manifest.json")
    done = made_texts.run("shard", *args)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{tmp_path}/in/b.jsonl: No such file or directory" in line
    (tmp_path / "in/b.jsonl").unlink()
    (tmp_path / "in/b.jsonl").mkdir()
    refused(tmp_path, tokenizer_json, r"b\.jsonl: no matching file", tmp_path / "in/b.jsonl")


def test_file_that_cannot_be_read_is_named(tmp_path: Path, tokenizer_json: Path) -> None:
    # the first page of a process's memory opens like a file, and no user, root included, can read it
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=r"a\.jsonl"):
        make(tokenizer_json, tmp_path / "s", tmp_path / "a.jsonl")


def test_tokenizer_that_does_not_match_its_card(tmp_path: Path, tokenizer_json: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    with pytest.raises((ValueError, OSError), match=r"card\.json"):
        make(
            tmp_path / "tokenizer.json",
            tmp_path / "s",
            made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(5)),
        )


# what may happen to a run


def started(
    tmp_path: Path, tokenizer_json: Path, n_rows: int, workers: int, awaited: str
) -> tuple[subprocess.Popen[str], list[Any], Path]:
    """Start a run and wait until it has written a shard like `awaited`.

    Returns it, its arguments, its corpus.
    """
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(n_rows))
    cfg = made_texts.write_config(
        tmp_path / "c.json", corpus={"train": [str(corpus)], "shard_bytes": 4096, "eval_fraction": 0.2}
    )
    args = [
        "--config",
        cfg,
        "--tokenizer",
        tokenizer_json,
        "--out",
        tmp_path / "s/manifest.json",
        "--workers",
        workers,
    ]
    run = made_texts.start("shard", *args)
    while not list((tmp_path / "s").glob(awaited)):
        assert run.poll() is None
        time.sleep(0.001)
    return run, args, corpus


def limited() -> None:
    """Limit files to 200 kB, so that writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_full_is_one_line_and_leaves_nothing_damaged(
    tmp_path: Path, tokenizer_json: Path, workers: int
) -> None:
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(8000))
    cfg = made_texts.write_config(tmp_path / "c.json", corpus={"train": [str(corpus)]})
    args = (
        "--config",
        cfg,
        "--tokenizer",
        tokenizer_json,
        "--out",
        tmp_path / "s/manifest.json",
        "--workers",
        workers,
    )
    done = made_texts.run("shard", *args, preexec_fn=limited)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{tmp_path}/s/train-00000" in line and "free space" in line
    assert [path.name for path in (tmp_path / "s").iterdir()] == []
    done = made_texts.run("shard", *args)
    assert done.returncode == 0, done.stderr
    assert len(Result(tmp_path / "s", tokenizer_json).all) == 8000


def test_stale_shards_are_removed_and_strangers_stay(tmp_path: Path, tokenizer_json: Path) -> None:
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(200))
    n = len(make(tokenizer_json, tmp_path / "s", corpus, shard_bytes=4096).manifest["shards"])
    for name in ("train-00077.arrow", ".eval-00001.parquet.host-1.tmp", ".spill/train-00000.npy"):
        (tmp_path / "s" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "s" / name).write_bytes(b"stale")
    assert len(make(tokenizer_json, tmp_path / "s", corpus, shard_bytes=1 << 20).manifest["shards"]) == 2 < n
    (tmp_path / "s/notes.txt").write_text("mine")
    with pytest.raises(ValueError):
        make(tokenizer_json, tmp_path / "s", tmp_path / "none")
    assert (tmp_path / "s/notes.txt").exists()


@pytest.mark.slow
def test_killed_run_starts_again(tmp_path: Path, tokenizer_json: Path) -> None:
    run, args, corpus = started(tmp_path, tokenizer_json, 2000, 1, "train-00003.arrow")
    run.kill()
    run.communicate()
    assert not (tmp_path / "s/manifest.json").exists()
    assert made_texts.run("shard", *args).returncode == 0
    again = Result(tmp_path / "s", tokenizer_json)
    how = {"shard_bytes": 4096, "eval_fraction": 0.2, "max_bad_share": 0.05}
    fresh = make(tokenizer_json, tmp_path / "fresh", corpus, **how)
    assert again.manifest == fresh.manifest


def test_workers_end_with_a_killed_run(tmp_path: Path, tokenizer_json: Path) -> None:
    import psutil

    run, _, _ = started(tmp_path, tokenizer_json, 4000, 2, "train-0000*.arrow")
    workers = psutil.Process(run.pid).children()
    assert len(workers) >= 2
    run.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    run.communicate()
    assert not alive


def test_killed_worker_is_one_line(tmp_path: Path, tokenizer_json: Path) -> None:
    import psutil

    run, _, _ = started(tmp_path, tokenizer_json, 4000, 2, "train-0000*.arrow")
    workers = [
        child for child in psutil.Process(run.pid).children() if "spawn_main" in " ".join(child.cmdline())
    ]
    assert workers
    workers[0].kill()
    _, stderr = run.communicate()
    assert run.returncode == 1
    assert stderr.splitlines()[-1].endswith("lower corpus.shard_bytes or --workers.")
    assert "Traceback" not in stderr
    assert not (tmp_path / "s/manifest.json").exists()


# where gigatoken differs


class Differs:
    """An encoder whose fast side is wrong for one text."""

    def __init__(self, encoder: encoding.TokenEncoder, wrong: bytes):
        self.encoder, self.wrong, self.why_slow = encoder, wrong, ""

    def agrees(self, texts: list[bytes]) -> bool:
        return not any(self.wrong in text for text in texts)

    def encode(self, text: bytes, fast: bool) -> np.ndarray:
        return np.full(3, 9, np.uint32) if fast and self.wrong in text else self.encoder.encode(text, fast)


def test_block_whose_sample_differs_is_encoded_by_the_reference(
    tmp_path: Path, tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = made_texts.rows(120)
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", rows)
    right = make(tokenizer_json, tmp_path / "right", corpus, shard_bytes=4096)
    encoder = Differs(encoding.TokenEncoder(tokenizer_json), rows[60]["text"].encode())
    monkeypatch.setattr(shard_block, "_encoder", lambda *_: encoder)
    result = make(tokenizer_json, tmp_path / "s", corpus, shard_bytes=4096)
    assert result.ids == right.ids
    assert (right.manifest["encoder"], result.manifest["encoder"]) == ("gigatoken", "tokenizers")
    assert "tokenizers encoded 1 blocks: gigatoken encodes the sample differently" in caplog.text


def test_sample_covers_the_block_and_what_is_not_ascii() -> None:
    texts = [b"%06d" % i * 200 for i in range(10_000)]
    sample = shard_block._sample(texts)
    assert {len(text) for text in sample} == {512}
    assert len(sample) == 16
    assert np.diff([int(text[6:12]) for text in sorted(sample)]).max() < 1000
    texts[::5] = ["{}{:06d}é日😀".format("a" * 1000, i).encode() for i in range(0, 10_000, 5)]
    special = sorted({text for text in shard_block._sample(texts) if not text.isascii()})
    assert len(special) >= 16
    numbers = [int(text.decode().strip("aé日😀")) for text in special]
    assert np.diff(sorted(numbers)).max() < 1000
    one = shard_block._sample([*[b"plain text"] * 1000, "some é".encode()])
    assert "some é".encode() in one
    assert shard_block._sample([]) == []
    assert shard_block._sample([b"a", b"b"]) == [b"a", b"b"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="a é日😀\n", min_size=1, max_size=1500).map(str.encode), max_size=8))
def test_sample_is_bounded_and_of_whole_characters(texts: list[bytes]) -> None:
    sample = shard_block._sample(texts)
    assert sum(map(len, sample)) <= 32 * 512
    for text in sample:
        text.decode()
        assert any(text in whole for whole in texts)
    for whole in texts:
        assert len(whole) > 512 or len(texts) > 1 or whole in sample
