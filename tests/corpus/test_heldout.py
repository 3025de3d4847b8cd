"""Which held-out documents are scored, choose settings and validate trainings."""

from pathlib import Path

import numpy as np
import pytest

import made_corpus
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import heldout, shard_files, token_files


def test_calibration_takes_its_share_by_id_and_seed_alone() -> None:
    ids = [f"doc-{i}" for i in range(1000)]
    mask_D = heldout.calibration_documents(ids, 0.3, 0)
    assert mask_D.dtype == bool and mask_D.sum() == 300
    shuffled = np.random.default_rng(0).permutation(1000)
    assert (heldout.calibration_documents([ids[i] for i in shuffled], 0.3, 0) == mask_D[shuffled]).all()
    assert 150 < (mask_D != heldout.calibration_documents(ids, 0.3, 1)).sum() < 600
    wider_D = heldout.calibration_documents(ids, 0.5, 0)
    assert (wider_D | ~mask_D).all()
    assert 50 < mask_D[:500].sum() < 250


@pytest.mark.parametrize(("n", "share", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (3, 0.99, 2), (10, 0.3, 3)])
def test_both_sides_have_a_document(n: int, share: float, expected: int) -> None:
    assert heldout.calibration_documents(map(str, range(n)), share, 0).sum() == expected


@pytest.mark.parametrize("ids", [[], ["a"]])
def test_one_document_cannot_be_split(ids: list[str]) -> None:
    with pytest.raises(ValueError, match=r"corpus\.eval: . held-out documents?\. Expected at least 2"):
        heldout.calibration_documents(ids, 0.5, 0)


@pytest.mark.parametrize("cut", [None, 7])
def test_documents_of_all_shards_in_order_and_cut(tmp_path: Path, cut: int | None) -> None:
    shards = made_corpus.write(tmp_path, [5], [4, 0, 3])
    found = list(heldout.documents(shards.parent, artifact.read_sealed(shards, "shards"), cut))
    assert [name for name, _ in found] == ["eval-00000"] * 4 + ["eval-00002"] * 3
    groups = [token_files.read_unverified(shards.with_name(f"eval-{i:05d}.arrow"), 0) for i in range(3)]
    joined = token_files.join(groups)
    for i, (_, document) in enumerate(found):
        whole = joined.values[joined.offsets[i] : joined.offsets[i + 1]]
        assert document[0] == made_corpus.SEPARATOR and len(whole) > 8
        assert np.array_equal(document, whole if cut is None else whole[: cut + 1])


def test_nothing_held_out(tmp_path: Path) -> None:
    shards = made_corpus.write(tmp_path, [5], [0])
    with pytest.raises(ValueError, match=r"manifest.json: no held-out documents. Expected at least one"):
        next(heldout.documents(shards.parent, artifact.read_sealed(shards, "shards"), None))


def test_validation_documents_are_limited_and_lie_among_those_of_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = made_corpus.write(tmp_path, [5], [30, 0, 20])
    manifest = artifact.read_sealed(shards, "shards")
    entries = shard_files.entries(shards, manifest, "eval")
    ids = [
        doc_id
        for entry in entries
        for doc_id in shard_files.attributes(shards.parent, entry, ["doc_id"])["doc_id"].to_pylist()
    ]

    def selected(share: float) -> set[str]:
        selection = heldout.select_validation(shards, manifest, share, 0)
        assert [len(part) for part in heldout.read_validation(shards, selection)] == [
            len(rows) for _, rows in selection
        ]
        return {f"{entry['name']}#{row}" for entry, rows in selection for row in rows}

    calibration = {ids[i] for i in np.flatnonzero(heldout.calibration_documents(ids, 0.3, 0))}
    assert len(selected(0.2)) == 10 and selected(0.2) < calibration
    assert selected(0.3) == calibration
    assert selected(0.009) == set()
    monkeypatch.setattr(heldout, "MAX_VALIDATION_DOCUMENTS", 4)
    assert len(selected(0.2)) == 4 and selected(0.2) < calibration


def test_one_held_out_document_validates_nothing(tmp_path: Path) -> None:
    shards = made_corpus.write(tmp_path, [5], [1])
    assert heldout.select_validation(shards, artifact.read_sealed(shards, "shards"), 0.9, 0) == []


def test_held_out_text_that_was_changed_validates_nothing_and_is_not_scored(tmp_path: Path) -> None:
    shards = made_corpus.write(tmp_path, [5], [30])
    manifest = artifact.read_sealed(shards, "shards")
    selection = heldout.select_validation(shards, manifest, 0.5, 0)
    made_corpus.write(tmp_path / "other", [5], [30], rng_seed=1)
    for suffix in (".arrow", ".parquet"):
        name = f"eval-00000{suffix}"
        shards.with_name(name).write_bytes((tmp_path / "other/shards" / name).read_bytes())
    with pytest.raises(ValueError, match=r"eval-00000\.arrow: group 0 is not the one"):
        heldout.read_validation(shards, selection)
    with pytest.raises(ValueError, match=r"eval-00000\.arrow: group 0 is not the one"):
        next(heldout.documents(shards.parent, manifest, None))


def test_validation_documents_are_written_in_a_group_for_each_cluster(tmp_path: Path) -> None:
    shards = made_corpus.write(tmp_path, [5], [30, 20])
    manifest = artifact.read_sealed(shards, "shards")
    documents = heldout.read_validation(shards, heldout.select_validation(shards, manifest, 0.5, 0))
    labels = [np.arange(len(part)) % 2 for part in documents]
    out = tmp_path / "assignments/manifest.json"
    identities = heldout.write_validation(out, documents, labels, 3, {"shards": "1"})
    joined, clusters = token_files.join(documents), np.concatenate(labels)
    for j, identity in enumerate(identities):
        expected = joined.take(np.flatnonzero(clusters == j))
        found = token_files.read(out.with_name(heldout.VALIDATION_FILE), j, identity)
        assert found.identity == identity == expected.identity
    assert len(identities) == 3 and len(expected) == 0, "the last cluster has none"
