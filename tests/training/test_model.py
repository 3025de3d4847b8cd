import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import made_hub
from cbtm_pipeline.training import model
from made_training import LLAMA

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}


def llama(rng_seed: int = 0, **keys: Any) -> PreTrainedModel:
    return model.scratch(LLAMA | keys, 300, 7, 32, rng_seed)


def weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(net.named_parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    model.scratch(LLAMA, 300, 7, 32, 0).save_pretrained(path)
    return path


def test_scratch_fills_in_what_the_tokenizer_and_seq_len_say():
    c = model.scratch(LLAMA, 300, 7, 32, 0).config
    assert (c.vocab_size, c.bos_token_id, c.eos_token_id, c.pad_token_id, c.max_position_embeddings) == (
        300,
        7,
        7,
        None,
        32,
    )
    c = model.scratch(GPT2, 300, 7, 48, 0).config
    assert (c.n_positions, c.resid_pdrop, c.embd_pdrop, c.attn_pdrop) == (48, 0, 0, 0)
    c = model.scratch(GPT2 | {"n_positions": 64, "resid_pdrop": 0.1}, 300, 7, 48, 0).config
    assert (c.n_positions, c.resid_pdrop) == (64, 0.1)


def test_every_token_of_a_model_from_scratch_can_learn():
    opt = {
        "model_type": "opt",
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    table = model.scratch(opt, 300, 7, 32, 0).get_input_embeddings()
    assert isinstance(table, torch.nn.Embedding)
    assert table.padding_idx is None  # 1 by default, which would never train token 1


def test_scratch_is_a_function_of_the_seed():
    a, b, c = weights(llama(0)), weights(llama(0)), weights(llama(1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert all(p.dtype == torch.float32 for p in a.values())
    llama(-(2**70))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "lama"}, r"model_type: lama\. Expected a causal .* Did you mean llama\?"),
        ({"model_type": None}, r"model_type: None\."),
        (
            GPT2 | {"n_embed": 32},
            r"model\.scratch\.n_embed: unknown key\. Expected a key of GPT2Config.* Did you mean n_embd\?",
        ),
        (GPT2 | {"n_embd": 33}, r"model\.scratch: no gpt2 model \(.*divisible"),
        (LLAMA | {"hidden_size": "wide"}, r"model\.scratch: no llama model \(.*hidden_size"),
        (LLAMA | {"num_key_value_heads": 3}, r"model\.scratch: "),
        (LLAMA | {"vocab_size": 100}, r"a vocabulary of 100\. Expected room for the tokenizer's 300"),
        (LLAMA | {"max_position_embeddings": 16}, r"16 positions\. Expected at least train\.seq_len, 32"),
        (LLAMA | {"model_type": "bert"}, r"depend on later tokens"),
    ],
)
def test_what_makes_no_model_is_one_line(keys, message):
    with pytest.raises(ValueError, match=message) as error:
        model.scratch(keys, 300, 7, 32, 0)
    assert "\n" not in str(error.value)


def test_flops_leave_out_tables_that_are_only_looked_up():
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    attention = 12 * 2 * 32 * 32
    tied, untied = llama(), llama(tie_word_embeddings=False)
    assert model.n_parameters(tied) == matrices + 300 * 32
    assert model.n_parameters(untied) == matrices + 2 * 300 * 32
    assert (
        model.flops_per_token(tied, 32)
        == model.flops_per_token(untied, 32)
        == 6 * (matrices + 300 * 32) + attention
    )
    gpt2 = model.scratch(GPT2, 300, 7, 32, 0)
    assert model.flops_per_token(gpt2, 32) == 6 * (model.n_parameters(gpt2) - 32 * 32) + attention


def test_pretrained_from_a_folder(folder):
    a, b = weights(llama()), weights(model.pretrained(str(folder), None, 300, 32)[0])
    assert all(torch.equal(a[name], b[name]) for name in a)
    b = weights(model.load(folder))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("vocab_size", "seq_len", "message"),
    [
        (301, 32, "a vocabulary of 300. Expected room for the tokenizer's 301"),
        (300, 33, "32 positions. Expected at least train.seq_len, 33"),
    ],
)
def test_pretrained_that_does_not_fit(folder, vocab_size, seq_len, message):
    with pytest.raises(ValueError, match=message):
        model.pretrained(str(folder), None, vocab_size, seq_len)


def test_pretrained_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"model\.pretrained: /no/such/model: no such folder"):
        model.pretrained("/no/such/model", None, 300, 32)
    with pytest.raises(
        ValueError, match=r"lacks config\.json, model\.safetensors\. Expected config\.json and"
    ):
        model.pretrained(str(tmp_path), None, 300, 32)


def test_pretrained_that_is_damaged(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be loaded"):
        model.pretrained(str(broken), None, 300, 32)


def test_weights_that_are_missing_are_not_made_up(folder, tmp_path):
    deeper = tmp_path / "deeper"
    shutil.copytree(folder, deeper)
    config = json.loads((folder / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"no fitting weights for model\.layers\.2"):
        model.pretrained(str(deeper), None, 300, 32)


def test_pickled_weights_are_never_read(folder, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks model\.safetensors\. Expected .* safetensors weights"):
        model.pretrained(str(pickled), None, 300, 32)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache with two Llamas, me/tiny at NEW (main) and at OLD (v1). No hub answers."""
    cache = tmp_path / "hub"
    for rng_seed, commit, ref in ((0, made_hub.NEW, "main"), (1, made_hub.OLD, "v1")):
        llama(rng_seed).save_pretrained(made_hub.snapshot(cache, "me/tiny", commit, ref))
    made_hub.use(monkeypatch, cache)
    return cache


@pytest.mark.parametrize(
    ("revision", "rng_seed", "commit"),
    [
        (None, 0, made_hub.NEW),
        ("main", 0, made_hub.NEW),
        ("v1", 1, made_hub.OLD),
        (made_hub.OLD, 1, made_hub.OLD),
    ],
)
def test_pretrained_from_the_cache_without_network(cache, revision, rng_seed, commit):
    net, found = model.pretrained("me/tiny", revision, 300, 32)
    assert found == commit
    for name, p in weights(llama(rng_seed)).items():
        assert torch.equal(p, weights(net)[name])


def test_pretrained_from_a_folder_has_no_commit(folder):
    assert model.pretrained(str(folder), None, 300, 32)[1] is None


def test_a_revision_that_does_not_exist_is_one_line(cache):
    with pytest.raises(ValueError, match=r"model\.pretrained: me/tiny: not found .*--revision v2 ") as error:
        model.pretrained("me/tiny", "v2", 300, 32)
    assert "\n" not in str(error.value)
