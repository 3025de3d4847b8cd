"""Later rules get the columns and tokens that the manifest of the shards speaks of, or one line."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import every_damage
import made_corpus
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import shard_files


def identity(*chunks: pa.Array) -> str:
    """The identity of a column in these chunks."""
    return made_corpus.column_identity(pa.chunked_array(chunks))


def pieces(values: list, cuts: list[int], dtype: pa.DataType) -> list[pa.Array]:
    """A column cut at these places into chunks. Every second one is a slice of a longer array."""
    ends = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    whole = pa.array(values, dtype)
    return [
        whole.slice(a, b - a) if i % 2 else pa.array(values[a:b], dtype)
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]


STRINGS = st.lists(st.text(max_size=4), max_size=8)
CUTS = st.lists(st.integers(0, 8), max_size=4)


@settings(deadline=None)
@given(STRINGS, CUTS, CUTS)
def test_identity_of_a_column_does_not_depend_on_its_chunks(
    values: list[str], cuts: list[int], others: list[int]
) -> None:
    assert identity(*pieces(values, cuts, pa.string())) == identity(*pieces(values, others, pa.string()))
    lengths = [len(value) for value in values]
    assert identity(*pieces(lengths, cuts, pa.int32())) == identity(pa.array(lengths, pa.int32()))


@settings(deadline=None)
@given(STRINGS, STRINGS)
def test_identity_of_a_column_is_that_of_its_rows(one: list[str], other: list[str]) -> None:
    columns = pa.array(one, pa.string()), pa.array(other, pa.string())
    assert (identity(columns[0]) == identity(columns[1])) == (one == other)


def test_text_that_moves_to_another_row_changes_the_identity() -> None:
    columns = [["ab", "c"], ["a", "bc"], ["abc", ""], ["", "abc"], ["abc"], ["c", "ab"]]
    assert len({identity(pa.array(column)) for column in columns}) == len(columns)


def test_identity_can_be_asked_for_while_rows_come() -> None:
    digest = shard_files.ColumnHash()
    found = []
    for value in ("a", "b"):
        digest.add(pa.chunked_array([pa.array([value])]))
        found += [digest.hexdigest(), digest.hexdigest()]
    assert found == [identity(pa.array(["a"]))] * 2 + [identity(pa.array(["a", "b"]))] * 2


def test_null_in_a_column_is_refused() -> None:
    for column in (pa.array(["a", None]), pa.array([1, None])):
        with pytest.raises(ValueError, match="a null"):
            identity(column)


# shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return made_corpus.write(tmp_path, [40, 0], [3])


def train(shards: Path) -> list[shard_files.Entry]:
    return shard_files.entries(shards, artifact.read_sealed(shards, "shards"), "train")


def test_columns_come_as_they_were_written(shards: Path) -> None:
    first, empty = train(shards)
    found = shard_files.attributes(shards.parent, first, ["n_tokens", "doc_id"])
    assert found.column_names == ["n_tokens", "doc_id"]
    assert found["doc_id"].to_pylist() == [f"train-00000#{i}" for i in range(40)]
    assert found["n_tokens"].to_pylist() == shard_files.documents(shards.parent, first).n_tokens.tolist()
    nothing = shard_files.attributes(shards.parent, empty, ["text", "n_bytes"])
    assert nothing.num_rows == 0 and nothing.schema.types == [pa.string(), pa.int64()]


@settings(max_examples=10, deadline=None)
@given(n_rows=st.integers(1, 50))
def test_columns_come_in_batches(tmp_path_factory: pytest.TempPathFactory, n_rows: int) -> None:
    shards = made_corpus.write(tmp_path_factory.mktemp("b"), [40])
    (entry,) = train(shards)
    found = list(shard_files.batches(shards.parent, entry, ["text"], n_rows))
    assert max(len(batch) for batch in found) == min(n_rows, 40)
    assert pa.concat_tables(found).equals(shard_files.attributes(shards.parent, entry, ["text"]))


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
    """Write a shard's Parquet file again, valid and with other content."""
    pq.write_table(change(pq.read_table(path)), path, **options)


def test_another_layout_of_the_same_rows_is_accepted(shards: Path) -> None:
    first, _ = train(shards)
    columns = ["doc_id", "text", "n_tokens", "n_bytes"]
    before = shard_files.attributes(shards.parent, first, columns)
    rewrite(
        shards.with_name("train-00000.parquet"),
        lambda table: table.select(columns[::-1]),
        row_group_size=7,
        compression="gzip",
        data_page_size=100,
    )
    assert shard_files.attributes(shards.parent, first, columns).equals(before)


def another_id(table: pa.Table) -> pa.Table:
    ids = [f"{name}!" if i == 7 else name for i, name in enumerate(table["doc_id"].to_pylist())]
    return table.set_column(0, "doc_id", [ids])


def other_order(table: pa.Table) -> pa.Table:
    return table.take([1, 0, *range(2, 40)])


def row_less(table: pa.Table) -> pa.Table:
    return table.slice(1)


def row_twice(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table.slice(39)])


@pytest.mark.parametrize("change", [another_id, other_order, row_less, row_twice])
def test_changed_ids_in_a_valid_file_are_refused(
    shards: Path, change: Callable[[pa.Table], pa.Table]
) -> None:
    first, _ = train(shards)
    rewrite(shards.with_name("train-00000.parquet"), change)
    with pytest.raises(
        ValueError,
        match=r"train-00000\.parquet: its column doc_id is not the one that its manifest speaks of",
    ) as error:
        shard_files.attributes(shards.parent, first, ["doc_id"])
    assert f"--force {shards}" in str(error.value)


def test_only_the_columns_that_are_read_count(shards: Path) -> None:
    first, _ = train(shards)
    rewrite(shards.with_name("train-00000.parquet"), another_id)
    assert len(shard_files.attributes(shards.parent, first, ["text", "n_tokens", "n_bytes"])) == 40


def other_type(table: pa.Table) -> pa.Table:
    return table.set_column(0, "doc_id", table["doc_id"].cast(pa.large_string()))


def null(table: pa.Table) -> pa.Table:
    return table.set_column(0, "doc_id", [[None, *table["doc_id"].to_pylist()[1:]]])


def no_column(table: pa.Table) -> pa.Table:
    return table.drop_columns("doc_id")


@pytest.mark.parametrize("change", [other_type, null, no_column])
def test_valid_file_with_another_schema_is_refused(
    shards: Path, change: Callable[[pa.Table], pa.Table]
) -> None:
    first, _ = train(shards)
    rewrite(shards.with_name("train-00000.parquet"), change)
    with pytest.raises(
        ValueError, match=r"train-00000\.parquet: unreadable .*Expected the columns doc_id, text"
    ):
        shard_files.attributes(shards.parent, first, ["doc_id", "text"])


def test_file_that_is_not_there_is_named(shards: Path) -> None:
    first, _ = train(shards)
    shards.with_name("train-00000.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00000\.parquet"):
        shard_files.attributes(shards.parent, first, ["doc_id"])


def test_damage_of_a_parquet_file_is_refused_or_gives_the_right_rows(tmp_path: Path) -> None:
    shards = made_corpus.write(tmp_path, [3])
    (entry,) = train(shards)
    path, columns = shards.with_name("train-00000.parquet"), ["doc_id", "n_tokens"]
    right = shard_files.attributes(shards.parent, entry, columns).to_pydict()
    n_refused = 0
    for i, damage in enumerate(every_damage.damages(path)):
        if i % 5:  # some bits of each byte
            continue
        try:
            found = shard_files.attributes(shards.parent, entry, columns).to_pydict()
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "Expected " in str(error), damage
            n_refused += 1
        else:
            assert found == right, damage
    assert n_refused > 1000
    assert shard_files.attributes(shards.parent, entry, columns).to_pydict() == right


def test_splits_and_their_identities(tmp_path: Path) -> None:
    entries = [{"name": "a", "n_documents": 1}, {"name": "b", "n_documents": 2}]
    found = {
        shard_files.identity_of(entries, {"vocab_size": 5}),
        shard_files.identity_of(entries[::-1], {"vocab_size": 5}),
        shard_files.identity_of(entries[:1], {"vocab_size": 5}),
        shard_files.identity_of(entries, {"vocab_size": 6}),
    }
    assert len(found) == 4
    shards = made_corpus.write(tmp_path, [0], [3])
    with pytest.raises(ValueError, match=r"manifest\.json: no train documents. Expected at least one"):
        train(shards)


def test_sample_is_spread_over_all_shards() -> None:
    entries = [{"name": str(i), "n_documents": n} for i, n in enumerate([10, 0, 300, 90])]
    drawn = list(shard_files.sample(entries, 40, 3))
    assert [entry["name"] for entry, _ in drawn] == ["0", "1", "2", "3"]
    assert sum(len(rows) for _, rows in drawn) == 40
    for entry, rows in drawn:
        assert np.all(np.diff(rows) > 0) and np.all((rows >= 0) & (rows < entry["n_documents"]))
    assert 20 < len(drawn[2][1]) < 40
    everything = [rows.tolist() for _, rows in shard_files.sample(entries, 400, 3)]
    assert everything == [list(range(n)) for n in (10, 0, 300, 90)]


def test_tokenizer_that_is_not_that_of_the_shards(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer/tokenizer.json"
    assert shard_files.tokenizer(path, shards).get_vocab_size() == len(made_corpus.words(4))
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"manifest\.json: made from another tokenizer"):
        shard_files.tokenizer(path, shards)
