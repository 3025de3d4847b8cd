"""cluster.by: the rules from shards to grouped shards, with clusters that follow labels."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import made_corpus
from cbtm_pipeline.base import artifact
from cbtm_pipeline.clustering import kmeans
from cbtm_pipeline.corpus import token_files


def made(folder: Path, by: str, k: int, labels: int = 4, **cluster: object) -> dict:
    """Assign a corpus of four topics. A label is the topic, or with `labels: 8` a half of one; each tenth
    document has none.
    """

    def label(topic: int, row: int) -> str:
        return "" if row % 10 == 0 else f"topic {topic}" if labels == 4 else f"topic {topic}.{row % 2}"

    made_corpus.write(folder, [300, 0, 200], [40], n_topics=4, label=label)
    config = made_corpus.write_config(
        folder / "config.yaml",
        embed={"n_components": 8},
        corpus={"label_field": "source"},
        cluster={"k": k, "n_init": 1, "by": by, **cluster},
    )
    made_corpus.run_assign_all(folder, config)
    made_corpus.run_route(folder, config)
    return made_corpus.check_grouping(folder, "assignments")


def documents(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Clusters, labels, numbers of tokens and vectors of all training documents."""
    rows = [pq.read_table(folder / f"assignments/train-{i:05d}.parquet").to_pydict() for i in range(3)]
    names = [pq.read_table(folder / f"shards/train-{i:05d}.parquet")["label"].to_pylist() for i in range(3)]
    x_ND = np.concatenate([np.load(folder / f"embed/train-{i:05d}.npy") for i in range(3)])
    clusters, n_tokens = (
        np.concatenate([r[key] for r in rows]).astype(int) for key in ("cluster", "n_tokens")
    )
    return clusters, np.array([name for some in names for name in some], object), n_tokens, x_ND


@pytest.mark.parametrize(("k", "labels"), [(4, 4), (3, 8)])
def test_by_label_an_expert_has_the_documents_of_its_labels(tmp_path: Path, k: int, labels: int) -> None:
    manifest = made(tmp_path, "label", k, labels, fit_documents=100)
    clusters, names, n_tokens, x_ND = documents(tmp_path)
    arrays, record = artifact.read_npz(tmp_path / "cluster/clusterer.npz", "clusterer")
    groups = record["labels"]["groups"]
    assert len(groups) == labels and set(groups.values()) == set(range(k))
    assert all(clusters[i] == groups[name] for i, name in enumerate(names) if name)
    assert not arrays["prices_K"].any() and manifest["by"] == "label" and "duality_gap" not in manifest
    nearest, _ = kmeans.assign(x_ND, arrays["centres_KD"], np.zeros(k))
    assert (clusters == nearest)[names == ""].all()
    here = (names != "") & (clusters == 1)
    mean = (n_tokens[here, None] * x_ND[here]).sum(axis=0) / n_tokens[here].sum()
    np.testing.assert_allclose(arrays["centres_KD"][1], mean, atol=1e-5)
    agreement = manifest["labels"]
    assert agreement["purity"] == 1 if k == labels else agreement["purity"] < 1
    assert record["made_from"]["labels"] == manifest["made_from"]["labels"]


def test_by_label_and_text_clusters_are_balanced_and_centres_are_their_means(tmp_path: Path) -> None:
    manifest = made(tmp_path, "label+text", 6, 8)
    assert manifest["by"] == "label+text" and manifest["load_over_mean"]["tokens"]["max"] < 1.03
    clusters, _, n_tokens, x_ND = documents(tmp_path)
    arrays, _ = artifact.read_npz(tmp_path / "cluster/clusterer.npz", "clusterer")
    for j in range(6):
        here = clusters == j
        mean = (n_tokens[here, None] * x_ND[here]).sum(axis=0) / n_tokens[here].sum()
        np.testing.assert_allclose(arrays["centres_KD"][j], mean, atol=1e-5)


def test_prices_of_label_and_text_are_corrected_on_the_whole_corpus(tmp_path: Path) -> None:
    manifest = made(tmp_path, "label+text", 5, 8, fit_documents=120)
    assert manifest["prices"] == "corpus" and manifest["load_over_mean"]["tokens"]["max"] < 1.03
    assert manifest["prices_K"] == [0] * 5


def test_fewer_labels_than_clusters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^cluster.k: 5. Expected at most 4, the number of labels. Lower"):
        made(tmp_path, "label", 5)


def test_held_out_documents_go_by_their_text_alone(tmp_path: Path) -> None:
    """The cluster of a held-out document is the nearest centre, whatever its label."""
    made(tmp_path / "a", "label", 4)
    arrays, _ = artifact.read_npz(tmp_path / "a/route/distances.npz", "distances")
    entry = artifact.read_sealed(tmp_path / "a/shards/manifest.json", "shards")["shards"][-1]
    assert entry["split"] == "eval"
    names = pq.read_table(tmp_path / "a/shards/eval-00000.parquet")["label"].to_pylist()
    clusterer, record = artifact.read_npz(tmp_path / "a/cluster/clusterer.npz", "clusterer")
    of_label = [record["labels"]["groups"].get(name, -1) for name in names]
    assert (arrays["cluster"] != of_label).any(), "some documents look like another label"
    assert clusterer.keys() == {"centres_KD", "prices_K", "loads_K"}


@pytest.mark.parametrize("by", ["text", "label"])
def test_with_soft_borders_experts_read_documents_of_their_neighbours_too(tmp_path: Path, by: str) -> None:
    hard = made(tmp_path / "hard", by, 4)
    folder = tmp_path / "hard"
    before = {path.name: path.read_bytes() for path in (folder / "assignments").glob("*.parquet")}
    sizes = {"k", "n_documents", "n_tokens", "prices_K", "labels", "load_over_mean", "identity_validation"}
    config = made_corpus.write_config(
        folder / "soft.yaml",
        embed={"n_components": 8},
        corpus={"label_field": "source"},
        cluster={"k": 4, "n_init": 1, "by": by, "border_share": 0.2},
    )
    soft = artifact.read_sealed(made_corpus.run_assign(folder, config), "assignments")
    assert {key: hard[key] for key in sizes} == {key: soft[key] for key in sizes}, "clusters stay"
    assert soft["border"]["share"] == 0.2 and "border" not in hard
    n_read, n_borrowed = np.zeros(4, int), np.zeros(4, int)
    for entry in soft["shards"]:
        path = folder / f"assignments/{entry['name']}"
        rows = pq.read_table(path.with_suffix(".parquet")).to_pydict()
        old = pq.read_table(pa.BufferReader(before[f"{entry['name']}.parquet"])).to_pydict()
        assert {key: rows[key] for key in old} == old and rows.keys() - old.keys() == {"lent_to"}
        shard = token_files.read_unverified(folder / f"shards/{entry['name']}.arrow", 0)
        for j in range(4):
            here = [
                i for i, pair in enumerate(zip(rows["cluster"], rows["lent_to"], strict=True)) if j in pair
            ]
            group = token_files.read_unverified(path.with_suffix(".arrow"), j)
            assert np.array_equal(group.values, shard.take(np.array(here, int)).values)
            n_read[j] += group.n_tokens.sum()
            n_borrowed[j] += sum(
                n for n, to in zip(rows["n_tokens"], rows["lent_to"], strict=True) if to == j
            )
    assert n_borrowed.tolist() == soft["border"]["n_tokens"]
    assert (n_read - n_borrowed).tolist() == soft["n_tokens"]
    shares = n_borrowed / n_read
    assert (shares <= 0.2).all() and shares.max() > 0.17
    made_corpus.run_assign(folder, folder / "config.yaml")
    assert {name: (folder / "assignments" / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("by", ["text", "label", "label+text"])
def test_with_parents_the_clusters_are_the_same_in_an_order_by_group(tmp_path: Path, by: str) -> None:
    made(tmp_path / "flat", by, 4)
    made(tmp_path / "family", by, 4, parents=2)
    flat, family = (
        artifact.read_npz(tmp_path / name / "cluster/clusterer.npz", "clusterer")[0]["centres_KD"]
        for name in ("flat", "family")
    )
    order = np.array([int(np.abs(flat - centre).sum(axis=1).argmin()) for centre in family])
    assert np.array_equal(flat[order], family) and sorted(order) == [0, 1, 2, 3]
    assert order[0] == 0 and order[0] < order[1] and order[2] < order[3]
    before, after = documents(tmp_path / "flat")[0], documents(tmp_path / "family")[0]
    assert np.array_equal(order[after], before), "each document has the same companions"
