import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import made_corpus
from cbtm_pipeline import assign
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import token_files
from cbtm_pipeline.mixture import sweep
from cbtm_pipeline.training import validation


def run_all(outdir: Path, config: Path) -> None:
    made_corpus.run_embed(outdir, config)
    made_corpus.run_fit_kmeans(outdir, config)
    made_corpus.run_assign(outdir, config)


def check_grouping(outdir: Path, folder: str) -> dict:
    """Every document is in its cluster's group, in the shard's order, and nothing is lost or doubled. Returns the manifest."""
    manifest = artifact.read_json(outdir / folder / "manifest.json", "assignments")
    k, n_documents, n_tokens = manifest["k"], np.zeros(manifest["k"], int), np.zeros(manifest["k"], int)
    for entry in manifest["shards"]:
        name = entry["name"]
        shard = token_files.read(outdir / f"shards/{name}.arrow", 0)
        rows = pq.read_table(outdir / f"{folder}/{name}.parquet").to_pydict()
        assert rows["doc_id"] == pq.read_table(outdir / f"shards/{name}.parquet")["doc_id"].to_pylist()
        assert rows["n_tokens"] == shard.n_tokens.tolist()
        path = outdir / f"{folder}/{name}.arrow"
        assert entry["identity_tokens"] == artifact.identity(path)
        assert token_files.read_meta(path)["n_groups"] == k
        for j in range(k):
            expected = shard.take(np.flatnonzero(np.array(rows["cluster"]) == j))
            group = token_files.read(path, j)
            assert np.array_equal(group.values, expected.values) and np.array_equal(
                group.offsets, expected.offsets
            )
            n_documents[j] += len(group)
            n_tokens[j] += group.n_tokens.sum()
    assert manifest["n_documents"] == n_documents.tolist() and manifest["n_tokens"] == n_tokens.tolist()
    assert manifest["load_over_mean"]["tokens"]["max"] == pytest.approx(n_tokens.max() / n_tokens.mean())
    return manifest


def test_shards_are_grouped_by_cluster(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [200, 0, 150])
    config = made_corpus.write_config(
        tmp_path / "config.yaml", embed={"n_components": 8}, cluster={"k": 3, "n_init": 1}
    )
    run_all(tmp_path, config)
    manifest = check_grouping(tmp_path, "assignments")
    assert [entry["name"] for entry in manifest["shards"]] == [f"train-{i:05d}" for i in range(3)]
    assert manifest["balance"] == "tokens" and manifest["prices"] == "clusterer"
    assert manifest["load_over_mean"]["tokens"]["max"] < 1.02
    arrays, certificate = artifact.read_npz(tmp_path / "cluster/clusterer.npz", "clusterer")
    assert manifest["n_tokens"] == arrays["loads_K"].tolist()
    assert manifest["duality_gap"] == pytest.approx(certificate["certificate"]["duality_gap"], rel=1e-6)
    paths = {"clusterer": "cluster/clusterer.npz", "shards": "shards/manifest.json"}
    assert manifest["made_from"] == {name: artifact.identity(tmp_path / path) for name, path in paths.items()}

    made_corpus.run_assign_random(tmp_path, config)
    made = {
        path: path.read_bytes()
        for folder in ("assignments", "random")
        for path in (tmp_path / folder).iterdir()
    }
    for path in made:
        path.unlink()
    made_corpus.run_assign(tmp_path, config, "--threads", "3")
    made_corpus.run_assign_random(tmp_path, config, "--threads", "3")
    assert made == {path: path.read_bytes() for path in made}

    random = check_grouping(tmp_path, "random")
    assert random["made_from"] == {"shards": manifest["made_from"]["shards"]}
    assert random["load_over_mean"]["tokens"]["max"] < 1.02
    assert "duality_gap" not in random
    assert max(random["n_documents"]) - min(random["n_documents"]) <= 1
    d2 = pq.read_table(tmp_path / "random/train-00000.parquet")["d2"]
    assert d2.null_count == 200


def test_validation_documents_are_held_out_and_labelled_as_the_router_does(tmp_path: Path) -> None:
    """They lie among those on which the router's settings are chosen, each in the cluster that `route` finds for all of its text."""
    made_corpus.write(tmp_path, [200, 150], [0, 60, 40])
    sections = {
        "embed": {"n_components": 8},
        "cluster": {"k": 3, "n_init": 1},
        "eval": {"max_document_tokens": None},
    }
    config = made_corpus.write_config(tmp_path / "config.yaml", **sections, train={"validation_share": 0.2})
    run_all(tmp_path, config)
    made_corpus.run_assign_random(tmp_path, config)
    manifest = check_grouping(tmp_path, "assignments")
    path = tmp_path / "assignments" / heldout.VALIDATION_FILE
    assert manifest["identity_validation"] == artifact.identity(path)
    assert token_files.read_meta(path)["made_from"] == manifest["made_from"]

    arrays, _ = artifact.read_npz(made_corpus.run_route(tmp_path, config), "distances")
    held_out = token_files.join(
        [token_files.read(tmp_path / f"shards/eval-{i:05d}.arrow", 0) for i in range(3)]
    )
    chosen = heldout.calibration_documents(arrays["doc_id"], 0.2, 0)
    assert chosen.sum() == 20
    assert not (
        chosen & ~heldout.calibration_documents(arrays["doc_id"], 0.3, 0)
    ).any()  # none of them is reported on
    for j in range(3):
        expected = held_out.take(np.flatnonzero(chosen & (arrays["cluster"] == j)))
        group = token_files.read(path, j)
        assert np.array_equal(group.values, expected.values) and np.array_equal(
            group.offsets, expected.offsets
        )

    random = [token_files.read(tmp_path / "random" / heldout.VALIDATION_FILE, j) for j in range(3)]
    assert sorted(map(len, random)) == [6, 7, 7]
    together = token_files.join(random)
    taken = held_out.take(np.flatnonzero(chosen))
    assert sorted(together.values.tolist()) == sorted(taken.values.tolist())


def test_no_validation_documents(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [50], [3])
    config = made_corpus.write_config(
        tmp_path / "config.yaml", cluster={"k": 2, "n_init": 1}, train={"validation_share": 0.1}
    )
    run_all(tmp_path, config)
    manifest = artifact.read_json(tmp_path / "assignments/manifest.json", "assignments")
    assert manifest["identity_validation"] is None
    plan = {"data": "clusters", "group": 0, "validations": 3, "validation_share": 0.1, "rng_seed": 0}
    assert data.read_validation(tmp_path / "assignments/manifest.json", manifest, plan) is None


def test_one_cluster_is_the_shard_itself(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [30, 20])
    config = made_corpus.write_config(tmp_path / "config.yaml", cluster={"k": 1})
    run_all(tmp_path, config)
    made_corpus.run_assign_random(tmp_path, config)
    for folder, name in itertools.product(("assignments", "random"), ("train-00000", "train-00001")):
        shard, group = (
            token_files.read(tmp_path / f"{where}/{name}.arrow", 0) for where in ("shards", folder)
        )
        assert np.array_equal(shard.values, group.values) and np.array_equal(shard.offsets, group.offsets)


@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_any_number_of_documents_and_clusters(tmp_path: Path, k: int) -> None:
    """Valid balanced clusters, or one clear line."""
    config = made_corpus.write_config(
        tmp_path / "config.yaml", cluster={"k": k, "n_init": 1, "max_iterations": 10}
    )
    for n in sorted({1, 2, k - 1, k, k + 1, 4001} - {0}):
        made_corpus.write(tmp_path, [n // 2, n - n // 2], n_topics=5)
        try:
            run_all(tmp_path, config)
            made_corpus.run_route(tmp_path, config)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).count(". ") >= 2, error
            # the terms that two documents share say only whether they occur, which tells the two not apart
            assert "cluster.k" in str(error) and (n < k or n == 2), error
        else:
            assert n >= k
            manifest = check_grouping(tmp_path, "assignments")
            assert min(manifest["n_documents"]) >= 1
            if n == 4001:
                assert manifest["load_over_mean"]["tokens"]["max"] < 1.02
        if n >= k:
            made_corpus.run_assign_random(tmp_path, config)
            random = check_grouping(tmp_path, "random")
            assert max(random["n_documents"]) - min(random["n_documents"]) <= 1
        else:
            with pytest.raises(
                ValueError, match=f"cluster.k: {k}. Expected at most {n}, the number of documents"
            ):
                made_corpus.run_assign_random(tmp_path, config)


@pytest.mark.parametrize("balance", ["documents", "tokens"])
def test_prices_of_a_small_sample_are_mended_on_the_whole_corpus(tmp_path: Path, balance: str) -> None:
    made_corpus.write(tmp_path, [900, 600], n_topics=6)
    cluster = {"k": 4, "n_init": 1, "fit_documents": 200, "balance": balance}
    config = made_corpus.write_config(tmp_path / "config.yaml", embed={"n_components": 8}, cluster=cluster)
    run_all(tmp_path, config)
    manifest = check_grouping(tmp_path, "assignments")
    assert manifest["prices"] == "corpus"
    assert manifest["load_over_mean"][balance]["max"] < 1.03
    assert 0 <= manifest["duality_gap"] < 0.01
    arrays, _ = artifact.read_npz(tmp_path / "cluster/clusterer.npz", "clusterer")
    assert not np.allclose(arrays["prices_K"], manifest["prices_K"])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 50), max_size=30), max_size=4), st.integers(1, 7), st.integers(-5, 5))
def test_dealt_clusters_are_equal_in_documents(shards: list[list[int]], k: int, rng_seed: int) -> None:
    n_documents_K, n_tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)
    counted_K, tokens_K = np.zeros(k, np.int64), np.zeros(k, np.int64)
    for s, sizes in enumerate(shards):
        n_tokens_N = np.array(sizes, np.int64)
        labels_N = assign.deal(
            [f"{s}-{i}" for i in range(len(sizes))], n_tokens_N, n_documents_K, n_tokens_K, rng_seed
        )
        counted_K += np.bincount(labels_N, minlength=k)
        tokens_K += np.bincount(labels_N, n_tokens_N, k).astype(np.int64)
    assert np.array_equal(counted_K, n_documents_K) and np.array_equal(tokens_K, n_tokens_K)
    assert np.ptp(counted_K) <= 1
    assert np.ptp(tokens_K) <= 2 * 50 * max(1, len(shards))


def test_dealt_clusters_are_equal_in_tokens_however_unequal_the_documents() -> None:
    n_tokens_N = (np.random.default_rng(0).lognormal(sigma=1.5, size=4000) * 100).astype(np.int64)
    n_tokens_K = np.zeros(4, np.int64)
    assign.deal([str(i) for i in range(4000)], n_tokens_N, np.zeros(4, np.int64), n_tokens_K, 0)
    assert n_tokens_K.max() / n_tokens_K.mean() < 1.01


def test_dealing_depends_on_ids_and_seed_alone() -> None:
    ids, n_tokens_N = [f"doc {i}" for i in range(1000)], np.full(1000, 7)

    def dealt(ids: list[str], rng_seed: int) -> np.ndarray:
        return assign.deal(ids, n_tokens_N, np.zeros(4, np.int64), np.zeros(4, np.int64), rng_seed)

    labels_N = dealt(ids, 0)
    assert np.array_equal(labels_N[::-1], dealt(ids[::-1], 0))
    agreement = (labels_N == dealt(ids, 1)).mean()
    assert 0.2 < agreement < 0.3  # one in four by chance


def wrong_shards(outdir: Path, config: Path) -> None:
    made_corpus.write(outdir, [40], rng_seed=1)


def wrong_vectors(outdir: Path, config: Path) -> None:
    other = made_corpus.write_config(outdir / "other.yaml", embed={"n_components": 3})
    made_corpus.run_embed(outdir, other)


def no_clusterer(outdir: Path, config: Path) -> None:
    (outdir / "cluster/clusterer.npz").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_shards, "made from another shards"),
        (wrong_vectors, "made from another vectors"),
        (no_clusterer, "clusterer.npz: "),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, spoil: Callable[[Path, Path], None], message: str
) -> None:
    made_corpus.write(tmp_path, [40])
    config = made_corpus.write_config(tmp_path / "config.yaml", embed={"n_components": 8}, cluster={"k": 2})
    made_corpus.run_embed(tmp_path, config)
    made_corpus.run_fit_kmeans(tmp_path, config)
    spoil(tmp_path, config)
    with pytest.raises(ValueError, match=message):
        made_corpus.run_assign(tmp_path, config)
    assert not (tmp_path / "assignments").exists()


def test_a_cluster_that_stays_empty(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [40])
    config = made_corpus.write_config(tmp_path / "config.yaml", embed={"n_components": 8}, cluster={"k": 3})
    made_corpus.run_embed(tmp_path, config)
    path = made_corpus.run_fit_kmeans(tmp_path, config)
    arrays, meta = artifact.read_npz(path, "clusterer")
    arrays["prices_K"][1] = 99
    artifact.write_npz(path, meta, **arrays)
    with pytest.raises(
        ValueError,
        match=r"cluster.k: 3, of which cluster 1 and 0 more are empty. Expected documents in each. Lower cluster.k",
    ):
        made_corpus.run_assign(tmp_path, config)
    assert not (tmp_path / "assignments/manifest.json").exists()


def test_command_line_wants_clusters_or_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = made_corpus.write_config(tmp_path / "config.yaml")
    for flags, paths in (([], {}), (["--random"], {"vectors": tmp_path}), ([], {"clusterer": tmp_path})):
        with pytest.raises(SystemExit):
            made_corpus.run(assign, config, *flags, shards=tmp_path, out=tmp_path / "x.json", **paths)
        assert "give either --vectors and --clusterer, or --random" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    config = made_corpus.write_config(
        tmp_path / "config.yaml",
        embed={"n_components": 8, "fit_documents": 50},
        cluster={"k": 2, "fit_documents": 50, "n_init": 1},
    )
    peaks = []
    for n_shards in (1, 2, 12):
        made_corpus.write(tmp_path, [500] * n_shards)
        made_corpus.run_embed(tmp_path, config)
        made_corpus.run_fit_kmeans(tmp_path, config)
        clusters = made_corpus.peak_bytes(lambda: made_corpus.run_assign(tmp_path, config))
        peaks.append(
            (clusters, made_corpus.peak_bytes(lambda: made_corpus.run_assign_random(tmp_path, config)))
        )
    assert peaks[2][0] < 1.2 * peaks[1][0] and peaks[2][1] < 1.2 * peaks[1][1], peaks
