"""Encoders: pooling against its formulas, windows, batches, refusals, and the way to the hub and its cache."""

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

import made_encoder
from cbtm_pipeline.base import hub
from cbtm_pipeline.embedding import encoder, encoder_files
from made_encoder import HIDDEN

TEXTS = [
    "butter flour",
    "the ship sails out of the harbour at dawn",
    "naïve 日本",
    "x",
    "rose soil seed prune water " * 6,
]
VOCAB = 400
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_encoder.write(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "encoder"))


def by_hand(found: encoder.Encoder, window: list[int], mode: str) -> np.ndarray:
    """The vector of one window by the formula of a pooling mode. The window is alone, so it has no padding."""
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


def small_bert(**keys: Any) -> PreTrainedModel:
    return BertModel(BertConfig(**{"vocab_size": VOCAB, **SIZES, **keys})).eval()


@pytest.mark.parametrize(
    ("make", "tokenizer", "size"),
    [
        (lambda: small_bert(max_position_embeddings=48), {}, 46),
        (lambda: small_bert(max_position_embeddings=48), {"model_max_length": 20}, 18),
        (lambda: small_bert(max_position_embeddings=600), {}, 510),
        # position p of RoBERTa is row p + 2 of its table
        (lambda: RobertaModel(RobertaConfig(vocab_size=VOCAB, max_position_embeddings=48, **SIZES)), {}, 44),
        (
            lambda: T5EncoderModel(
                T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
            ),
            {},
            510,
        ),
    ],
    ids=["positions", "tokenizer", "cap", "roberta", "t5"],
)
def test_how_much_a_model_reads(
    tmp_path: Path, make: Callable[[], PreTrainedModel], tokenizer: dict[str, int], size: int
) -> None:
    found = encoder_files.load(str(made_encoder.write(tmp_path, make(), **tokenizer)), 1)
    assert found.size == size
    assert np.isfinite(encoder.embed(found, ["word " * 2000])).all()


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


def test_weights_that_nothing_uses_may_be_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    expected = encoder.embed(encoder_files.load(str(folder), 1), TEXTS)
    kept = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert np.array_equal(encoder.embed(encoder_files.load(str(folder), 1), TEXTS), expected)


def test_identity_is_that_of_the_files_that_matter(plain: Path, folder: Path) -> None:
    identity = encoder_files.load(str(plain), 1).identity
    (folder / "README.md").write_text("words")
    assert encoder_files.load(str(folder), 1).identity == identity
    made_encoder.add_modules(folder, {"pooling_mode": "mean"})
    pooled = encoder_files.load(str(folder), 1).identity
    made_encoder.add_modules(folder, {"pooling_mode": "cls"})
    other_pooling = encoder_files.load(str(folder), 1).identity
    made_encoder.bert(1).save_pretrained(folder)
    assert len({identity, pooled, other_pooling, encoder_files.load(str(folder), 1).identity}) == 4


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if "layer.1." not in key},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def with_own_code(folder: Path) -> None:
    change(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"},
    )
    (folder / "mine.py").write_text("raise SystemExit('run')")


def with_a_strange_module(folder: Path) -> None:
    made_encoder.add_modules(folder, {})
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(
        text.replace("sentence_transformers.models.Normalize", "custom_st.Normalize")
    )


def with_another_module(folder: Path) -> None:
    made_encoder.add_modules(folder, {})
    (folder / "modules.json").write_text(
        (folder / "modules.json").read_text().replace("models.Normalize", "models.LSTM")
    )


def with_a_module_elsewhere(path: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        made_encoder.add_modules(folder, {})
        text = (folder / "modules.json").read_text()
        (folder / "modules.json").write_text(text.replace("1_Pooling", path))
        shutil.copytree(folder / "1_Pooling", folder.parent / "other", dirs_exist_ok=True)

    return spoil


def for_images(folder: Path) -> None:
    ViTModel(ViTConfig(**SIZES)).save_pretrained(folder)


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (without_weights, r"lacks model.safetensors. Expected config.json, a tokenizer and safetensors weights"),
    (without_a_layer, r"no fitting weights for encoder.layer.1.\S+, .*Expected every weight"),
    (with_own_code, r"cannot be loaded \(.*custom code.*\). Expected an encoder of text"),
    (
        with_a_strange_module,
        r"modules.json: custom_st.Normalize. Expected Transformer and Pooling, then Dense and Normalize at most",
    ),
    (with_another_module, r"modules.json: LSTM. Expected Transformer and Pooling"),
    (with_a_module_elsewhere("../other"), r"modules.json: path ../other. Expected a subfolder"),
    (with_a_module_elsewhere("/tmp/other"), r"modules.json: path /tmp/other. Expected a subfolder"),
    (for_images, r"does not run \("),
    (lambda f: (f / "tokenizer.json").unlink(), r"lacks tokenizer.json"),
    (lambda f: (f / "config.json").write_text("{"), r"cannot be loaded \("),
    (lambda f: (f / "modules.json").write_text("3"), r"modules.json: not a list of modules"),
    (
        lambda f: (made_encoder.add_modules(f, {}), (f / "1_Pooling/config.json").write_text("[1]")),
        r"1_Pooling/config.json: not a JSON",
    ),
    (
        lambda f: (made_encoder.add_modules(f, {}), (f / "1_Pooling/config.json").unlink()),
        r"lacks 1_Pooling/config.json",
    ),
    (lambda f: made_encoder.add_modules(f, {"pooling_mode": "sum"}), r"pooling sum. Expected cls, max, mean"),
    (
        lambda f: made_encoder.add_modules(f, OLD, {"activation_function": "os.system"}),
        r"2_Dense is system of .* Expected one linear layer",
    ),
    # a Dense module for two poolings behind one
    (
        lambda f: (
            made_encoder.add_modules(f, OLD, {}),
            change(f / "1_Pooling/config.json", pooling_mode="cls"),
        ),
        r"does not run \(",
    ),
    (
        lambda f: made_encoder.write(f, small_bert(vocab_size=300)),
        r"a vocabulary of 300, while its tokenizer has 400 tokens",
    ),
    (lambda f: made_encoder.write(f, model_max_length=2), r"2 special tokens leave no room for text"),
]


@pytest.mark.parametrize(("spoil", "message"), BROKEN)
def test_what_is_no_encoder_is_refused_in_a_line(
    folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        encoder_files.load(str(folder), 1)
    assert str(folder) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_vectors_that_are_no_numbers_are_refused(folder: Path) -> None:
    net = made_encoder.bert()
    torch.nn.init.constant_(net.get_parameter("encoder.layer.1.output.dense.bias"), torch.nan)
    net.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"does not run .*vectors that are not finite"):
        encoder.embed(encoder_files.load(str(folder), 1), TEXTS)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def requests(cache: Path) -> Iterator[list[str]]:
    """Requests to a hub that has no repository."""
    with made_encoder.empty_hub(cache) as requests:
        yield requests


def test_a_hub_that_never_answers_costs_a_time_limit(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        with pytest.raises(ValueError, match=r"embed.encoder: me/tiny: not found \(.*timed out"):
            encoder_files.fetch("me/tiny")
        snapshot = made_encoder.put_in_cache(cache, folder)
        assert encoder_files.fetch("me/tiny") == snapshot


def test_a_complete_download_is_never_asked_for_again(cache: Path, folder: Path, requests: list[str]) -> None:
    made_encoder.add_modules(folder, {"pooling_mode": "cls"})
    snapshot = made_encoder.put_in_cache(cache, folder)
    for revision in (None, "main", made_encoder.COMMIT):
        assert encoder_files.fetch("me/tiny", revision) == snapshot
        found = encoder_files.load("me/tiny", 1, revision)
        assert found.name == "me/tiny" and found.pooling == ("cls",) and found.commit == made_encoder.COMMIT
        assert found.identity == encoder_files.load(str(folder), 1).identity
    assert requests == []
    (snapshot / "modules.json").unlink()
    assert encoder_files.fetch("me/tiny") == snapshot
    assert requests and "me/tiny" in requests[0], (
        "the hub does not count requests, so this test proves nothing"
    )


def test_a_revision_chooses_the_commit(cache: Path, folder: Path, requests: list[str]) -> None:
    made_encoder.add_modules(folder, {"pooling_mode": "cls"})
    made_encoder.put_in_cache(cache, folder)
    made_encoder.bert(1).save_pretrained(folder)
    other = "f" * 40
    snapshot = made_encoder.put_in_cache(cache, folder, other, "v1")
    at_main = encoder_files.load("me/tiny", 1)
    for revision in ("v1", other):
        assert encoder_files.fetch("me/tiny", revision) == snapshot
        found = encoder_files.load("me/tiny", 1, revision)
        assert found.commit == other and found.identity != at_main.identity
    assert requests == []
    with pytest.raises(
        ValueError, match=r"me/tiny: not found .* run hf download me/tiny --revision v2 where"
    ):
        encoder_files.fetch("me/tiny", "v2")
    assert any(path.endswith("/me/tiny/revision/v2") for path in requests)


def test_a_folder_has_no_commit(folder: Path) -> None:
    assert encoder_files.load(str(folder), 1).commit is None


@pytest.mark.usefixtures("requests")
def test_a_download_without_modules_is_used_if_the_hub_does_not_have_it(cache: Path, folder: Path) -> None:
    snapshot = made_encoder.put_in_cache(cache, folder)
    assert encoder_files.fetch("me/tiny") == snapshot
    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"embed.encoder: me/tiny: .* lacks tokenizer.json"):
        encoder_files.fetch("me/tiny")


@pytest.mark.parametrize("name", ["me/other", "no such/name at all", "/no/such/folder"])
@pytest.mark.usefixtures("requests")
def test_unknown_names(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"embed.encoder: {re.escape(name)}: not found \(.+\). Expected a folder or a name on the hub",
    ) as error:
        encoder_files.load(name, 1)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_vectors(plain: Path) -> None:
    found = encoder_files.load(str(plain), 2)
    on_gpu = encoder.embed(found, TEXTS)
    assert found.net.device.type == "cuda"
    found.net.to("cpu")  # pyright: ignore[reportArgumentType]
    assert ((on_gpu * encoder.embed(found, TEXTS)).sum(axis=1) > 0.999).all()
