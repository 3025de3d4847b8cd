from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.corpus import repeated_ids

SHARDS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), max_size=6)


@settings(max_examples=60, deadline=None)
@given(shards=SHARDS, range_documents=st.sampled_from([1, 3, 1000]))
def test_every_document_whose_id_came_before_is_found(shards: list[list[int]], range_documents: int) -> None:
    position, seen, expected = 0, {}, {}
    with TemporaryDirectory() as folder:
        paths = []
        for i, ids in enumerate(shards):
            files, lines = [], []
            for row, name in enumerate(ids):
                file, line = divmod(position, 3)
                position += 2
                files.append(file)
                lines.append(line)
                if name in seen:
                    expected[file, line] = (i, row, seen[name])
                seen.setdefault(name, (file, line))
            paths.append(Path(folder) / f"{i}.npy")
            repeated_ids.write(paths[-1], [f"id {name}" for name in ids], files, lines)
        found = {}
        for shard, again, first in repeated_ids.find(paths, range_documents):
            for i in range(len(shard)):
                (row,) = repeated_ids.rows_of(paths[shard[i]], again[i : i + 1])
                where = int(again[i]["file"]), int(again[i]["line"])
                assert where not in found
                found[where] = (int(shard[i]), int(row), (int(first[i]["file"]), int(first[i]["line"])))
    assert found == expected
