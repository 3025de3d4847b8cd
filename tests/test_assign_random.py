"""Random clusters: dealt evenly, by id and seed alone, and written like those of `assign`."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import made_corpus
from cbtm_pipeline import assign_random
from cbtm_pipeline import config as config_module
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import heldout, token_files


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 50), max_size=30), max_size=4), st.integers(1, 7), st.integers(-5, 5))
def test_dealt_clusters_are_equal_in_documents(shards: list[list[int]], k: int, rng_seed: int) -> None:
    n_documents_K, n_tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)
    counted_K, tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)
    for s, sizes in enumerate(shards):
        n_tokens_N = np.array(sizes, np.int64)
        labels_N = assign_random.deal(
            [f"{s}-{i}" for i in range(len(sizes))], n_tokens_N, n_documents_K, n_tokens_K, rng_seed
        )
        counted_K += np.bincount(labels_N, minlength=k)
        tokens_K += np.bincount(labels_N, n_tokens_N, k).astype(np.int64)
    assert np.array_equal(counted_K, n_documents_K) and np.array_equal(tokens_K, n_tokens_K)
    assert np.ptp(counted_K) <= 1
    assert np.ptp(tokens_K) <= 2 * 50 * max(1, len(shards))


def test_dealt_clusters_are_equal_in_tokens_although_documents_are_not() -> None:
    n_tokens_N = (np.random.default_rng(0).lognormal(sigma=1.5, size=4000) * 100).astype(np.int64)
    n_tokens_K = np.zeros(4, np.int64)
    assign_random.deal([str(i) for i in range(4000)], n_tokens_N, np.zeros(4, np.int64), n_tokens_K, 0)
    assert n_tokens_K.max() / n_tokens_K.mean() < 1.01


def test_dealing_depends_on_ids_and_seed_alone() -> None:
    ids, n_tokens_N = [f"doc {i}" for i in range(1000)], np.full(1000, 7)

    def dealt(ids: list[str], rng_seed: int) -> np.ndarray:
        return assign_random.deal(ids, n_tokens_N, np.zeros(4, np.int64), np.zeros(4, np.int64), rng_seed)

    labels_N = dealt(ids, 0)
    assert np.array_equal(labels_N[::-1], dealt(ids[::-1], 0))
    agreement = (labels_N == dealt(ids, 1)).mean()
    assert 0.2 < agreement < 0.3  # one in four by chance


def test_shards_are_grouped_by_random_cluster(tmp_path: Path) -> None:
    shards = made_corpus.write(tmp_path, [200, 0, 150])
    config = made_corpus.write_config(tmp_path / "config.yaml", cluster={"k": 3})
    made_corpus.run_assign_random(tmp_path, config)
    made = {path: path.read_bytes() for path in (tmp_path / "random").iterdir()}
    for path in made:
        path.unlink()
    made_corpus.run_assign_random(tmp_path, config, "--threads", "3")
    assert made == {path: path.read_bytes() for path in made}

    manifest = made_corpus.check_grouping(tmp_path, "random")
    assert [entry["name"] for entry in manifest["shards"]] == [f"train-{i:05d}" for i in range(3)]
    found = artifact.read_sealed(shards, "shards")
    assert manifest["made_from"] == {
        "shards": found["identity_train"],
        "held_out": found["identity_eval"],
        "tokenizer": found["made_from"]["tokenizer"],
    }
    assert manifest["made_with"] == plans.assign_random(config_module.read(config)).content()
    assert manifest["balance"] == "random" and not {"duality_gap", "prices", "prices_K"} & manifest.keys()
    assert manifest["load_over_mean"]["tokens"]["max"] < 1.02
    assert np.ptp(manifest["n_documents"]) <= 1
    assert pq.read_table(tmp_path / "random/train-00000.parquet")["d2"].null_count == 200


def test_validation_documents_are_dealt_too(tmp_path: Path) -> None:
    shards = made_corpus.write(tmp_path, [50], [0, 60, 40])
    config = made_corpus.write_config(
        tmp_path / "config.yaml", cluster={"k": 3}, train={"validation_share": 0.2}
    )
    manifest = artifact.read_sealed(made_corpus.run_assign_random(tmp_path, config), "assignments")
    path = tmp_path / "random" / heldout.VALIDATION_FILE
    groups = [token_files.read(path, j, manifest["identity_validation"][j]) for j in range(3)]
    assert sorted(map(len, groups)) == [6, 7, 7]
    selection = heldout.select_validation(shards, artifact.read_sealed(shards, "shards"), 0.2, 0)
    selected = token_files.join(heldout.read_validation(shards, selection))
    assert sorted(token_files.join(groups).values.tolist()) == sorted(selected.values.tolist())


def test_no_validation_documents(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [50], [3])
    config = made_corpus.write_config(
        tmp_path / "config.yaml", cluster={"k": 2}, train={"validation_share": 0.1}
    )
    manifest = artifact.read_sealed(made_corpus.run_assign_random(tmp_path, config), "assignments")
    assert manifest["identity_validation"] is None
    assert not (tmp_path / "random" / heldout.VALIDATION_FILE).exists()


def test_one_cluster_is_the_shard_itself(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [30, 20])
    config = made_corpus.write_config(tmp_path / "config.yaml", cluster={"k": 1})
    made_corpus.run_assign_random(tmp_path, config)
    made_corpus.check_shards_are_single_groups(tmp_path, "random")


@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_any_number_of_documents_and_clusters(tmp_path: Path, k: int) -> None:
    config = made_corpus.write_config(tmp_path / "config.yaml", cluster={"k": k})
    for n in sorted({1, 2, k - 1, k, k + 1, 400} - {0}):
        made_corpus.write(tmp_path, [n // 2, n - n // 2], n_topics=5)
        if n >= k:
            made_corpus.run_assign_random(tmp_path, config)
            manifest = made_corpus.check_grouping(tmp_path, "random")
            assert np.ptp(manifest["n_documents"]) <= 1
        else:
            expected = f"cluster.k: {k}. Expected at most {n}, the number of documents"
            with pytest.raises(ValueError, match=expected):
                made_corpus.run_assign_random(tmp_path, config)


def test_new_held_out_text_gives_the_same_clusters(tmp_path: Path) -> None:
    config = made_corpus.write_config(
        tmp_path / "config.yaml", cluster={"k": 2}, train={"validation_share": 0.3}
    )
    made_corpus.write(tmp_path, [40, 30], [20])
    before = artifact.read_sealed(made_corpus.run_assign_random(tmp_path, config), "assignments")
    made_corpus.write(tmp_path, [40, 30], [30])
    after = artifact.read_sealed(made_corpus.run_assign_random(tmp_path, config), "assignments")
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"made_from", "identity_validation", "seal"}


@pytest.mark.parametrize("name", ["train-00001.parquet", "eval-00000.parquet"])
def test_changed_ids_are_refused(tmp_path: Path, name: str) -> None:
    """They decide which document goes where."""
    shards = made_corpus.write(tmp_path, [5, 5], [9])
    config = made_corpus.write_config(
        tmp_path / "config.yaml", cluster={"k": 2}, train={"validation_share": 0.3}
    )
    made_corpus.change_id(shards.with_name(name))
    with pytest.raises(ValueError, match=rf"{name}: its column doc_id is not the one"):
        made_corpus.run_assign_random(tmp_path, config)
    assert not (tmp_path / "random/manifest.json").exists()


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    config = made_corpus.write_config(tmp_path / "config.yaml", cluster={"k": 2})
    peaks = []
    for n_shards in (1, 2, 12):
        made_corpus.write(tmp_path, [2000] * n_shards)  # much more than the manifest
        peaks.append(made_corpus.peak_bytes(lambda: made_corpus.run_assign_random(tmp_path, config)))
    assert peaks[2] < 1.2 * peaks[1], peaks
