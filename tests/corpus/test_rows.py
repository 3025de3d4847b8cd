import datetime
import json
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.corpus import parquet
from cbtm_pipeline.corpus import rows as corpus_rows
from cbtm_pipeline.corpus.records import Fields, Parse, Part
from cbtm_pipeline.corpus.rows import BadRow, Document


def read(
    *records: bytes,
    parse: Parse = corpus_rows.parse_json,
    first: int = 1,
    text_field: str = "text",
    id_field: str = "id",
    label_field: str | None = None,
) -> list[Document | BadRow]:
    fields = Fields(text_field, id_field, label_field)
    return list(corpus_rows.read(Part(7, "a.jsonl", first, parse, list(records), 0, 0), fields))


def one(record: bytes, **options: Any) -> Any:
    (row,) = read(record, **options)
    return row


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"text": "cut', "broken JSON: "),
        (b"plain words", "broken JSON: "),
        (b'{"text": "a"} {"text": "b"}', "broken JSON: "),
        (b'{"text": "raw \0 NUL"}', "broken JSON: "),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"e}", "broken JSON: "),
        (b'{"text": ' + b"[" * 100_000, "broken JSON: "),
        (b"[1, 2]", "not an object: a list"),
        (b'"text"', "not an object: a string"),
        (b"null", "not an object: null"),
        (b"17", "not an object: a number"),
        (b"{}", "no text field: text is not among "),
        (b'{"body": "x", "id": 1}', "no text field: text is not among body, id"),
        (b'{"text": null}', "text is not a string: null"),
        (b'{"text": 5}', "text is not a string: a number"),
        (b'{"text": ["a"]}', "text is not a string: a list"),
        (b'{"text": {"a": 1}}', "text is not a string: an object"),
        (b'{"text": true}', "text is not a string: a boolean"),
        (b'{"text": "caf\xe9"}', "invalid UTF-8: byte 0xe9 at 13 of the row"),
        (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8: byte 0xed at 10 of the row"),
        (b'{"text": "a\\ud83d b"}', "lone surrogate: U+D83D at character 1 of the text"),
        (b'{"text": "a\\ude00"}', "lone surrogate: U+DE00 at character 1 of the text"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": " \\n\\t\\u00a0\\u3000 "}', "empty text"),
        (b'{"text": "a", "id": {"$oid": 1}}', "id is neither a string nor a number: an object"),
        (b'{"text": "a", "id": [1]}', "id is neither a string nor a number: a list"),
        (b'{"text": "a", "id": false}', "id is neither a string nor a number: a boolean"),
        (b'{"text": "a", "id": "\\ud83d"}', "lone surrogate: U+D83D at character 0 of the id"),
    ],
)
def test_bad_rows_say_why(record: bytes, reason: str) -> None:
    row = one(record, first=41)
    assert isinstance(row, BadRow)
    assert (row.file, row.line) == (7, 41)
    assert row.reason.startswith(reason)
    assert reason.endswith(": ") or row.reason == reason


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (b'{"text": "a\\u0000b"}', "a\0b"),
        (b'{"text": "a\\r\\nb\\rc"}', "a\r\nb\rc"),
        (b'{"text": " a "}\r', " a "),
        (b'{"text": "\\ud83d\\ude00 \xc3\xa9"}', "😀 é"),
        (b'{"text": "a", "score": NaN, "other": "\\ud800", "big": 1e999}', "a"),
        (b'{"text": "a", "text": "b"}', "b"),
        (b'{"text": "\\ufeffa"}', "\ufeffa"),
    ],
)
def test_text_is_kept_character_for_character(record: bytes, text: str) -> None:
    assert one(record).text.decode() == text


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ('"x"', "x"),
        ('"x/é 1"', "x/é 1"),
        ("5", "5"),
        ("-0.10", "-0.10"),
        ("1e3", "1e3"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("null", "a.jsonl:3"),
        ("NaN", "a.jsonl:3"),
        ('""', "a.jsonl:3"),
    ],
)
def test_ids(found: str, expected: str) -> None:
    assert one(f'{{"text": "a", "id": {found}}}'.encode(), first=3).id == expected


def test_rows_without_id_are_named_by_file_and_row() -> None:
    rows = read(b'{"text": "a"}', b"", b" \r", b"nonsense", b'{"text": "b"}', first=10)
    assert [(row.line, getattr(row, "id", None)) for row in rows] == [
        (10, "a.jsonl:10"),
        (13, None),
        (14, "a.jsonl:14"),
    ]


def test_fields_may_lie_within_objects_or_have_dots_in_their_name() -> None:
    row = {"a": {"b": {"c": "deep"}, "id": 1}, "a.id": "dotted"}
    assert one(json.dumps(row).encode(), text_field="a.b.c", id_field="a.id") == Document(
        7, 1, "dotted", b"deep"
    )
    assert one(b'{"a": "no object"}', text_field="a.b").reason == "no text field: a.b is not among a"
    assert one(b'{"a.b": "flat", "a": {"b": "deep"}}', text_field="a.b").text == b"flat"


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ('"news"', "news"),
        ('" a b "', " a b "),
        ("7", "7"),
        ("0.10", "0.10"),
        ("true", "true"),
        ("null", ""),
        ('""', ""),
        ('" \\t"', ""),
    ],
)
def test_a_label_is_text_or_a_number_or_empty(value: str, label: str) -> None:
    assert one(f'{{"text": "a", "m": {{"x": {value}}}}}'.encode(), label_field="m.x").label == label


def test_a_row_without_label_has_an_empty_one_and_a_strange_label_is_a_bad_row() -> None:
    assert one(b'{"text": "a"}', label_field="x").label == ""
    assert one(b"a", parse=corpus_rows.parse_text, label_field="x").label == ""
    assert one(b'{"text": "a", "x": ["b"]}', label_field="x").reason.startswith(corpus_rows.NO_LABEL)
    assert one(b'{"text": "a", "x": ["b"]}').label == "", "nobody reads it"
    assert one(b'{"text": "a", "x": "\\ud800"}', label_field="x").reason.endswith("of the label")


def test_text_files_get_their_line_ends_normalised() -> None:
    assert one(b"a\r\nb\rc\n", parse=corpus_rows.parse_text) == Document(7, 1, "a.jsonl:1", b"a\nb\nc\n")
    assert one(b"caf\xe9", parse=corpus_rows.parse_text).reason == "invalid UTF-8: byte 0xe9 at 3 of the text"
    assert [one(text, parse=corpus_rows.parse_text).reason for text in (b"", b" \r\n")] == [
        "empty text",
        "empty text",
    ]
    assert one(b"nul \0 nul", parse=corpus_rows.parse_text).text == b"nul \0 nul"


def test_break_is_one_bad_row() -> None:
    assert one(b"damaged file: x", parse=corpus_rows.parse_damage, first=12) == BadRow(
        7, 12, "damaged file: x"
    )


def table(**columns: Any) -> list[Any]:
    part = Part(7, "a.parquet", 5, parquet.parse, pa.record_batch(columns), 0, 0)
    return list(corpus_rows.read(part, Fields("ignored", "ignored", "ignored")))


@pytest.mark.parametrize(
    "type_",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
)
def test_table_rows_of_every_string_type(type_: pa.DataType) -> None:
    plain = pa.array(["é", None, " "])
    text = plain.dictionary_encode() if pa.types.is_dictionary(type_) else plain.cast(type_)
    good, null, empty = table(text=text, id=pa.array(["é"] * 3))
    assert good == Document(7, 5, "é", "é".encode())
    assert null == BadRow(7, 6, "text is not a string: null")
    assert empty == BadRow(7, 7, "empty text")


def test_table_rows_of_other_types() -> None:
    assert {row.reason for row in table(text=pa.array([1, 2]))} == {"text is not a string: a number"}
    assert {row.reason for row in table(text=pa.array([["a"], ["b"]]))} == {"text is not a string: a list"}
    assert [row.id for row in table(text=pa.array(["a"] * 3), id=pa.array([1, None, 3]))] == [
        "1",
        "a.parquet:6",
        "3",
    ]
    assert [
        row.id for row in table(text=pa.array(["a"] * 2), id=pa.array([Decimal("1.50"), Decimal("2")]))
    ] == ["1.50", "2.00"]
    assert [row.id for row in table(text=pa.array(["a"] * 2), id=pa.array([1.5, float("nan")]))] == [
        "1.5",
        "a.parquet:6",
    ]
    (dated,) = table(text=pa.array(["a"]), id=pa.array([datetime.date(2020, 1, 1)]))
    assert dated.id == "2020-01-01"


def test_table_with_invalid_utf8() -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ab", b"\xff"], pa.binary()).buffers())
    assert [getattr(row, "reason", None) for row in table(text=bad)] == [
        None,
        "invalid UTF-8: byte 0xff at 0 of the text",
    ]
    assert [getattr(row, "reason", None) for row in table(text=pa.array(["x", "y"]), id=bad)] == [
        None,
        "invalid UTF-8: byte 0xff at 0 of the id",
    ]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()))
def test_no_record_is_dropped_or_raises(record: bytes) -> None:
    rows = read(record)
    assert len(rows) == (1 if record.strip() else 0)
    for row in rows:
        if isinstance(row, Document):
            assert row.text.decode().strip()


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1))
def test_json_text_survives_to_the_character(text: str) -> None:
    row = one(json.dumps({"text": text}).encode())
    assert isinstance(row, BadRow) if not text.strip() else row.text.decode() == text


def test_uniform_is_uniform_and_the_same_for_equal_texts() -> None:
    numbers = [corpus_rows.uniform(corpus_rows.text_hash(b"text %d" % i)) for i in range(20_000)]
    assert min(numbers) >= 0
    assert max(numbers) < 1
    for share in (0.01, 0.15, 0.5, 0.9):
        # five standard deviations of a binomial
        assert (
            abs(sum(u < share for u in numbers) / len(numbers) - share)
            < 5 * (share * (1 - share) / len(numbers)) ** 0.5
        )
    assert corpus_rows.uniform(b"\xff" * 16) < 1
    assert numbers[5] == corpus_rows.uniform(corpus_rows.text_hash(b"text 5"))


def test_without_an_id_field_documents_are_named_by_their_rows() -> None:
    found = read(b'{"text": "a", "id": 3, "": "x"}', b'{"text": "b", "id": [1], "": {}}', id_field="")
    assert found == [Document(7, 1, "a.jsonl:1", b"a"), Document(7, 2, "a.jsonl:2", b"b")]
