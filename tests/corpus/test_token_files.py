"""Token files: groups come back as they were, each group is verified alone, and damage is one line."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import every_damage
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import token_files

META = artifact.make_meta("tokens", {"tokenizer": "1"})


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
    identities = token_files.write(path, META, [made(g) for g in groups])
    assert identities == [made(g).identity for g in groups]
    assert token_files.read_identities(path, artifact.fingerprint(identities)) == identities
    for i, group in enumerate(groups):
        found = token_files.read(path, i, identities[i])
        assert [
            found.values[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)
        ] == group
        assert found.n_tokens.tolist() == [len(d) - 1 for d in group]
    with pytest.raises(ValueError, match=r"x\.arrow: damaged"):
        token_files.read(path, len(groups), identities[0])


@settings(deadline=None)
@given(documents.filter(len), st.data())
def test_take(lists: list[list[int]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=6))
    taken = made(lists).take(np.array(rows, int))
    assert [taken.values[a:b].tolist() for a, b in zip(taken.offsets, taken.offsets[1:], strict=False)] == [
        lists[r] for r in rows
    ]


def test_record_says_what_the_file_was_made_from_and_what_its_groups_are(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    identities = token_files.write(path, META, [made([[1, 2]]), made([])])
    metadata = pa.ipc.open_file(path).schema.metadata
    assert artifact.from_compact(metadata[b"cbtm"]) == {**META, "identity_groups": identities}


def test_values_are_memory_mapped(tmp_path: Path) -> None:
    (identity,) = token_files.write(tmp_path / "x.arrow", META, [made([[1, 2, 3]], np.uint32)])
    values = token_files.read(tmp_path / "x.arrow", 0, identity).values
    assert values.dtype == np.uint32 and not values.flags.owndata and not values.flags.writeable


def test_dtype() -> None:
    assert token_files.dtype_for(65536) == np.uint16 and token_files.dtype_for(65537) == np.uint32


# identities


@settings(deadline=None)
@given(documents, documents)
def test_identity_is_that_of_the_documents(one: list[list[int]], other: list[list[int]]) -> None:
    assert (made(one).identity == made(other).identity) == (one == other)
    joined = token_files.join([made(one), made(other)])
    assert joined.identity == made(one + other).identity
    assert joined.take(np.arange(len(one))).identity == made(one).identity


@pytest.mark.parametrize(
    "other",
    [
        made([[1, 2], [3, 4]]),
        made([[1, 2, 3, 5]]),
        made([[1, 2, 4, 3]]),
        made([[1, 2, 3]]),
        made([[1, 2, 3, 4], []]),
        made([[1, 2, 3, 4]], np.uint32),
        made([[1 | 2 << 16, 3 | 4 << 16]], np.uint32),  # the same bytes
    ],
)
def test_other_documents_have_another_identity(other: token_files.Documents) -> None:
    assert made([[1, 2, 3, 4]]).identity != other.identity


def test_file_with_other_groups_than_its_manifest_names_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "x.arrow", tmp_path / "y.arrow"
    groups = [made([[1, 2], [1]]), made([[3]])]
    identities = token_files.write(path, META, groups)
    token_files.write(other, META, groups[::-1])
    with pytest.raises(
        ValueError, match=r"y\.arrow: not the file that its manifest speaks of.*manifest\.json"
    ):
        token_files.read_identities(other, artifact.fingerprint(identities))
    with pytest.raises(ValueError, match=r"y\.arrow: group 0 is not the one .*Expected identity"):
        token_files.read(other, 0, identities[0])


@pytest.mark.parametrize("in_place", [True, False])
def test_file_that_is_changed_after_it_was_read_is_refused(tmp_path: Path, in_place: bool) -> None:
    path, other = tmp_path / "x.arrow", tmp_path / "y.arrow"
    (identity,) = token_files.write(path, META, [made([[1, 2]])])
    token_files.read(path, 0, identity)
    token_files.write(other, META, [made([[1, 3]])])
    if in_place:
        path.write_bytes(other.read_bytes())
        os.utime(path, ns=(1, 1))
    else:
        os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
        other.replace(path)
    with pytest.raises(ValueError, match=r"x\.arrow: group 0 is not the one"):
        token_files.read(path, 0, identity)


def test_group_is_hashed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identities = token_files.write(tmp_path / "x.arrow", META, [made([[1, 2]]), made([[3]])])
    hashed: list[int] = []
    new_hash = artifact.new_hash
    monkeypatch.setattr(artifact, "new_hash", lambda: hashed.append(1) or new_hash())
    for _ in range(3):
        token_files.read(tmp_path / "x.arrow", 0, identities[0])
    assert len(hashed) == 1
    token_files.read(tmp_path / "x.arrow", 1, identities[1])
    assert len(hashed) == 2


# damage


def test_damage_to_one_group_does_not_stop_the_readers_of_another(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    groups = [made([[7, 8, 9] * 100]), made([[40_000] * 100, [5]]), made([[9, 8, 7] * 100])]
    identities = token_files.write(path, META, groups)
    content = bytearray(path.read_bytes())
    content[content.index(np.full(100, 40_000, np.uint16).tobytes()) + 50] ^= 1
    path.write_bytes(content)
    assert token_files.read_identities(path, artifact.fingerprint(identities)) == identities
    for i in (0, 2):
        assert np.array_equal(token_files.read(path, i, identities[i]).values, groups[i].values)
    with pytest.raises(ValueError, match=r"x\.arrow: group 1 is not the one that its manifest speaks of"):
        token_files.read(path, 1, identities[1])


def test_every_flipped_bit_and_every_cut_is_refused_or_gives_the_right_tokens(tmp_path: Path) -> None:
    """Damage may lie where a group's reader does not look: in another group, or between the buffers."""
    path = tmp_path / "x.arrow"
    groups = [made([[0, 1, 2], [0, 3]]), made([[0, 9], [0], [0, 7, 7]])]
    identities = token_files.write(path, META, groups)

    def tokens(group: int) -> str:
        token_files._identity.cache_clear()  # damage may come so fast that the file's time is the same
        found = token_files.read(path, group, identities[group])
        assert np.array_equal(found.values, groups[group].values)
        assert np.array_equal(found.offsets, groups[group].offsets)
        return "right"

    def record() -> str:
        assert token_files.read_identities(path, artifact.fingerprint(identities)) == identities
        return "right"

    def refused_or(read: str, damage: str) -> str:
        try:
            return {"record": record, "0": lambda: tokens(0), "1": lambda: tokens(1)}[read]()
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and ". Expected " in str(error), damage
            return "refused"

    ends = Counter()
    for damage in every_damage.damages(path):
        ends[tuple(refused_or(read, damage) for read in ("record", "0", "1"))] += 1
    for end in (("right", "refused", "right"), ("right", "right", "refused"), ("refused",) * 3):
        assert ends[end] > 300
    assert tokens(0) == tokens(1) == record() == "right"


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"no token file" * 100])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.arrow"
    path.write_bytes(content)
    for read in (lambda: token_files.read(path, 0, "1"), lambda: token_files.read_identities(path, "1")):
        with pytest.raises(ValueError, match=r"x\.arrow: damaged .*Expected a token file\. Make it again"):
            read()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([[1]], pa.list_(pa.uint16())),
        pa.array([[1]], pa.large_list(pa.int16())),
        pa.array([[1], None], pa.large_list(pa.uint16())),
        pa.array([[1, None]], pa.large_list(pa.uint16())),
    ],
)
def test_arrow_file_of_something_else(tmp_path: Path, column: pa.Array) -> None:
    path, batch = tmp_path / "x.arrow", pa.record_batch({"tokens": column})
    with pa.ipc.new_file(path, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ValueError, match=r"x\.arrow: damaged .*no lists of tokens"):
        token_files.read(path, 0, "1")
    with pytest.raises(ValueError, match=r"x\.arrow: damaged"):
        token_files.read_identities(path, "1")


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    for read in (lambda: token_files.read(path, 0, "1"), lambda: token_files.read_identities(path, "1")):
        with pytest.raises(FileNotFoundError, match=r"x\.arrow"):
            read()


def test_reading_tokens_does_not_import_pandas(tmp_path: Path) -> None:
    """It takes a quarter of a second, in every training and scoring."""
    path = tmp_path / "x.arrow"
    identities = token_files.write(path, META, [made([[1, 2], [3]])])
    code = "import sys\nfrom cbtm_pipeline.corpus import token_files\n"
    code += f"print(*token_files.read({str(path)!r}, 0, {identities[0]!r}).values)\n"
    code += "print('pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2", "3", "False"]
