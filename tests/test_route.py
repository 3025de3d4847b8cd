"""Distances of prefixes: no look ahead, no evidence, windows of an encoder, and files that fit together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import made_corpus
import made_encoder
from cbtm_pipeline import route
from cbtm_pipeline.base import artifact
from cbtm_pipeline.clustering import kmeans
from cbtm_pipeline.corpus import heldout, shard_files, token_files
from cbtm_pipeline.embedding import encoder, encoder_files, tfidf
from cbtm_pipeline.plan import RoutePlan

VOCAB, K = 30, 3


def random_model(rng_seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Term vectors, of which the first five are zero, and centres of different lengths."""
    rng = np.random.default_rng(rng_seed)
    E_VD = rng.normal(size=(VOCAB, 6)).astype(np.float32)
    E_VD[:5] = 0
    return E_VD, (rng.normal(size=(K, 6)) * [[0.2], [1], [3]]).astype(np.float32)


def prefix_distances(ids: list[int], E_VD: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """Those of one document."""
    found = list(route.prefix_distances([np.array(ids)], E_VD, centres_KD))
    return np.concatenate([np.empty((0, K), np.float32), *found])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=30), st.data())
def test_a_token_and_what_follows_it_change_no_bit_of_its_row(text: list[int], data: st.DataObject) -> None:
    E_VD, centres_KD = random_model(len(text))
    t = data.draw(st.integers(0, len(text) - 1))
    other = text[:t] + data.draw(
        st.lists(st.integers(1, VOCAB - 1), min_size=len(text) - t, max_size=len(text) - t)
    )
    d2_TK, other_TK = (prefix_distances([0, *x], E_VD, centres_KD) for x in (text, other))
    assert d2_TK.shape == (len(text), K) and d2_TK.dtype == np.float32
    assert d2_TK[: t + 1].tobytes() == other_TK[: t + 1].tobytes()


def test_a_token_changes_the_rows_after_it() -> None:
    E_VD, centres_KD = random_model()
    d2_TK, other_TK = (prefix_distances([0, 9, x, 9, 10], E_VD, centres_KD) for x in (7, 8))
    assert (d2_TK != other_TK).any(axis=1).tolist() == [False, False, True, True]


def test_no_evidence_is_the_same_distance_to_all() -> None:
    E_VD, centres_KD = random_model()
    d2_TK = prefix_distances([0, 1, 4, 9, 1], E_VD, centres_KD)
    assert np.array_equal(d2_TK[:3], np.full((3, K), route.NO_EVIDENCE))
    expected = kmeans.squared_distances((E_VD[9] / np.linalg.norm(E_VD[9]))[None], centres_KD)
    np.testing.assert_allclose(d2_TK[3], expected[0], rtol=1e-5)
    assert prefix_distances([0], E_VD, centres_KD).shape == (0, K)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outdir = tmp_path_factory.mktemp("made")
    made_corpus.write(outdir, [120], [10, 0, 7])
    config = made_corpus.write_config(
        outdir / "config.yaml", embed={"n_components": 8}, cluster={"k": 4, "n_init": 1}
    )
    made_corpus.run_embed(outdir, config)
    made_corpus.run_fit_kmeans(outdir, config)
    return outdir


@pytest.mark.parametrize("cut", [None, 30])
def test_rows_documents_and_bytes(made: Path, tmp_path: Path, cut: int | None) -> None:
    config = made_corpus.write_config(tmp_path / "config.yaml", eval={"max_document_tokens": cut})
    arrays, meta = artifact.read_npz(made_corpus.run_route(made, config), "distances")
    shards, manifest = made / "shards", artifact.read_sealed(made / "shards/manifest.json", "shards")
    assert meta["made_from"] == {
        "held_out": manifest["identity_eval"],
        "embedder": artifact.read_record(made / "embed/embedder.npz", "embedder")["seal"],
        "clusterer": artifact.read_record(made / "cluster/clusterer.npz", "clusterer")["seal"],
    }
    assert meta["made_with"] == {"max_document_tokens": cut}

    held_out = [document for _, document in heldout.documents(shards, manifest, cut)]
    assert len(held_out) == 17
    assert np.diff(arrays["offsets"]).tolist() == [len(document) - 1 for document in held_out]
    assert arrays["d2_NK"].shape == (arrays["offsets"][-1], 4) and arrays["d2_NK"].dtype == np.float32
    assert {name: arrays[name].dtype for name in ("offsets", "n_bytes", "cluster")} == {
        "offsets": "i8",
        "n_bytes": "i8",
        "cluster": "i4",
    }
    tables = [pq.read_table(shards / f"eval-{i:05d}.parquet") for i in (0, 2)]
    assert arrays["doc_id"].tolist() == [doc_id for table in tables for doc_id in table["doc_id"].to_pylist()]
    words = made_corpus.words(4)
    assert arrays["n_bytes"].tolist() == [
        len("".join(words[i] for i in document[1:]).encode()) for document in held_out
    ]

    # row t of the third document
    embedder, _ = artifact.read_npz(made / "embed/embedder.npz", "embedder")
    clusterer, _ = artifact.read_npz(made / "cluster/clusterer.npz", "clusterer")
    document, t = held_out[2], 20
    prefix = token_files.Documents(document[: t + 1], np.array([0, t + 1]))
    expected = kmeans.squared_distances(tfidf.embed(prefix, embedder["E_VD"]), clusterer["centres_KD"])
    np.testing.assert_allclose(arrays["d2_NK"][arrays["offsets"][2] + t], expected[0], rtol=1e-6)


def test_cluster_is_that_of_the_whole_document_with_prices(made: Path, tmp_path: Path) -> None:
    whole, cut = (
        made_corpus.write_config(tmp_path / f"{n}.yaml", eval={"max_document_tokens": n}) for n in (None, 2)
    )
    clusters = [
        artifact.read_npz(made_corpus.run_route(made, config), "distances")[0]["cluster"]
        for config in (whole, cut)
    ]
    assert np.array_equal(clusters[0], clusters[1])
    embedder, _ = artifact.read_npz(made / "embed/embedder.npz", "embedder")
    clusterer, _ = artifact.read_npz(made / "cluster/clusterer.npz", "clusterer")
    manifest = made / "shards/manifest.json"
    entries = shard_files.entries(manifest, artifact.read_sealed(manifest, "shards"), "eval")
    h_ND = np.concatenate(
        [tfidf.embed(shard_files.documents(manifest.parent, entry), embedder["E_VD"]) for entry in entries]
    )
    expected = (kmeans.squared_distances(h_ND, clusterer["centres_KD"]) + clusterer["prices_K"]).argmin(
        axis=1
    )
    assert np.array_equal(clusters[0], expected)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [40])
    config = made_corpus.write_config(tmp_path / "config.yaml", embed={"n_components": 8}, cluster={"k": 2})
    made_corpus.run_embed(tmp_path, config)
    made_corpus.run_fit_kmeans(tmp_path, config)
    other = made_corpus.write_config(tmp_path / "other.yaml", embed={"n_components": 5})
    made_corpus.run_embed(tmp_path, other)
    with pytest.raises(ValueError, match=r"clusterer.npz: made from another embedder"):
        made_corpus.run_route(tmp_path, config)
    made_corpus.run_embed(tmp_path, config)
    made_corpus.run_route(tmp_path, config)
    made_corpus.write(tmp_path, [40], rng_seed=1)
    with pytest.raises(ValueError, match=r"embedder.npz: made from another shards"):
        made_corpus.run_route(tmp_path, config)


def other_ids(outdir: Path) -> None:
    made_corpus.change_id(outdir / "shards/eval-00000.parquet")


def other_tokens(outdir: Path) -> None:
    made_corpus.write(outdir / "other", [40], rng_seed=1)
    (outdir / "other/shards/eval-00000.arrow").replace(outdir / "shards/eval-00000.arrow")


def other_tokenizer(outdir: Path) -> None:
    path = outdir / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_ids, "eval-00000.parquet: its column doc_id is not the one that its manifest speaks of"),
        (other_tokens, "eval-00000.arrow: group 0 is not the one that its manifest speaks of"),
        (other_tokenizer, "made from another tokenizer"),
    ],
)
def test_held_out_text_and_tokenizer_that_are_not_those_of_the_shards(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    made_corpus.write(tmp_path, [40])
    config = made_corpus.write_config(tmp_path / "config.yaml", embed={"n_components": 8}, cluster={"k": 2})
    made_corpus.run_embed(tmp_path, config)
    made_corpus.run_fit_kmeans(tmp_path, config)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        made_corpus.run_route(tmp_path, config)
    assert not (tmp_path / "route/distances.npz").exists()


def test_new_held_out_text_is_routed_by_the_old_clusters(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [40], [3])
    config = made_corpus.write_config(tmp_path / "config.yaml", embed={"n_components": 8}, cluster={"k": 2})
    made_corpus.run_embed(tmp_path, config)
    made_corpus.run_fit_kmeans(tmp_path, config)
    _, before = artifact.read_npz(made_corpus.run_route(tmp_path, config), "distances")
    made_corpus.write(tmp_path, [40], [5])
    arrays, after = artifact.read_npz(made_corpus.run_route(tmp_path, config), "distances")
    assert len(arrays["doc_id"]) == 5
    differ = {key for key in before["made_from"] if before["made_from"][key] != after["made_from"][key]}
    assert differ == {"held_out"}


def test_no_held_out_documents(tmp_path: Path) -> None:
    made_corpus.write(tmp_path, [40], [0])
    config = made_corpus.write_config(tmp_path / "config.yaml", embed={"n_components": 8}, cluster={"k": 2})
    made_corpus.run_embed(tmp_path, config)
    made_corpus.run_fit_kmeans(tmp_path, config)
    with pytest.raises(ValueError, match=r"no eval documents. Expected at least one"):
        made_corpus.run_route(tmp_path, config)


def by_text(documents: list[list[int]], window_tokens: int, n_last: int = 1000) -> list[np.ndarray]:
    """text_distances with an embedding that differs for any two runs of tokens; a run of fives has zeros."""
    centres_KD = random_model()[1]

    def embed_tokens(runs: list[np.ndarray]) -> np.ndarray:
        h = [np.random.default_rng([9, *run.tolist()]).normal(size=6) * any(run != 5) for run in runs]
        return np.array(h, np.float32).reshape(-1, 6)

    arrays = [np.array([0, *x]) for x in documents]
    return list(route.text_distances(arrays, centres_KD, window_tokens, n_last, embed_tokens))


TOKENS = st.lists(st.integers(1, VOCAB - 1), max_size=30)


@settings(deadline=None, max_examples=100)
@given(st.lists(TOKENS, max_size=6), st.integers(1, 9), st.integers(1, 12))
def test_windows_of_text_stand_for_the_tokens_after_them(
    documents: list[list[int]], window_tokens: int, n_last: int
) -> None:
    found = by_text(documents, window_tokens, n_last)
    assert [d2_TK.shape for d2_TK in found] == [(len(x), K) for x in documents]
    for x, d2_TK in zip(documents, found, strict=True):
        assert d2_TK.dtype == np.float32
        for t in range(len(x)):
            seen = x[: t // window_tokens * window_tokens][-n_last:]
            if not seen or set(seen) == {5}:
                assert np.array_equal(d2_TK[t], np.full(K, route.NO_EVIDENCE))
            else:
                h = np.random.default_rng([9, *seen]).normal(size=(1, 6)).astype(np.float32)
                np.testing.assert_allclose(
                    d2_TK[t], kmeans.squared_distances(h, random_model()[1])[0], rtol=1e-5
                )


@settings(deadline=None, max_examples=100)
@given(TOKENS.filter(bool), TOKENS, st.integers(1, 9), st.data())
def test_no_token_helps_to_choose_its_own_weights_with_windows(
    text: list[int], more: list[int], window_tokens: int, data: Any
) -> None:
    t = data.draw(st.integers(0, len(text) - 1))
    (d2_TK,), (other_TK,) = by_text([text], window_tokens), by_text([text[:t] + more], window_tokens)
    n = min(t + 1, len(other_TK))
    assert d2_TK[:n].tobytes() == other_TK[:n].tobytes()


def test_documents_are_embedded_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [list(range(1, n)) for n in (1, 30, 2, 3, 12, 30, 1, 7)]
    expected = by_text(documents, 4)
    monkeypatch.setattr(route, "CHUNK_TEXTS", 5)
    sizes: list[int] = []
    for d2_TK, other in zip(by_text(documents, 4), expected, strict=True):
        np.testing.assert_array_equal(d2_TK, other)
    arrays = [np.array([0, *x]) for x in documents]
    centres_KD = random_model()[1]
    list(
        route.text_distances(
            arrays,
            centres_KD,
            4,
            99,
            lambda runs: sizes.append(len(runs)) or np.zeros((len(runs), 6), np.float32),
        )
    )
    assert len(sizes) > 3 and sum(sizes) == sum((len(x) - 1) // 4 for x in documents if x)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The made corpus with an encoder: outdir and config."""
    outdir = tmp_path_factory.mktemp("encoded")
    made_encoder.write(outdir / "encoder")
    made_corpus.write(outdir, [120], [10, 0, 7])
    config = made_corpus.write_config(
        outdir / "config.yaml",
        embed={"encoder": str(outdir / "encoder"), "windows": 2},
        cluster={"k": 4, "n_init": 1},
        route={"window_tokens": 8},
        eval={"max_document_tokens": 50},
    )
    made_corpus.run_embed(outdir, config)
    made_corpus.run_fit_kmeans(outdir, config)
    return outdir, config


def test_distances_with_an_encoder(encoded: tuple[Path, Path]) -> None:
    outdir, config = encoded
    arrays, meta = artifact.read_npz(made_corpus.run_route(outdir, config), "distances")
    assert meta["made_with"] == {"window_tokens": 8, "max_document_tokens": 50}
    centres_KD = artifact.read_npz(outdir / "cluster/clusterer.npz", "clusterer")[0]["centres_KD"]
    prices_K = artifact.read_npz(outdir / "cluster/clusterer.npz", "clusterer")[0]["prices_K"]
    found = encoder_files.load(str(outdir / "encoder"), 2)
    words = made_corpus.words(4)
    manifest = artifact.read_sealed(outdir / "shards/manifest.json", "shards")
    held_out = [document for _, document in heldout.documents(outdir / "shards", manifest, 50)]
    assert np.diff(arrays["offsets"]).tolist() == [len(document) - 1 for document in held_out]
    assert arrays["d2_NK"].dtype == np.float32
    for document, start in zip(held_out, arrays["offsets"], strict=False):
        for t in (7, 8, 17, len(document) - 2):
            seen = document[1 : 1 + t // 8 * 8]
            h_1D = encoder.embed_ends(found, ["".join(words[i] for i in seen)])
            expected = (
                kmeans.squared_distances(h_1D, centres_KD)[0] if len(seen) else np.full(4, route.NO_EVIDENCE)
            )
            np.testing.assert_allclose(arrays["d2_NK"][start + t], expected, atol=1e-4)
    tables = [pq.read_table(outdir / f"shards/eval-{i:05d}.parquet") for i in (0, 2)]
    h_ND = encoder.embed(found, [text for table in tables for text in table["text"].to_pylist()])
    labels = (kmeans.squared_distances(h_ND, centres_KD) + prices_K).argmin(axis=1)
    assert np.array_equal(arrays["cluster"], labels) and len(set(labels)) > 1


def test_with_an_encoder_what_follows_changes_nothing_but_rounding(encoded: tuple[Path, Path]) -> None:
    outdir, _ = encoded
    found = encoder_files.load(str(outdir / "encoder"), 2)
    tokenizer = shard_files.tokenizer(outdir / "tokenizer/tokenizer.json", outdir / "shards/manifest.json")
    centres_KD = artifact.read_npz(outdir / "cluster/clusterer.npz", "clusterer")[0]["centres_KD"]
    rng = np.random.default_rng(0)
    text = rng.integers(1, 141, 60)
    texts = [np.array([0, *text])]
    for t in (0, 7, 8, 30, 59):
        texts.append(np.array([0, *text[:t], *rng.integers(1, 141, 60 - t)]))
    plan = RoutePlan(max_document_tokens=None, window_tokens=8)
    alone = [route.distances([x], 60, found, centres_KD, tokenizer, plan)[0] for x in texts]
    for t, d2_TK in zip((0, 7, 8, 30, 59), alone[1:], strict=True):
        np.testing.assert_allclose(d2_TK[: t + 1], alone[0][: t + 1], atol=1e-5)
        changed = (t // 8 + 1) * 8
        assert np.abs(d2_TK[changed:] - alone[0][changed:]).max(initial=0) > 1e-3 or changed >= 60


def test_an_encoder_other_than_that_of_the_clusters_is_refused(
    encoded: tuple[Path, Path], tmp_path: Path
) -> None:
    outdir, config = encoded
    weights = outdir / "encoder/model.safetensors"
    content = weights.read_bytes()
    made_encoder.bert(1).save_pretrained(outdir / "encoder")
    try:
        with pytest.raises(ValueError, match=r"its files have changed"):
            made_corpus.run_route(outdir, config)
    finally:
        weights.write_bytes(content)
