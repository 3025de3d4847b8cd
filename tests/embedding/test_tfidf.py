"""Linear tf-idf: sums, prefixes, weights, components."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import made_corpus
from cbtm_pipeline.corpus.token_files import Documents
from cbtm_pipeline.embedding import tfidf

VOCAB = 40
FIT = {"separator_id": 0, "n_components": 100, "idf_power": 2.0, "max_df": 0.5, "min_df": 2, "rng_seed": 0}


def made(texts: list[list[int]]) -> Documents:
    """Documents of these tokens, each with its separator (0) before it."""
    lists = [[0, *text] for text in texts]
    return Documents(
        np.array([t for x in lists for t in x], np.uint16), np.cumsum([0] + [len(x) for x in lists])
    )


def rows_of(documents: Documents) -> list[np.ndarray]:
    return [documents.values[a:b] for a, b in zip(documents.offsets[:-1], documents.offsets[1:], strict=True)]


def random_E(n_dropped: int = 5, n_components: int = 7, rng_seed: int = 0) -> np.ndarray:
    E_VD = np.random.default_rng(rng_seed).normal(size=(VOCAB, n_components)).astype(np.float32)
    E_VD[:n_dropped] = 0
    return E_VD


texts = st.lists(st.lists(st.integers(1, VOCAB - 1), max_size=12), max_size=6)


@settings(deadline=None, max_examples=50)
@given(texts)
def test_count(lists: list[list[int]]) -> None:
    counts = tfidf.count(made(lists), VOCAB).toarray()
    assert counts.tolist() == [np.bincount([0, *text], minlength=VOCAB).tolist() for text in lists]


@settings(deadline=None, max_examples=50)
@given(texts, st.integers(1, 5))
def test_embedding_is_the_normalised_sum_of_its_tokens_rows(
    lists: list[list[int]], chunk_tokens: int
) -> None:
    E_VD = random_E()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfidf, "CHUNK_TOKENS", chunk_tokens)
        h_ND = tfidf.embed(made(lists), E_VD)
    assert h_ND.dtype == np.float32 and h_ND.shape == (len(lists), 7)
    for text, h_D in zip(lists, h_ND, strict=True):
        sum_D = E_VD.astype(np.float64)[np.array(text, int)].sum(axis=0)
        length = np.linalg.norm(sum_D)
        np.testing.assert_allclose(h_D, sum_D / length if length else sum_D, atol=1e-6)


def test_embedding_ignores_the_order_of_tokens_and_a_repetition_of_the_whole() -> None:
    h_ND = tfidf.embed(made([[5, 6, 7, 7], [7, 5, 7, 6], [5, 6, 7, 7] * 3]), random_E())
    np.testing.assert_allclose(h_ND[1:], h_ND[[0, 0]], atol=1e-6)


def prefix_sums(text: list[int], E_VD: np.ndarray, chunk_rows: int = 99) -> np.ndarray:
    return np.concatenate(list(tfidf.prefix_sums([np.array([0, *text])], E_VD, chunk_rows)))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), st.integers(1, 9), st.data())
def test_a_future_token_changes_no_bit_of_an_earlier_prefix(
    text: list[int], chunk_rows: int, data: st.DataObject
) -> None:
    E_VD = random_E(rng_seed=len(text))
    t = data.draw(st.integers(0, len(text) - 1))
    other = [*text[:t], data.draw(st.integers(0, VOCAB - 1)), *text[t + 1 :]]
    s_TD, other_TD = (prefix_sums(x, E_VD, chunk_rows) for x in (text, other))
    assert s_TD.shape == (len(text) + 1, 7)
    assert s_TD[: t + 1].tobytes() == other_TD[: t + 1].tobytes()


@settings(deadline=None, max_examples=50)
@given(texts, st.integers(1, 9))
def test_documents_beside_a_document_change_no_bit_of_its_prefixes(
    lists: list[list[int]], chunk_rows: int
) -> None:
    E_VD = random_E()
    lists = [[7], *lists]
    chunks = list(tfidf.prefix_sums([np.array([0, *text]) for text in lists], E_VD, chunk_rows))
    assert all(len(chunk) == chunk_rows for chunk in chunks[:-1])
    alone = [prefix_sums(text, E_VD) for text in lists]
    assert np.concatenate(chunks).tobytes() == np.concatenate(alone).tobytes()


def test_a_token_changes_every_later_prefix() -> None:
    s_TD, other_TD = (prefix_sums([7, 8, x, 9, 9], random_E()) for x in (10, 11))
    assert (s_TD != other_TD).any(axis=1).tolist() == [False] * 3 + [True] * 3


@settings(deadline=None, max_examples=50)
@given(texts, st.integers(1, 9))
def test_every_prefix_is_embedded_as_a_document_of_its_own(lists: list[list[int]], chunk_rows: int) -> None:
    E_VD = random_E()
    for text in lists:
        s_TD = prefix_sums(text, E_VD, chunk_rows)
        lengths_T1 = np.linalg.norm(s_TD, axis=1, keepdims=True)
        expected_TD = tfidf.embed(made([text[:t] for t in range(len(text) + 1)]), E_VD)
        np.testing.assert_allclose(s_TD / np.where(lengths_T1 > 0, lengths_T1, 1), expected_TD, atol=1e-6)


def test_text_of_dropped_terms_has_the_zero_vector() -> None:
    h_ND = tfidf.embed(made([[1, 2, 3], [], [1, 30]]), random_E(n_dropped=5))
    assert not h_ND[:2].any()
    assert np.linalg.norm(h_ND[2]) == pytest.approx(1)


def test_weights_and_dropped_terms() -> None:
    # term 1 is in 4 of 4 documents, 2 in 3, 3 in 2, 4 in 1
    counts = tfidf.count(made([[1, 2, 3, 4], [1, 2, 3, 3], [1, 2], [1]]), VOCAB)
    idf_V = tfidf.fit(counts, **{**FIT, "max_df": 0.75, "idf_power": 1.5}).idf_V
    expected = np.zeros(VOCAB)
    expected[2], expected[3] = (np.log(5 / 4) + 1) ** 1.5, (np.log(5 / 3) + 1) ** 1.5
    np.testing.assert_allclose(idf_V, expected, rtol=1e-6)


def test_the_separator_is_no_term() -> None:
    documents = made([[1, 2], [1, 2, 3], [3, 4], [4]])
    embedder = tfidf.fit(tfidf.count(documents, VOCAB), **{**FIT, "max_df": 1.0})
    assert not embedder.E_VD[0].any() and embedder.idf_V[0] == 0
    assert np.flatnonzero(embedder.idf_V).tolist() == [1, 2, 3, 4]


def test_fit_finds_the_topics_and_is_deterministic() -> None:
    rng = np.random.default_rng(1)
    documents, topics = made_corpus.documents(300, 4, rng)
    counts = tfidf.count(documents, len(made_corpus.words(4)))
    embedder = tfidf.fit(counts, **{**FIT, "n_components": 4})
    again = tfidf.fit(counts, **{**FIT, "n_components": 4})
    assert embedder.E_VD.tobytes() == again.E_VD.tobytes()
    h_ND = tfidf.embed(documents, embedder.E_VD)
    similar_NN = h_ND @ h_ND.T
    same_NN = topics[:, None] == topics
    assert similar_NN[same_NN].mean() > 0.8 > 0.3 > similar_NN[~same_NN].mean()


def test_another_number_of_threads_gives_the_same_embedder() -> None:
    documents, _ = made_corpus.documents(1500, 40, np.random.default_rng(3))
    counts = tfidf.count(documents, len(made_corpus.words(40)))
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 4):
            torch.set_num_threads(n_threads)
            found.append(tfidf.fit(counts, **FIT))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert len({embedder.E_VD.tobytes() for embedder in found}) == 1


def test_components_are_those_of_the_weighted_rows() -> None:
    documents, _ = made_corpus.documents(60, 3, np.random.default_rng(2))
    counts = tfidf.count(documents, len(made_corpus.words(3)))
    embedder = tfidf.fit(counts, **{**FIT, "n_components": 3})
    rows_NV = tfidf.rows(counts, embedder.idf_V).toarray()
    V_DV = np.linalg.svd(rows_NV)[2][:3]
    V_VD = np.divide(
        embedder.E_VD,
        embedder.idf_V[:, None],
        where=embedder.idf_V[:, None] > 0,
        out=np.zeros_like(embedder.E_VD),
    )
    np.testing.assert_allclose(np.abs(V_DV @ V_VD), np.eye(3), atol=1e-3)


def test_rows_are_sets_of_terms_and_have_length_one() -> None:
    rows = tfidf.rows(
        sparse.csr_array(np.array([[0, 1, 3], [0, 0, 0]], np.float32)), np.array([9, 2, 1])
    ).toarray()
    np.testing.assert_allclose(rows, [np.array([0, 2, 1]) / np.sqrt(5), np.zeros(3)], rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_few_documents_give_few_components(n: int, caplog: pytest.LogCaptureFixture) -> None:
    documents, _ = made_corpus.documents(n, 2, np.random.default_rng(0))
    with caplog.at_level(logging.INFO, "cbtm"):
        embedder = tfidf.fit(tfidf.count(documents, len(made_corpus.words(2))), **FIT)
    assert 1 <= embedder.E_VD.shape[1] <= n
    assert "fewer than embed.n_components (100)" in caplog.text
    assert ("give way" in caplog.text) == (n < 4)
    assert tfidf.embed(documents, embedder.E_VD).any(axis=1).sum() >= min(n, 2)


def test_identical_documents_give_one_component() -> None:
    embedder = tfidf.fit(tfidf.count(made([[1, 2, 2, 3]] * 5), VOCAB), **{**FIT, "max_df": 1.0})
    assert embedder.E_VD.shape == (VOCAB, 1)


def test_no_usable_term() -> None:
    with pytest.raises(
        ValueError,
        match=r"embed\.min_df, embed\.max_df: 2 and 0\.5 drop every term of 4 documents\..*Lower min_df",
    ):
        tfidf.fit(tfidf.count(made([[1], [2], [3], []]), VOCAB), **FIT)


def test_token_outside_the_vocabulary() -> None:
    for attempt in (
        lambda: tfidf.embed(made([[1, VOCAB]]), random_E()),
        lambda: list(tfidf.prefix_sums([np.array([0, VOCAB])], random_E())),
        lambda: tfidf.count(made([[VOCAB]]), VOCAB),
    ):
        with pytest.raises(ValueError, match=r"tokens: id 40. Expected ids below the vocabulary size, 40"):
            attempt()
