import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import made_texts
from cbtm_pipeline import shard
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import records
from cbtm_pipeline.corpus.formats import COMPRESSIONS, FORMATS, Format
from cbtm_pipeline.corpus.records import Defect, Fields

DOCS = made_texts.ROOT / "docs/corpus.md"


def parse_tsv(lines: Iterable[bytes], fields: Fields) -> Iterator[tuple[bytes, bytes, None] | Defect]:
    """A toy format: each line is an id, a tab and a text."""
    for line in lines:
        name, tab, text = line.partition(b"\t")
        yield (text, name, None) if tab else Defect("no tab: one column")


@pytest.fixture
def tsv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        FORMATS, ".tsv", Format(records.cut_lines, parse_tsv, compressible=True, unpacked=0.9)
    )


def test_new_format_is_one_entry_and_its_functions(tmp_path: Path, tsv: None) -> None:
    rows = made_texts.rows(50)
    lines = "".join(f"{row['id']}\t{row['text']}\n" for row in rows)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tsv").write_text(lines + "no id\n" + "7\tcaf")
    (tmp_path / "in/notes.md").write_text("no corpus file")
    tokenizer_json = made_texts.make_tokenizer(tmp_path)
    plan = made_texts.shard_plan(train=[str(tmp_path / "in")], eval_fraction=0.3, max_bad_share=0.1)
    shard.make(plan, tokenizer_json, tmp_path / "s/manifest.json", 1, None, tmp_path / "seen.json")

    found: dict[str, str] = {}
    for entry in artifact.read_sealed(tmp_path / "s/manifest.json", "shards")["shards"]:
        table = pq.read_table(tmp_path / f"s/{entry['name']}.parquet", columns=["doc_id", "text"])
        found |= {row["doc_id"]: row["text"] for row in table.to_pylist()}
    assert found == {row["id"]: row["text"] for row in rows} | {"7": "caf"}
    (bad,) = (tmp_path / "s/quarantine.jsonl").read_text().splitlines()
    assert json.loads(bad) == {
        "source": str(tmp_path / "in/a.tsv"),
        "line": 51,
        "reason": "no tab: one column",
    }


def test_files_of_a_new_format_are_found_and_their_text_is_estimated(tmp_path: Path, tsv: None) -> None:
    names = ("a.tsv", "b.tsv.gz", "c.TSV.zst")
    for name in (*names, "d.csv"):
        (tmp_path / name).touch()
    assert corpus_files.find([str(tmp_path)], None) == [str(tmp_path / name) for name in names]
    assert [corpus_files.unpacked(name) for name in names] == pytest.approx([0.9, 2.7, 3.6])


def test_without_its_entry_a_format_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").touch()
    with pytest.raises(ValueError, match="unknown format") as error:
        corpus_files.find([str(tmp_path / "a.tsv")], None)
    for suffix in (*FORMATS, *COMPRESSIONS):
        assert suffix in str(error.value)


def test_format_that_is_not_compressible_is_not_found_compressed(tmp_path: Path) -> None:
    for suffix, format_ in FORMATS.items():
        for compression in COMPRESSIONS:
            found = corpus_files.format_of(f"a{suffix}{compression}")
            assert found == ((suffix, compression) if format_.compressible else None)


def test_every_suffix_is_documented() -> None:
    text = DOCS.read_text("utf-8")
    for suffix in (*FORMATS, *COMPRESSIONS):
        assert f"`{suffix}`" in text, f"{DOCS} does not name {suffix}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jsonl", 1), ("a.json.gz", 3), ("a.txt.zst", 4), ("a.parquet", 3), ("no corpus file", 1)],
)
def test_bytes_of_text_per_byte_of_a_file(name: str, expected: float) -> None:
    assert corpus_files.unpacked(name) == expected


def test_parse_functions_of_all_formats_can_be_sent_to_workers() -> None:
    import pickle

    for format_ in FORMATS.values():
        assert pickle.loads(pickle.dumps(format_.parse)) is format_.parse
    table = pa.record_batch({"text": ["a"], "id": ["b"]})
    assert list(FORMATS[".parquet"].parse(table, Fields("text", "id"))) == [(b"a", b"b", None)]
