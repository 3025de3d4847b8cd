"""Encoders: limits of their files, refusals, the hub and its cache."""

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
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
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
from made_encoder import SIZES, TEXTS, VOCAB

OLD = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}


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
        r"modules.json: custom_st.Normalize. Expected Transformer and Pooling, then Dense and Normalize at",
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
    found = (
        r"not found \(.+\)\. Expected a folder or a name on the hub"
        if name == "me/other"
        else "no such folder"
    )
    with pytest.raises(ValueError, match=rf"embed.encoder: {re.escape(name)}: {found}") as error:
        encoder_files.load(name, 1)
    assert "\n" not in str(error.value)
