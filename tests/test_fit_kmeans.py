"""Clusters, their certificate and their terms."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import made_corpus
from cbtm_pipeline import config as config_module
from cbtm_pipeline import fit_kmeans
from cbtm_pipeline import plan as plans
from cbtm_pipeline import tokenizer as tokenizer_rule
from cbtm_pipeline.base import artifact
from cbtm_pipeline.clustering import kmeans
from cbtm_pipeline.clustering import sample as sample_files
from cbtm_pipeline.corpus import token_files
from cbtm_pipeline.embedding import tfidf


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of four topics in three shards, one of them empty, with its vectors."""
    outdir = tmp_path_factory.mktemp("made")
    made_corpus.write(outdir, [200, 0, 150], n_topics=4)
    config = made_corpus.write_config(
        outdir / "config.yaml", embed={"n_components": 8}, cluster={"n_init": 1}
    )
    made_corpus.run_embed(outdir, config)
    return outdir


def clusterer(outdir: Path, folder: Path, **cluster: object) -> tuple[dict[str, np.ndarray], dict]:
    config = made_corpus.write_config(
        folder / "config.yaml", embed={"n_components": 8}, cluster={"n_init": 1, **cluster}
    )
    return artifact.read_npz(made_corpus.run_fit_kmeans(outdir, config), "clusterer")


def test_clusters_are_balanced_and_certified(made: Path, tmp_path: Path) -> None:
    arrays, meta = clusterer(made, tmp_path, k=4, balance="tokens")
    certificate = meta["certificate"]
    assert arrays["centres_KD"].shape == (4, 8) and arrays["centres_KD"].dtype == np.float32
    assert arrays["prices_K"].dtype == arrays["loads_K"].dtype == np.float64
    assert meta["made_from"] == {
        "vectors": artifact.read_record(made / "embed/manifest.json", "vectors")["seal"],
        "embedder": artifact.read_record(made / "embed/embedder.npz", "embedder")["seal"],
    }
    plan = plans.fit_kmeans(config_module.read(tmp_path / "config.yaml"))
    assert meta["made_with"] == plan.content() and plan.balance == "tokens"
    assert meta["files"] == ["top_terms.json"]
    assert certificate["n_documents"] == 350 and certificate["balance"] == "tokens"
    assert 1 <= certificate["max_load"] < 1.02 and 0.98 < certificate["min_load"] <= 1
    assert certificate["max_load"] == pytest.approx(arrays["loads_K"].max() / arrays["loads_K"].mean())

    shards = artifact.read_sealed(made / "shards/manifest.json", "shards")["shards"]
    assert arrays["loads_K"].sum() == sum(s["n_tokens"] for s in shards if s["split"] == "train")
    by_documents, _ = clusterer(made, tmp_path, k=4, balance="documents")
    assert sorted(by_documents["loads_K"]) == [87, 87, 88, 88]
    without, meta = clusterer(made, tmp_path, k=4, balance="none")
    assert not without["prices_K"].any()
    assert meta["certificate"]["inertia"] <= certificate["inertia"] + 1e-6


@pytest.mark.parametrize("n_counted", [1000, 100])
def test_top_terms_name_the_topics(
    made: Path, tmp_path: Path, n_counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_files, "TERM_DOCUMENTS", n_counted)
    _, meta = clusterer(made, tmp_path, k=4, balance="none")
    content = artifact.read_sealed(made / "cluster/top_terms.json", "top_terms")
    assert content["made_from"] == {"clusterer": meta["seal"]}
    assert content["made_with"] == meta["made_with"]
    assert [len(terms) for terms in content["top_terms"]] == [12] * 4
    # a word of topic t begins with the t-th letter
    topics = [{term[0] for term in terms} for terms in content["top_terms"]]
    assert sorted(map(sorted, topics)) == [["a"], ["b"], ["c"], ["d"]]


def test_top_terms_prefer_readable_strings() -> None:
    strings = ["", " the", " River", "river", "\ufffd", "  ", "x", "==", "bank", " fish"]
    counts = np.zeros((4, 10), np.float32)
    counts[:2, 2:8] = 5  # cluster 0
    counts[2:, 8:] = 5
    terms = sample_files.top_terms(sparse.csr_array(counts), np.ones(10), np.array([0, 0, 1, 1]), 2, strings)
    assert terms == [["river", "=="], ["bank", "fish"]]


def test_whole_words_stand_for_clusters_though_tokens_are_parts_of_words() -> None:
    texts = ["haskell maskell", "amazon bamazon"] * 30
    bpe = tokenizer_rule.train([b"ha sk ell am az on " * 50], 270)
    begins = [np.array(bpe.encode(text).ids, np.uint32) for text in texts]
    counts = tfidf.count(
        token_files.Documents(np.concatenate(begins), np.cumsum([0, *map(len, begins)])), 270
    )
    sample = fit_kmeans.Sample(np.empty(0), np.empty(0), counts, np.arange(60), begins)
    found = fit_kmeans.describe(sample, np.ones(270), np.arange(60) % 2, 2, bpe)
    assert found[0][:2] == ["haskell", "maskell"] and found[1][:2] == ["amazon", "bamazon"]
    assert not {"askell", "mazon", "ell", "az"} & {term for terms in found for term in terms}


def test_sample_over_all_shards_is_deterministic(made: Path, tmp_path: Path) -> None:
    few, meta = clusterer(made, tmp_path, k=4, fit_documents=40)
    assert meta["certificate"]["n_documents"] == 40
    again, _ = clusterer(made, tmp_path, k=4, fit_documents=40)
    assert all(np.array_equal(few[name], again[name]) for name in few)
    sample = fit_kmeans.read_sample(made / "embed/manifest.json", made / "shards/manifest.json", 40, 0)
    labels_N, _ = kmeans.assign(sample.x_ND, few["centres_KD"], few["prices_K"])
    np.testing.assert_array_equal(np.bincount(labels_N, sample.n_tokens_N, 4), few["loads_K"])


def test_terms_are_counted_in_a_part_of_a_large_sample(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = made / "embed/manifest.json", made / "shards/manifest.json"
    whole = fit_kmeans.read_sample(*paths, 350, 0)
    monkeypatch.setattr(sample_files, "TERM_DOCUMENTS", 100)
    part = fit_kmeans.read_sample(*paths, 350, 0)
    assert len(part.x_ND) == 350 and len(part.counted) <= 100
    assert np.array_equal(part.counts.toarray(), whole.counts.toarray()[part.counted])
    assert np.array_equal(whole.n_tokens_N + 1, whole.counts.sum(axis=1))


def test_impossible_numbers_of_clusters(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cluster.k: 351. Expected at most 350, the number of documents"):
        clusterer(made, tmp_path, k=351)
    with pytest.raises(ValueError, match=r"cluster.fit_documents: 5. Expected at least cluster.k, 6"):
        clusterer(made, tmp_path, k=6, fit_documents=5)


def test_fewer_distinct_vectors_than_clusters(tmp_path: Path) -> None:
    documents, _ = made_corpus.documents(4, 2, np.random.default_rng(0))
    same = documents.take(np.arange(40) % 4)
    tokenizer = made_corpus.write_tokenizer(tmp_path / "tokenizer", 2)
    made_corpus.write_shards(tmp_path / "shards", {"train-00000": same}, made_corpus.words(2), tokenizer)
    made_corpus.run_embed(tmp_path, made_corpus.write_config(tmp_path / "config.yaml"))
    with pytest.raises(
        ValueError, match=r"cluster.k: 5. Expected at most 4, the number of distinct vectors"
    ) as caught:
        clusterer(tmp_path, tmp_path, k=5)
    assert "\n" not in str(caught.value)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    config = made_corpus.write_config(tmp_path / "config.yaml", cluster={"k": 2})
    made_corpus.write(tmp_path, [30])
    made_corpus.run_embed(tmp_path, config)
    tokenizer = tmp_path / "tokenizer/tokenizer.json"
    right = tokenizer.read_text()
    tokenizer.write_text(right + "\n")
    with pytest.raises(ValueError, match=r"made from another tokenizer"):
        made_corpus.run_fit_kmeans(tmp_path, config)
    tokenizer.write_text(right)
    vectors = tmp_path / "embed/train-00000.npy"
    content = vectors.read_bytes()
    vectors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"train-00000.npy: another file than it was"):
        made_corpus.run_fit_kmeans(tmp_path, config)
    vectors.write_bytes(content)
    made_corpus.write(tmp_path, [30], rng_seed=1)
    with pytest.raises(ValueError, match=r"made from another shards"):
        made_corpus.run_fit_kmeans(tmp_path, config)
    assert not (tmp_path / "cluster").exists()
