from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import token_files

META = artifact.make_meta("tokens", {})


def made(lists: list[list[int]], dtype: type[np.unsignedinteger] = np.uint16) -> token_files.Documents:
    lengths = [len(x) for x in lists]
    return token_files.Documents(
        np.array([t for x in lists for t in x], dtype),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


documents = st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=6), max_size=5)


@settings(max_examples=30, deadline=None)
@given(st.lists(documents, min_size=1, max_size=4))
def test_groups_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "x.arrow"
    token_files.write(path, META, [made(g) for g in groups])
    assert token_files.read_meta(path)["n_groups"] == len(groups)
    for i, group in enumerate(groups):
        found = token_files.read(path, i)
        assert [
            found.values[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)
        ] == group
        assert found.n_tokens.tolist() == [len(d) - 1 for d in group]
    with pytest.raises(ValueError, match=f"Expected group {len(groups)} to exist"):
        token_files.read(path, len(groups))


@given(documents.filter(len), st.data())
def test_take(lists: list[list[int]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=6))
    taken = made(lists).take(np.array(rows, int))
    assert [taken.values[a:b].tolist() for a, b in zip(taken.offsets, taken.offsets[1:], strict=False)] == [
        lists[r] for r in rows
    ]


def test_values_are_memory_mapped(tmp_path: Path) -> None:
    token_files.write(tmp_path / "x.arrow", META, [made([[1, 2, 3]], np.uint32)])
    values = token_files.read(tmp_path / "x.arrow", 0).values
    assert values.dtype == np.uint32 and not values.flags.owndata and not values.flags.writeable


def test_foreign_or_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    token_files.write(path, META, [made([[1, 2, 3]])])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"x\.arrow: not a token file"):
        token_files.read(path, 0)


def test_dtype() -> None:
    assert token_files.dtype_for(65536) == np.uint16 and token_files.dtype_for(65537) == np.uint32
