import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import every_damage
from cbtm_pipeline.corpus import blocks as corpus_blocks
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import records as corpus_records
from cbtm_pipeline.corpus import rows as corpus_rows
from cbtm_pipeline.corpus import stream
from cbtm_pipeline.corpus.records import Fields
from cbtm_pipeline.corpus.stream import Stream

FIELDS = Fields("text", "id")

PLAIN = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}


def parts(
    path: Path,
    block_bytes: int = 1 << 20,
    txt_documents: Any = "file",
    fields: Fields = FIELDS,
) -> list[Any]:
    return list(corpus_blocks.parts(corpus_files.name([path]), block_bytes, fields, txt_documents))


def records(path: Path, **options: Any) -> list[bytes]:
    found = parts(path, **options)
    assert sum(part.n_read for part in found) <= path.stat().st_size
    first = 1
    for part in found:
        assert part.first == first
        first += len(part.records)
    return [record for part in found for record in part.records]


@pytest.fixture(params=[5, 64, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read few bytes at a time, so that every record lies on the edge of a read."""
    monkeypatch.setattr(corpus_blocks, "_CHUNK_BYTES", request.param)
    monkeypatch.setattr(stream, "READ_BYTES", min(request.param, 4096))


@pytest.mark.parametrize("compression", PLAIN)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n\n", [b"", b""]),
        (b"one\n\nthree", [b"one", b"", b"three"]),
        (b"one\r\ntwo\r\n", [b"one\r", b"two\r"]),
        (b"\xef\xbb\xbfone\n" + b"two" * 100 + b"\n", [b"one", b"two" * 100]),
        (b"".join(b"%d\n" % i for i in range(3000)), [b"%d" % i for i in range(3000)]),
    ],
)
def test_lines(tmp_path: Path, chunk: None, compression: str, content: bytes, expected: list[bytes]) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(PLAIN[compression](content))
    assert records(path) == expected


@pytest.mark.parametrize("content", [b"{}\n{}\n", b"  \n{}\n{}", b"\xef\xbb\xbf{}\n{}"])
def test_json_file_of_lines(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert [r.strip() for r in records(tmp_path / "a.json") if r.strip()] == [b"{}", b"{}"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\[]{},\n é😀'),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='ab"\\]}'), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(VALUES, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii_=st.booleans(),
    size=st.integers(1, 40),
)
def test_array_is_cut_where_json_would_cut_it(
    values: list[Any], indent: int | None, ascii_: bool, size: int
) -> None:
    text = ("\n " + json.dumps(values, indent=indent, ensure_ascii=ascii_) + " \n").encode()
    source = stream.Stream(Path("a.json"), None, None, size)  # pyright: ignore[reportArgumentType]
    chunks = iter([text[i : i + size] for i in range(0, len(text), size)])
    found = [element for elements in corpus_records.lines_or_elements(chunks, source) for element in elements]
    assert [json.loads(element) for element in found if element.strip()] == values


def test_array_with_defects_inside_keeps_its_other_elements(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, {"text": nonsense}, {"text" "c"},, "d"]')
    assert [r.strip() for r in records(tmp_path / "a.json")] == [
        b'{"text": "a"}',
        b'{"text": nonsense}',
        b'{"text" "c"}',
        b"",
        b'"d"',
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"a": 2}', "element 2 of the JSON array has no end"),
        (b'[{"a": "x}, {}]', "element 1 of the JSON array has no end"),
        (b"[{}] [{}]", "more data after the end"),
        (b"[{}]" + b" " * 100 + b"x", "more data after the end"),
    ],
)
def test_array_without_end_or_with_more_behind_it_is_refused(
    tmp_path: Path, chunk: None, content: bytes, message: str
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        records(tmp_path / "a.json")


def test_long_element_of_an_array(tmp_path: Path) -> None:
    row = json.dumps({"text": 'long \\ " ] } text, ' * 200_000}).encode()
    (tmp_path / "a.json").write_bytes(b"[" + row + b"," + row + b"]")
    assert records(tmp_path / "a.json", block_bytes=1 << 16) == [row, row]


@pytest.mark.parametrize("compression", PLAIN)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b" \n\t\n", []),
        (b"a\nb\n\nc\n", [b"a\nb", b"c"]),
        (b"\n\na\r\nb\r\n \r\n\r\nc", [b"a\r\nb", b"c"]),
        (b"\xef\xbb\xbf\n" + b"word\n" * 500, [b"\n".join([b"word"] * 500)]),
    ],
)
def test_blocks_of_a_text_file(
    tmp_path: Path, chunk: None, compression: str, content: bytes, expected: list[bytes]
) -> None:
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(PLAIN[compression](content))
    assert records(path, txt_documents="block") == expected
    assert records(path) == [content.removeprefix(b"\xef\xbb\xbf")]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_frames_in_a_row_and_padding_are_read_through(tmp_path: Path, chunk: None, compression: str) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    compress = PLAIN[compression]
    empty = {".gz": b"\0" * 64, ".zst": b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"}[
        compression
    ]  # padding; a frame that is to be skipped
    frames = [compress(b"one\nt"), compress(b""), compress(b"wo\nthree\n")]
    path.write_bytes(
        (empty if compression == ".zst" else b"") + frames[0] + frames[1] + empty + frames[2] + empty
    )
    assert records(path) == [b"one", b"two", b"three"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_truncated_file_gives_what_came_before_and_says_so(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    rows = [json.dumps({"text": f"row {i} " + "x" * (i * 7 % 50)}).encode() for i in range(20_000)]
    content = {
        ".jsonl": b"\n".join(rows),
        ".json": b"[" + b",".join(rows) + b"]",
        ".txt": b"\n\n".join(rows),
    }[suffix]
    whole = PLAIN[compression](content)
    path = tmp_path / f"a{suffix}{compression}"
    longest = 0
    for size in (len(whole) // 3, len(whole) * 9 // 10, len(whole) - 1):
        path.write_bytes(whole[:size])
        *found, end = parts(path, txt_documents="block")
        read = [record for part in found for record in part.records]
        assert read == rows[: len(read)]
        assert (end.parse, end.first) == (corpus_rows.parse_damage, len(read) + 1)
        assert b"breaks off" in end.records[0]
        assert sum(part.n_read for part in (*found, end)) == size
        longest = len(read)
    assert longest > len(rows) * 0.9


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_damaged_file_gives_what_came_before_and_says_so(tmp_path: Path, compression: str) -> None:
    rows = [json.dumps({"text": f"row {i} " + "x" * (i * 7 % 50)}).encode() for i in range(20_000)]
    whole = bytearray(PLAIN[compression](b"\n".join(rows)))
    whole[-2] ^= 0xFF  # size or checksum at the end
    (tmp_path / f"a.jsonl{compression}").write_bytes(whole)
    *found, end = parts(tmp_path / f"a.jsonl{compression}")
    read = [record for part in found for record in part.records]
    assert len(read) > len(rows) * 0.8
    assert read == rows[: len(read)]
    assert re.match(rb"damaged file: .", end.records[0])


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_file_that_is_not_compressed_is_refused(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(ValueError, match=f"not {compression} data"):
        parts(path)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_compressed_file_that_was_cut_to_nothing_is_damaged(tmp_path: Path, compression: str) -> None:
    (tmp_path / f"a.jsonl{compression}").touch()
    (part,) = parts(tmp_path / f"a.jsonl{compression}")
    assert part.parse is corpus_rows.parse_damage


def test_truncated_text_file_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text that ends too early")[:-6])
    (part,) = parts(tmp_path / "a.txt.gz")
    assert (part.parse, part.first) == (corpus_rows.parse_damage, 1)


def rows_of(found: list[Any]) -> list[dict[str, Any]]:
    return [row for part in found for row in part.records.to_pylist()]


def test_parquet_in_small_batches_by_column(tmp_path: Path) -> None:
    table = pa.table(
        {
            "n": range(1000),
            "text": [f"text {i} " * 20 for i in range(1000)],
            "id": [str(i) for i in range(1000)],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    found = parts(tmp_path / "a.parquet", block_bytes=1 << 12)
    assert rows_of(found) == table.select(["text", "id"]).to_pylist()
    assert len(found) > 10
    assert [part.first for part in found] == [
        1 + sum(len(p.records) for p in found[:i]) for i in range(len(found))
    ]
    assert "id" not in parts(tmp_path / "a.parquet", fields=Fields("text", "other"))[0].records.schema.names


def test_parquet_fields_within_structs_and_with_dots(tmp_path: Path) -> None:
    inner = [{"body": {"text": "one"}, "key": 1}, None, {"body": None, "key": 3}]
    pq.write_table(pa.table({"doc": inner, "a.b": ["x", "y", "z"]}), tmp_path / "a.parquet")
    nested = parts(tmp_path / "a.parquet", fields=Fields("doc.body.text", "doc.key"))
    assert rows_of(nested) == [{"text": "one", "id": 1}, {"text": None, "id": None}, {"text": None, "id": 3}]
    assert rows_of(parts(tmp_path / "a.parquet", fields=Fields("a.b", "doc.none"))) == [
        {"text": "x"},
        {"text": "y"},
        {"text": "z"},
    ]


@pytest.mark.parametrize("field", ["text", "n.m", "doc.none"])
def test_parquet_without_the_column_names_those_it_has(tmp_path: Path, field: str) -> None:
    pq.write_table(pa.table({"n": [1], "body": ["x"], "doc": [{"a": 1}]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet: no column {field}.*n, body, doc"):
        parts(tmp_path / "a.parquet", fields=Fields(field, "id"))


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i} " * 20 for i in range(1000)]}), path, use_dictionary=False)
    whole = path.read_bytes()
    for damaged in (whole[:-50], whole[:200] + b"\xaa" * 200 + whole[400:], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet: unreadable"):
            parts(path)


def checksummed(path: Path, checksums: bool, **options: Any) -> bytes:
    """Write a Parquet file with `needle` in its text and `pin` in its ids; returns its bytes."""
    table = pa.table(
        {"text": ["hay"] * 500 + ["needle"] + ["hay"] * 500, "id": [f"pin {i}" for i in range(1001)]}
    )
    pq.write_table(
        table, path, write_page_checksum=checksums, compression="none", row_group_size=300, **options
    )
    return path.read_bytes()


@pytest.mark.parametrize("options", [{"use_dictionary": False}, {}, {"data_page_version": "2.0"}])
@pytest.mark.parametrize("word", [b"needle", b"pin 7"])
def test_parquet_page_that_does_not_fit_its_checksum_is_refused(
    tmp_path: Path, options: dict[str, Any], word: bytes
) -> None:
    """Valid Parquet, one letter of which is another than was written."""
    path = tmp_path / "a.parquet"
    whole = checksummed(path, True, **options)
    assert len(rows_of(parts(path))) == 1001
    path.write_bytes(whole.replace(word, word[:-1] + b"x"))
    with pytest.raises(ValueError, match=r"a\.parquet: unreadable .*CRC.* Expected Parquet\. Mend the file"):
        parts(path)


def test_parquet_pages_without_checksums_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(checksummed(path, False, use_dictionary=False).replace(b"needle", b"needlx"))
    assert rows_of(parts(path))[500] == {"text": "needlx", "id": "pin 500"}


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_damaged_parquet_with_checksums_is_refused_or_gives_the_right_rows(
    tmp_path: Path, compression: str
) -> None:
    """Above all, no row gets lost silently, which happens where a count of rows is damaged."""
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["one two", "three é", None, "four"], "n": [1, 2, 3, 4]})
    pq.write_table(table, path, write_page_checksum=True, compression=compression, row_group_size=3)

    def read() -> list[Any]:
        return [row for part in parts(path) for row in corpus_rows.read(part, FIELDS)]

    right, n_refused = read(), 0
    assert [row.line for row in right] == [1, 2, 3, 4]
    for i, damage in enumerate(every_damage.damages(path)):
        if i % 5:  # some bits of each byte
            continue
        try:
            found = read()
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), damage
            n_refused += 1
        else:
            assert found == right, damage
    assert n_refused > 500
    assert read() == right


def test_blocks_hold_whole_records_of_several_files(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:03d}.txt").write_bytes(b"x" * (1000 if i == 50 else 10))
    files = corpus_files.name(corpus_files.input_files([str(tmp_path)]))
    blocks = list(corpus_blocks.blocks(corpus_blocks.parts(files, 400, FIELDS, "file"), 400))
    sizes = [sum(part.n_bytes for part in block) for block in blocks]
    assert min(sizes[:-1]) >= 400
    assert max(sizes) < 400 + 1100
    assert [part.file for block in blocks for part in block] == list(range(100))
    assert len(blocks) > 10


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\r\r\n"])
@pytest.mark.usefixtures("chunk")
def test_blocks_of_a_text_file_with_any_line_ends(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(end.join([b"one", b"more", b"", b"two", b"", b"", b"three", b""]))
    (found,) = [
        [
            row.text
            for part in parts(tmp_path / "a.txt", txt_documents="block")
            for row in corpus_rows.read(part, FIELDS)
            if isinstance(row, corpus_rows.Document)
        ]
    ]
    assert [text.replace(b"\n\n", b"\n").strip() for text in found] == [b"one\nmore", b"two", b"three"]


@pytest.mark.usefixtures("chunk")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([b"a", b"b", b"\r", b"\n", b"\r\n", b"\r\r\n"]), max_size=20))
def test_lines_do_not_depend_on_where_a_read_ends(pieces: list[bytes]) -> None:
    content = b"".join(pieces)
    whole = re.sub(rb"\r+(?!\r|\n)", lambda found: b"\n" * len(found[0]), content).split(b"\n")
    for size in (1, 2, 3, 100):
        chunks = (content[i : i + size] for i in range(0, len(content), size))
        stream = Stream(Path("a"), io.BufferedReader(io.BytesIO()), None, 1)  # it is named, and not read
        found = [line for some in corpus_records.lines(chunks, stream) for line in some]
        assert found == (whole if whole[-1] else whole[:-1])


def test_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n" * (1 << 20))
    found = corpus_blocks.parts(corpus_files.name([path]), 1 << 16, FIELDS, "file")
    next(found)
    path.write_bytes(b"one\n")
    with pytest.raises(ValueError, match="became shorter while it was read"):
        list(found)
