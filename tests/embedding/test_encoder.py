"""Encoders: pooling by its formulas, windows, batches."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaModel,
)

import made_encoder
from cbtm_pipeline.embedding import encoder, encoder_files
from made_encoder import HIDDEN, SIZES, TEXTS, VOCAB


def by_hand(found: encoder.Encoder, window: list[int], mode: str) -> np.ndarray:
    """The vector of one window by the formula of a pooling mode, without padding."""
    ids_1T = torch.tensor([[1, *window, 2]])  # [CLS] ... [SEP]
    with torch.inference_mode():
        hidden_TH = found.net(input_ids=ids_1T).last_hidden_state[0].numpy()
    n = len(hidden_TH)
    return {
        "cls": lambda: hidden_TH[0],
        "max": lambda: np.max(hidden_TH, axis=0),
        "mean": lambda: sum(hidden_TH) / n,
        "mean_sqrt_len_tokens": lambda: sum(hidden_TH) / n**0.5,
        "weightedmean": lambda: sum((t + 1) * hidden_TH[t] for t in range(n)) / (n * (n + 1) / 2),
        "lasttoken": lambda: hidden_TH[-1],
    }[mode]()


def unit(h: np.ndarray) -> np.ndarray:
    return h / np.linalg.norm(h, axis=-1, keepdims=True)


def ids(found: encoder.Encoder, text: str) -> list[int]:
    return found.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("mode", encoder.POOLING)
def test_texts_are_pooled_by_the_formula_whatever_the_batch(folder: Path, mode: str) -> None:
    found = encoder_files.load(str(made_encoder.add_modules(folder, {"pooling_mode": mode})), 1)
    assert found.pooling == (mode,) and found.n_components == HIDDEN and found.size == 46
    expected = np.stack([unit(by_hand(found, ids(found, text)[:46], mode)) for text in TEXTS])
    h_ND = encoder.embed(found, TEXTS)
    assert h_ND.dtype == np.float32
    np.testing.assert_allclose(h_ND, expected, atol=1e-5)
    assert np.abs(h_ND[0] - h_ND[1]).max() > 0.05, (
        "the vectors of all texts are nearly equal, so the comparison proves nothing"
    )


OLD = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}


@pytest.mark.parametrize(
    ("activation", "act"),
    [("torch.nn.modules.activation.Tanh", np.tanh), ("torch.nn.modules.linear.Identity", np.array)],
)
def test_several_poolings_and_a_dense_module(folder: Path, activation: str, act: Callable) -> None:
    made_encoder.add_modules(folder, OLD, {"activation_function": activation})
    found = encoder_files.load(str(folder), 1)
    assert found.pooling == ("cls", "mean") and found.n_components == 8
    weights = load_file(folder / "2_Dense/model.safetensors")
    pooled = [
        np.concatenate([by_hand(found, ids(found, text)[:46], mode) for mode in ("cls", "mean")])
        for text in TEXTS
    ]
    expected = unit(
        act(np.stack(pooled) @ weights["linear.weight"].numpy().T + weights["linear.bias"].numpy())
    )
    np.testing.assert_allclose(encoder.embed(found, TEXTS), expected, atol=1e-5)


def test_without_sentence_transformers_files_the_mean(plain: Path) -> None:
    found = encoder_files.load(str(plain), 1)
    expected = np.stack([unit(by_hand(found, ids(found, text)[:46], "mean")) for text in TEXTS])
    np.testing.assert_allclose(encoder.embed(found, TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_long_text_is_the_mean_of_its_windows_by_their_tokens(folder: Path, normalize: bool) -> None:
    made_encoder.add_modules(folder, {"pooling_mode": "mean"}, normalize=normalize)
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 12, "do_lower_case": True})
    )
    found = encoder_files.load(str(folder), 4)
    assert found.size == 10
    text = "Rose Soil seed prune water bloom leaf root spade worm compost hedge " * 5
    tokens = ids(found, text.lower())
    assert tokens != ids(found, text)
    for text_ids, n in ((tokens[:33], 33), (tokens, len(tokens))):
        assert len(text_ids) == n
        starts = (
            [0, 10, 20, 30]
            if n == 33
            else [10 * i for i in np.linspace(0, -(-n // 10) - 1, 4).round().astype(int)]
        )
        windows = [text_ids[start : start + 10] for start in starts]
        h = np.stack([by_hand(found, window, "mean") for window in windows])
        expected = unit(np.array([len(window) for window in windows]) @ (unit(h) if normalize else h))
        part = found.tokenizer.decode(text_ids)
        assert isinstance(part, str)
        np.testing.assert_allclose(encoder.embed(found, [part]), expected[None], atol=1e-5)
    first = unit(by_hand(found, tokens[:10], "mean"))
    np.testing.assert_allclose(encoder.embed(found._replace(n_windows=1), [text]), first[None], atol=1e-5)
    last = unit(by_hand(found, tokens[-10:], "mean"))
    np.testing.assert_allclose(encoder.embed_ends(found, [text, ""]), [last, 0 * last], atol=1e-5)


def test_text_without_tokens_is_the_zero_vector(plain: Path) -> None:
    found = encoder_files.load(str(plain), 2)
    for embed in (encoder.embed, encoder.embed_ends):
        h_ND = embed(found, ["", "rose", ""])
        np.testing.assert_allclose(np.linalg.norm(h_ND, axis=1), [0, 1, 0], atol=1e-6)
        assert embed(found, []).shape == (0, HIDDEN)
        assert not embed(found, [""]).any()


def test_batches_change_nothing(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = encoder_files.load(str(plain), 3)
    texts = [text * n for n in (1, 2, 5) for text in TEXTS]
    expected = encoder.embed(found, texts)
    monkeypatch.setattr(encoder, "BATCH_TOKENS", 100)
    np.testing.assert_allclose(encoder.embed(found, texts), expected, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(texts))
    np.testing.assert_allclose(encoder.embed(found, [texts[i] for i in order]), expected[order], atol=1e-5)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=0, max_size=30))
def test_batches_hold_every_row_once_and_are_no_larger_than_they_may_be(lengths: list[int]) -> None:
    batches = list(encoder.batches(lengths, 100))
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= 100


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 6))
def test_windows_reach_from_the_beginning_to_the_end(n_ids: int, size: int, n: int) -> None:
    windows = encoder.spread(list(range(n_ids)), size, n)
    n_all = -(-n_ids // size)
    assert len(windows) == min(n, n_all)
    flat = [i for window in windows for i in window]
    assert flat == sorted(set(flat)) and all(
        0 < len(window) <= size and window[0] % size == 0 for window in windows
    )
    if n_all <= n:
        assert flat == list(range(n_ids))
    else:
        assert flat[0] == 0 and (n == 1 or flat[-1] == n_ids - 1)
        assert np.ptp(np.diff([window[0] // size for window in windows])) <= 1 if n > 2 else True


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=120), st.integers(1, 5), st.integers(1, 20))
def test_of_a_very_long_text_only_parts_are_tokenised(text: str, n: int, n_chars: int) -> None:
    parts = encoder.parts_of(text, n, n_chars)
    if len(text) <= n * n_chars:
        assert parts == [text]
    else:
        assert [len(part) for part in parts] == [n_chars] * n
        assert text.startswith(parts[0]) and (n == 1 or text.endswith(parts[-1]))
        assert all(part in text for part in parts)


def test_a_very_long_text_is_read_in_parts(plain: Path) -> None:
    found = encoder_files.load(str(plain), 3)
    words = ["rose soil ", "ship mast ", "oven flour "]
    text = "".join(word * 2000 for word in words)
    starts = (0, (len(text) - 736) // 2, len(text) - 736)  # 16 characters for each of 46 tokens
    expected = unit(
        np.sum(
            [by_hand(found, ids(found, text[start : start + 736])[:46], "mean") for start in starts], axis=0
        )
    )
    np.testing.assert_allclose(encoder.embed(found, [text]), expected[None], atol=1e-5)


def test_a_decoder_needs_its_sentence_transformers_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = LlamaModel(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **SIZES)).eval()
    folder = made_encoder.write(tmp_path, net)
    with pytest.raises(
        ValueError,
        match=r"its tokens see one side only, and no modules.json defines the pooling\). Expected an encoder",
    ):
        encoder_files.load(str(folder), 1)
    found = encoder_files.load(str(made_encoder.add_modules(folder, {"pooling_mode": "lasttoken"})), 1)
    expected = np.stack([unit(by_hand(found, ids(found, text), "lasttoken")) for text in TEXTS[:3]])
    np.testing.assert_allclose(encoder.embed(found, TEXTS[:3]), expected, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_vectors(plain: Path) -> None:
    found = encoder_files.load(str(plain), 2)
    on_gpu = encoder.embed(found, TEXTS)
    assert found.net.device.type == "cuda"
    found.net.to("cpu")  # pyright: ignore[reportArgumentType]
    assert ((on_gpu * encoder.embed(found, TEXTS)).sum(axis=1) > 0.999).all()
