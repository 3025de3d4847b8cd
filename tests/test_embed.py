"""Vectors of all shards, by tf-idf and by an encoder, and their readers."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import sparse

import every_damage
import made_corpus
import made_encoder
from cbtm_pipeline import config as config_module
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import shard_files
from cbtm_pipeline.embedding import encoder, encoder_files, tfidf, vectors


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return made_corpus.write_config(tmp_path / "config.yaml", embed={"n_components": 8})


def test_vectors_are_those_of_the_embedder_shard_by_shard(tmp_path: Path, config: Path) -> None:
    shards = made_corpus.write(tmp_path, [40, 0, 25])
    path = made_corpus.run_embed(tmp_path, config)
    manifest = vectors.read_manifest(path, shards)
    embedder = vectors.read_embedder(path.with_name("embedder.npz"), shards)
    record = artifact.read_record(path.with_name("embedder.npz"), "embedder")
    identity = artifact.read_sealed(shards, "shards")["identity_train"]
    assert record["made_from"] == {"shards": identity}
    assert manifest["made_from"] == {"shards": identity, "embedder": record["seal"]}
    plan = plans.embed(config_module.read(config))
    assert record["made_with"] == manifest["made_with"] == plan.content()
    assert sorted(manifest["files"]) == sorted(p.name for p in path.parent.iterdir() if p != path)
    assert isinstance(embedder, tfidf.Embedder)
    assert embedder.E_VD.dtype == embedder.idf_V.dtype == np.float32
    entries = shard_files.entries(shards, artifact.read_sealed(shards, "shards"), "train")
    assert [s["name"] for s in manifest["shards"]] == [entry["name"] for entry in entries]
    for entry, vectors_entry in zip(entries, manifest["shards"], strict=True):
        x_ND = vectors.read(path.parent, vectors_entry)
        assert x_ND.dtype == np.float32 and x_ND.shape == (entry["n_documents"], 8)
        assert np.array_equal(x_ND, tfidf.embed(shard_files.documents(shards.parent, entry), embedder.E_VD))
    made = {path: path.read_bytes() for path in path.parent.iterdir()}
    for made_path in made:
        made_path.unlink()
    made_corpus.run_embed(tmp_path, config, "--threads", "3")
    assert made == {path: path.read_bytes() for path in made}


def test_the_same_twice_and_another_seed_changes_the_sample(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [40, 25])
    few = {"n_components": 8, "fit_documents": 20}
    identities = []
    for rng_seed in (0, 0, 1):
        config = made_corpus.write_config(tmp_path / "config.yaml", embed=few)
        config.write_text(config.read_text().replace("seed: 0\n", f"seed: {rng_seed}\n"))
        identities.append(artifact.identity(made_corpus.run_embed(tmp_path, config)))
    assert identities[0] == identities[1] != identities[2]


def test_what_does_not_belong_together_is_refused(tmp_path: Path, config: Path) -> None:
    shards = made_corpus.write(tmp_path, [40])
    path = made_corpus.run_embed(tmp_path, config)
    entry = vectors.read_manifest(path, shards)["shards"][0]
    file = path.with_name("train-00000.npy")
    vectors.write(file, np.load(file)[::-1])
    with pytest.raises(ValueError, match=r"train-00000.npy: another file than it was"):
        vectors.read(path.parent, entry)
    made_corpus.write(tmp_path, [40], rng_seed=1)
    with pytest.raises(ValueError, match=r"made from another shards"):
        vectors.read_manifest(path, shards)
    with pytest.raises(ValueError, match=r"made from another shards"):
        vectors.read_embedder(path.with_name("embedder.npz"), shards)


def test_no_training_documents(tmp_path: Path, config: Path) -> None:
    made_corpus.write(tmp_path, [0, 0])
    with pytest.raises(ValueError, match=r"no train documents. Expected at least one"):
        made_corpus.run_embed(tmp_path, config)
    assert not (tmp_path / "embed/manifest.json").exists()


def test_tokens_that_are_not_those_of_the_manifest(tmp_path: Path, config: Path) -> None:
    shards = made_corpus.write(tmp_path, [40, 40])
    path, other = shards.with_name("train-00000.arrow"), shards.with_name("train-00001.arrow")
    content = path.read_bytes()
    for wrong in (other.read_bytes(), content[:-1], content[: len(content) // 2], b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"train-00000.arrow: .*Expected"):
            made_corpus.run_embed(tmp_path, config)
        assert not (tmp_path / "embed/manifest.json").exists()
    path.write_bytes(content)
    made_corpus.run_embed(tmp_path, config)


def test_new_held_out_text_leaves_the_vectors_as_they_were(tmp_path: Path, config: Path) -> None:
    shards = made_corpus.write(tmp_path, [40, 25], [3])
    path = made_corpus.run_embed(tmp_path, config)
    made = {path: path.read_bytes() for path in path.parent.iterdir()}
    before = artifact.read_sealed(shards, "shards")
    made_corpus.write(tmp_path, [40, 25], [8, 2])
    after = artifact.read_sealed(shards, "shards")
    assert before["identity_train"] == after["identity_train"] and before["seal"] != after["seal"]
    assert len(vectors.read_manifest(path, shards)["shards"]) == 2
    assert isinstance(vectors.read_embedder(path.with_name("embedder.npz"), shards), tfidf.Embedder)
    made_corpus.run_embed(tmp_path, config)
    assert made == {path: path.read_bytes() for path in made}


def test_every_flipped_bit_and_every_cut_of_a_vectors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.npy"
    vectors.write(path, np.ones((2, 3), np.float32))
    entry = {"name": "train-00000", "n_documents": 2, "identity": artifact.identity(path)}

    def read() -> np.ndarray:
        artifact._identity.cache_clear()  # damage may come so fast that the file's time is the same
        return vectors.read(tmp_path, entry)

    every_damage.check_refused(path, read)
    assert read().tolist() == [[1, 1, 1]] * 2


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    config = made_corpus.write_config(
        tmp_path / "config.yaml", embed={"n_components": 50, "fit_documents": 50}
    )
    peaks = []
    for n_shards in (1, 2, 12):
        made_corpus.write(tmp_path, [500] * n_shards, n_topics=20)
        peaks.append(made_corpus.peak_bytes(lambda: made_corpus.run_embed(tmp_path, config)))
    assert peaks[2] < 1.2 * peaks[1], peaks


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    """A config with an encoder that stands in the folder `encoder` beside it."""
    made_encoder.write(tmp_path / "encoder")
    return made_corpus.write_config(
        tmp_path / "encoded.yaml",
        embed={"encoder": str(tmp_path / "encoder"), "windows": 2},
        cluster={"k": 4},
    )


def test_vectors_are_those_of_the_encoder_row_by_row(
    tmp_path: Path, encoded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "CHUNK_TEXTS", 16)
    shards = made_corpus.write(tmp_path, [40, 0, 25])
    path = made_corpus.run_embed(tmp_path, encoded)
    manifest, embedder = vectors.read_manifest(path, shards), path.with_name("embedder.npz")
    record = artifact.read_record(embedder, "embedder")
    assert manifest["made_from"]["embedder"] == record["seal"]
    assert manifest["n_components"] == made_encoder.HIDDEN
    plan = plans.embed(config_module.read(encoded))
    assert record["made_with"] == manifest["made_with"] == plan.content()
    found = encoder_files.load(str(tmp_path / "encoder"), 2)
    arrays, meta = artifact.read_npz(embedder, "embedder")
    assert not arrays and meta["encoder"] == {
        "name": found.name,
        "identity": found.identity,
        "n_windows": 2,
        "commit": None,
        "revision": None,
    }
    for entry in manifest["shards"]:
        x_ND = vectors.read(path.parent, entry)
        texts = pq.read_table(shards.with_name(f"{entry['name']}.parquet"))["text"].to_pylist()
        assert x_ND.dtype == np.float32 and x_ND.shape == (entry["n_documents"], made_encoder.HIDDEN)
        expected = [encoder.embed(found, [text])[0] for text in texts]
        np.testing.assert_allclose(x_ND, np.array(expected).reshape(x_ND.shape), atol=1e-5)
    reread = vectors.read_embedder(embedder, shards)
    assert isinstance(reread, encoder.Encoder) and reread.identity == found.identity and reread.n_windows == 2


def test_an_encoder_that_has_changed_is_refused(tmp_path: Path, encoded: Path) -> None:
    shards = made_corpus.write(tmp_path, [40])
    embedder = made_corpus.run_embed(tmp_path, encoded).with_name("embedder.npz")
    made_encoder.bert(1).save_pretrained(tmp_path / "encoder")
    with pytest.raises(
        ValueError, match=r"encoder: its files have changed .* Expected those that the vectors were made with"
    ):
        vectors.read_embedder(embedder, shards)


@pytest.mark.parametrize(("revision", "ref"), [(None, "main"), ("main", "main"), ("v1", "v1")])
def test_commit_and_revision_are_recorded_and_kept(
    tmp_path: Path, encoded: Path, revision: str | None, ref: str
) -> None:
    """The encoder that is read back is the one of the recorded revision. If that has moved, it is refused."""
    cache, folder, later = tmp_path / "cache", tmp_path / "encoder", "f" * 40
    made_encoder.add_modules(folder, {"pooling_mode": "mean"})
    made_encoder.put_in_cache(cache, folder, ref=ref)
    keys = {"encoder": "me/tiny", "windows": 2, "revision": revision}
    config = made_corpus.write_config(tmp_path / "hub.yaml", embed=keys)
    shards = made_corpus.write(tmp_path, [20])
    with made_encoder.empty_hub(cache) as requests:
        path = made_corpus.run_embed(tmp_path, config).with_name("embedder.npz")
        record = artifact.read_npz(path, "embedder")[1]["encoder"]
        assert record["commit"] == made_encoder.COMMIT and record["revision"] == revision
        made_encoder.bert(1).save_pretrained(folder)
        made_encoder.put_in_cache(cache, folder, later, "another")
        loaded = vectors.read_embedder(path, shards)
        assert isinstance(loaded, encoder.Encoder) and loaded.commit == made_encoder.COMMIT
        assert loaded.identity == record["identity"]
        (cache / "models--me--tiny/refs" / ref).write_text(later)
        with pytest.raises(ValueError, match=r"me/tiny: its files have changed"):
            vectors.read_embedder(path, shards)
    assert requests == []


def test_texts_that_are_not_the_manifests(tmp_path: Path, encoded: Path) -> None:
    shards = made_corpus.write(tmp_path, [40])
    parquet = shards.with_name("train-00000.parquet")
    pq.write_table(pq.read_table(parquet).slice(1), parquet)
    with pytest.raises(ValueError, match=r"train-00000.parquet: its column text is not the one"):
        made_corpus.run_embed(tmp_path, encoded)
    assert not (tmp_path / "embed/manifest.json").exists()
    parquet.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"train-00000.parquet: unreadable"):
        made_corpus.run_embed(tmp_path, encoded)


def test_an_encoder_has_clusters_with_terms(tmp_path: Path, encoded: Path) -> None:
    made_corpus.write(tmp_path, [160])
    made_corpus.run_embed(tmp_path, encoded)
    clusterer = made_corpus.run_fit_kmeans(tmp_path, encoded)
    terms = artifact.read_sealed(clusterer.with_name("top_terms.json"), "top_terms")["top_terms"]
    assert len(terms) == 4 and all(len(of_one) == 12 for of_one in terms)
    # each topic's words begin with a letter of their own, and no word that all topics share is among them
    assert {of_one[0][0] for of_one in terms} == set("abcd")
    assert all("common" not in term for of_one in terms for term in of_one)


def test_term_weights(tmp_path: Path, config: Path, encoded: Path) -> None:
    shards = made_corpus.write(tmp_path, [40])
    counts_NV = sparse.csr_array(
        np.array([[0, 1, 1, 1, 5], [0, 0, 2, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 2]], np.float32)
    )
    embedder = made_corpus.run_embed(tmp_path, config).with_name("embedder.npz")
    linear = vectors.read_embedder(embedder, shards)
    assert isinstance(linear, tfidf.Embedder)
    assert np.array_equal(vectors.term_weights(embedder, shards, counts_NV), linear.idf_V)
    made_corpus.run_embed(tmp_path, encoded)
    np.testing.assert_allclose(
        vectors.term_weights(embedder, shards, counts_NV), [0, 0, np.log(5 / 3) + 1, 0, 0], rtol=1e-6
    )
