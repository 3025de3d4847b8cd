"""Documents in their clusters: grouped shards, corrected prices, validation documents, refusals."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import made_corpus
import resealed
from cbtm_pipeline import config as config_module
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import heldout, token_files
from cbtm_pipeline.training import data


def test_shards_are_grouped_by_cluster(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [200, 0, 150])
    config = made_corpus.write_config(
        tmp_path / "config.yaml", embed={"n_components": 8}, cluster={"k": 3, "n_init": 1}
    )
    made_corpus.run_assign_all(tmp_path, config)
    manifest = made_corpus.check_grouping(tmp_path, "assignments")
    assert [entry["name"] for entry in manifest["shards"]] == [f"train-{i:05d}" for i in range(3)]
    assert manifest["balance"] == "tokens" and manifest["prices"] == "clusterer"
    assert manifest["load_over_mean"]["tokens"]["max"] < 1.02
    arrays, certificate = artifact.read_npz(tmp_path / "cluster/clusterer.npz", "clusterer")
    assert manifest["n_tokens"] == arrays["loads_K"].tolist()
    assert manifest["duality_gap"] == pytest.approx(certificate["certificate"]["duality_gap"], rel=1e-6)
    shards = artifact.read_sealed(tmp_path / "shards/manifest.json", "shards")
    assert manifest["made_from"] == {
        "clusterer": certificate["seal"],
        "shards": shards["identity_train"],
        "held_out": shards["identity_eval"],
        "tokenizer": artifact.identity(tmp_path / "tokenizer/tokenizer.json"),
    }
    assert manifest["made_with"] == plans.assign(config_module.read(config)).content()

    made = {path: path.read_bytes() for path in (tmp_path / "assignments").iterdir()}
    for path in made:
        path.unlink()
    made_corpus.run_assign(tmp_path, config, "--threads", "3")
    assert made == {path: path.read_bytes() for path in made}


def test_validation_documents_are_held_out_and_labelled_as_the_router_does(tmp_path: Path) -> None:
    """They are calibration documents, each in the cluster that `route` finds for the whole document."""
    made_corpus.write(tmp_path, [200, 150], [0, 60, 40])
    sections = {
        "embed": {"n_components": 8},
        "cluster": {"k": 3, "n_init": 1},
        "eval": {"max_document_tokens": None},
    }
    config = made_corpus.write_config(tmp_path / "config.yaml", **sections, train={"validation_share": 0.2})
    made_corpus.run_assign_all(tmp_path, config)
    manifest = made_corpus.check_grouping(tmp_path, "assignments")
    path = tmp_path / "assignments" / heldout.VALIDATION_FILE
    identities = manifest["identity_validation"]
    assert made_corpus.tokens_record(path)["made_from"] == manifest["made_from"]

    arrays, _ = artifact.read_npz(made_corpus.run_route(tmp_path, config), "distances")
    held_out = token_files.join(
        [token_files.read_unverified(tmp_path / f"shards/eval-{i:05d}.arrow", 0) for i in range(3)]
    )
    chosen = heldout.calibration_documents(arrays["doc_id"], 0.2, 0)
    assert chosen.sum() == 20
    calibration = heldout.calibration_documents(arrays["doc_id"], 0.3, 0)
    assert not (chosen & ~calibration).any(), "a validation document is also a reported one"
    for j in range(3):
        expected = held_out.take(np.flatnonzero(chosen & (arrays["cluster"] == j)))
        group = token_files.read(path, j, identities[j])
        assert np.array_equal(group.values, expected.values) and np.array_equal(
            group.offsets, expected.offsets
        )


def test_no_validation_documents(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [50], [3])
    config = made_corpus.write_config(
        tmp_path / "config.yaml", cluster={"k": 2, "n_init": 1}, train={"validation_share": 0.1}
    )
    made_corpus.run_assign_all(tmp_path, config)
    manifest = artifact.read_sealed(tmp_path / "assignments/manifest.json", "assignments")
    assert manifest["identity_validation"] is None
    plan = plans.train_expert(config_module.read(config), "0")
    assert plan.validations and plan.validation_share == 0.1
    assert data.read_validation(tmp_path / "assignments/manifest.json", manifest, plan) is None


def test_one_cluster_is_the_shard_itself(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [30, 20])
    config = made_corpus.write_config(tmp_path / "config.yaml", cluster={"k": 1})
    made_corpus.run_assign_all(tmp_path, config)
    made_corpus.check_shards_are_single_groups(tmp_path, "assignments")


@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_any_number_of_documents_and_clusters(tmp_path: Path, k: int) -> None:
    """Valid balanced clusters, or one clear line."""
    config = made_corpus.write_config(
        tmp_path / "config.yaml", cluster={"k": k, "n_init": 1, "max_iterations": 10}
    )
    for n in sorted({1, 2, k - 1, k, k + 1, 4001} - {0}):
        made_corpus.write(tmp_path, [n // 2, n - n // 2], n_topics=5)
        try:
            made_corpus.run_assign_all(tmp_path, config)
            made_corpus.run_route(tmp_path, config)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).count(". ") >= 2, error
            # two documents may have equal vectors, because a term that both hold has the same weight in both
            assert "cluster.k" in str(error) and (n < k or n == 2), error
        else:
            assert n >= k
            manifest = made_corpus.check_grouping(tmp_path, "assignments")
            assert min(manifest["n_documents"]) >= 1
            if n == 4001:
                assert manifest["load_over_mean"]["tokens"]["max"] < 1.02


@pytest.mark.parametrize("balance", ["documents", "tokens"])
def test_prices_of_a_small_sample_are_corrected_on_the_whole_corpus(tmp_path: Path, balance: str) -> None:
    made_corpus.write(tmp_path, [900, 600], n_topics=6)
    cluster = {"k": 4, "n_init": 1, "fit_documents": 200, "balance": balance}
    config = made_corpus.write_config(tmp_path / "config.yaml", embed={"n_components": 8}, cluster=cluster)
    made_corpus.run_assign_all(tmp_path, config)
    manifest = made_corpus.check_grouping(tmp_path, "assignments")
    assert manifest["prices"] == "corpus"
    assert manifest["load_over_mean"][balance]["max"] < 1.03
    assert 0 <= manifest["duality_gap"] < 0.01
    arrays, _ = artifact.read_npz(tmp_path / "cluster/clusterer.npz", "clusterer")
    assert not np.allclose(arrays["prices_K"], manifest["prices_K"])


def wrong_shards(outdir: Path, config: Path) -> None:
    made_corpus.write(outdir, [40], rng_seed=1)


def wrong_vectors(outdir: Path, config: Path) -> None:
    other = made_corpus.write_config(outdir / "other.yaml", embed={"n_components": 3})
    made_corpus.run_embed(outdir, other)


def no_clusterer(outdir: Path, config: Path) -> None:
    (outdir / "cluster/clusterer.npz").write_bytes(b"PK")


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def flipped_vectors(outdir: Path, config: Path) -> None:
    flip_last_byte(outdir / "embed/train-00000.npy")


def flipped_clusterer(outdir: Path, config: Path) -> None:
    flip_last_byte(outdir / "cluster/clusterer.npz")


def other_tokens(outdir: Path, config: Path) -> None:
    made_corpus.write(outdir / "other", [40], rng_seed=1)
    (outdir / "other/shards/train-00000.arrow").replace(outdir / "shards/train-00000.arrow")


def other_ids(outdir: Path, config: Path) -> None:
    """A valid Parquet file with one id changed."""
    made_corpus.change_id(outdir / "shards/train-00000.parquet")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_shards, "made from another shards"),
        (wrong_vectors, "made from another vectors"),
        (no_clusterer, "clusterer.npz: damaged"),
        (flipped_clusterer, "clusterer.npz: damaged"),
        (flipped_vectors, "train-00000.npy: another file than it was"),
        (other_tokens, "train-00000.arrow: group 0 is not the one that its manifest speaks of"),
        (other_ids, "train-00000.parquet: its column doc_id is not the one that its manifest speaks of"),
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


def test_new_held_out_text_gives_the_same_clusters(tmp_path: Path) -> None:
    """Only the validation documents are others."""
    config = made_corpus.write_config(
        tmp_path / "config.yaml",
        embed={"n_components": 8},
        cluster={"k": 2, "n_init": 1},
        train={"validation_share": 0.3},
    )
    made_corpus.write(tmp_path, [40, 30], [20])
    before = artifact.read_sealed(made_corpus.run_assign_all(tmp_path, config), "assignments")
    made_corpus.write(tmp_path, [40, 30], [30])
    after = artifact.read_sealed(made_corpus.run_assign(tmp_path, config), "assignments")
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"made_from", "identity_validation", "seal"}
    differ = {key for key in before["made_from"] if before["made_from"][key] != after["made_from"][key]}
    assert differ == {"held_out"}


def test_a_cluster_that_stays_empty(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [40])
    config = made_corpus.write_config(tmp_path / "config.yaml", embed={"n_components": 8}, cluster={"k": 3})
    made_corpus.run_embed(tmp_path, config)
    path = made_corpus.run_fit_kmeans(tmp_path, config)
    resealed.change_npz(path, "clusterer", prices_K=np.array([0.0, 99, 0]))
    with pytest.raises(
        ValueError,
        match=r"cluster.k: 3, of which cluster 1 and 0 more are empty. Expected documents in each. Lower",
    ):
        made_corpus.run_assign(tmp_path, config)
    assert not (tmp_path / "assignments/manifest.json").exists()


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
        peaks.append(made_corpus.peak_bytes(lambda: made_corpus.run_assign(tmp_path, config)))
    assert peaks[2] < 1.2 * peaks[1], peaks
