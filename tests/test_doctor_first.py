"""What training or evaluation would stop at, `cbtm doctor` fails on before anything is computed.

One list of bad folders and corpora goes through both.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import made_texts
from cbtm_pipeline import doctor, shard
from cbtm_pipeline import tokenizer as tokenizer_rule
from cbtm_pipeline.corpus import encoding
from cbtm_pipeline.ops import fit_checks, run_checks
from cbtm_pipeline.ops.facts import Facts
from cbtm_pipeline.training import model

N_TOKENS, SEQ_LEN = 300, 32
LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": N_TOKENS,
    "max_position_embeddings": 64,
}
Change = Callable[[Path], Any]


def save(folder: Path, model_type: str = "llama", **keys: Any) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**LLAMA, **keys})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seed that is right, with its tokenizer."""
    folder = tmp_path_factory.mktemp("seeds") / "whole"
    save(folder)
    tokenizer = tokenizer_rule.train([text.encode() for text in made_texts.texts(200)], N_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer_rule.SEPARATOR}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def edit(name: str = "config.json", **keys: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return change


def put(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def add(*tokens: str, special: bool) -> Change:
    def change(folder: Path) -> None:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(tokens))
        tokenizer.save(str(folder / "tokenizer.json"))

    return change


def other(model_type: str, **keys: Any) -> Change:
    return lambda folder: save(folder, model_type, **keys)


def quantized(method: str, **keys: Any) -> Change:
    return edit(quantization_config={"quant_method": method, **keys})


def only_model(content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(content)

    return change


WEIGHTS = "model.safetensors"
SEEDS: dict[str, Change] = {
    "weights that are cut": lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 9),
    "weights that are a pickle": put(WEIGHTS, b"\x80\x04."),
    "weights only as a pickle": lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "weights of other shapes": edit(hidden_size=32),
    "weights of more layers": edit(num_hidden_layers=3),
    "GPTQ": quantized("gptq", bits=4),
    "AWQ": quantized("awq", bits=4),
    "bitsandbytes": quantized("bitsandbytes", load_in_4bit=True),
    "compressed tensors": quantized("compressed-tensors"),
    "an adapter": put("adapter_config.json", b'{"base_model_name_or_path": "x"}'),
    "code of its own": edit(
        model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    ),
    "a config that is a list": put("config.json", b"[]"),
    "an empty config": put("config.json", b""),
    "a kind of model that reads ahead": other("bert", is_decoder=False),
    "an encoder": lambda f: edit(model_type="vit")(f),
    "too few positions": edit(max_position_embeddings=SEQ_LEN - 1),
    "a vocabulary that is too small": other("llama", vocab_size=N_TOKENS - 1),
    "a token more than the embedding": add("<mine>", special=False),
    "a separator beyond the embedding": lambda f: (
        add("<sep>", special=True)(f),
        edit("tokenizer_config.json", bos_token="<sep>")(f),
    ),
    "a tokenizer that is cut": lambda f: os.truncate(f / "tokenizer.json", 100),
    "a tokenizer without separator": edit("tokenizer_config.json", bos_token=None),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "a tokenizer of sentencepiece, damaged": only_model(b"\n\x0e\n\x05<unk>"),
    "a tokenizer of tiktoken, damaged": only_model(b"IQ== 0\nIg== 1\n"),
}
GOOD: dict[str, Change] = {
    "as it is": lambda f: None,
    "a special token more than the embedding": add("[PAD]", special=True),
    "positions that YaRN stretches": edit(
        max_position_embeddings=8, rope_scaling={"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0}
    ),
    "BPE dropout": lambda f: put(
        "tokenizer.json",
        (f / "tokenizer.json")
        .read_bytes()
        .replace(b'"dropout":null', b'"dropout":0.5')
        .replace(b'"dropout": null', b'"dropout": 0.5'),
    )(f),
}


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def change_file(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})

    return change_file


def sharded(folder: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    net.save_pretrained(folder, max_shard_size="10KB")


def words(kind: Any, trainer: Any, pre: Any, **keys: Any) -> Change:
    """A tokenizer of another kind, as sentencepiece, BERT and others have them."""

    def change(folder: Path) -> None:
        tokenizer = tokenizers.Tokenizer(kind(**keys))
        tokenizer.pre_tokenizer = pre
        special = ["<|endoftext|>", "<unk>"]
        more = {"unk_token": "<unk>"} if trainer is tokenizers.trainers.UnigramTrainer else {}
        tokenizer.train_from_iterator(
            made_texts.texts(50), trainer(vocab_size=200, special_tokens=special, show_progress=False, **more)
        )
        tokenizer.save(str(folder / "tokenizer.json"))

    return change


def gguf(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "model-q4_0.gguf").write_bytes(b"GGUF\x03\0\0\0")


def device(name: str, kind: str) -> Change:
    """A file that is none, in the place of one."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to(kind)

    return change


SEEDS["only a GGUF file"] = gguf
# such config.json come from other programs, which know the sizes of a GGUF file and little else
SEEDS |= {
    "a size as text": edit(hidden_size="16"),
    "a size that is null": edit(num_hidden_layers=None),
    "a size that is half a number": edit(intermediate_size=16.5),
    "a vocabulary as a list": edit(vocab_size=[N_TOKENS]),
    "no heads": edit(num_attention_heads=0),
    "only a kind of model": put("config.json", b'{"model_type": "llama"}'),
    "positions as text": edit(max_position_embeddings="64"),
    "an activation that nobody knows": edit(hidden_act="mine"),
    "a type of numbers that nobody knows": edit(dtype="float99"),
    "a name of GGUF's own": edit(model_type="llama-gguf"),
    "NaN in a weight": weights(lambda w: {**w, "model.norm.weight": torch.full((16,), float("nan"))}),
    "infinity in a weight": weights(lambda w: {**w, "model.norm.weight": torch.full((16,), float("inf"))}),
    "a pipe for a config": device("config.json", "pipe"),
    "a pipe for weights": device(WEIGHTS, "pipe"),
    "a pipe for a tokenizer": device("tokenizer.json", "pipe"),
    "a pipe for its settings": device("tokenizer_config.json", "pipe"),
    "a link to /dev/zero for weights": device(WEIGHTS, "/dev/zero"),
    "a link to /dev/zero for a config": device("config.json", "/dev/zero"),
    "a link to itself for weights": device(WEIGHTS, WEIGHTS),
}
SEEDS["weights without an output layer"] = weights(
    lambda w: {k: v for k, v in w.items() if "lm_head" not in k}
)
SEEDS["an index without one of its files"] = lambda f: (sharded(f), next(f.glob("model-*-of-*")).unlink())
M, T, P = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
GOOD |= {
    "weights in bfloat16": weights(lambda w: {k: v.bfloat16() for k, v in w.items()}),
    "weights in float16": weights(lambda w: {k: v.half() for k, v in w.items()}),
    "weights in several files": sharded,
    "frequencies of an old version": weights(
        lambda w: {**w, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ),
    "the weights once more, as Mistral ships them": lambda f: shutil.copy(
        f / WEIGHTS, f / "consolidated.safetensors"
    ),
    "pickled weights beside the others": put("pytorch_model.bin", b"\x80\x04."),
    "a GGUF file beside the others": put("model.gguf", b"GGUF"),
    "a config that llama.cpp's converters wrote": edit(
        torch_dtype="float16", _name_or_path="x", architectures=None
    ),
    "Unigram, as sentencepiece": words(M.Unigram, T.UnigramTrainer, P.Metaspace()),
    "BPE of pieces, as sentencepiece": words(M.BPE, T.BpeTrainer, P.Metaspace(), unk_token="<unk>"),
    "WordPiece, as BERT": words(M.WordPiece, T.WordPieceTrainer, P.BertPreTokenizer(), unk_token="<unk>"),
    "whole words": words(M.WordLevel, T.WordLevelTrainer, P.Whitespace(), unk_token="<unk>"),
}


def prepare(seed: Path, out: Path) -> None:
    """What the rules `tokenizer` and `train_expert` do with a seed before the first step."""
    out.mkdir()
    saved = tokenizer_rule.save_pretrained("model.pretrained", str(seed), None, out)
    n_ids = min(saved.vocab_size, encoding.n_ids_of(out / "tokenizer.json", saved.separator_id))
    model.layers(model.pretrained(str(seed), None, n_ids, SEQ_LEN)[0])


def failures(content: dict[str, Any], *checks: Any) -> list[str]:
    """What those checks of doctor fail on."""
    facts = Facts([], None)
    facts.config = made_texts.changed_config(**content)
    return [line for level, line in doctor.run(facts, checks) if level == "FAIL"]


def of_seed(seed: Path) -> list[str]:
    model_ = {"pretrained": str(seed), "scratch": {}}
    checks = (fit_checks.check_tokenizer, run_checks.check_model, fit_checks.check_seed)
    return failures({"model": model_, "train": {"seq_len": SEQ_LEN}, "eval": {"stride": SEQ_LEN}}, *checks)


@pytest.mark.parametrize("name", SEEDS)
def test_doctor_fails_first_on_a_seed(name: str, whole: Path, tmp_path: Path) -> None:
    seed = tmp_path / "seed"
    shutil.copytree(whole, seed)
    SEEDS[name](seed)
    with pytest.raises((ValueError, OSError)):
        prepare(seed, tmp_path / "made")
    found = of_seed(seed)
    assert found and all("\n" not in line and line.count(". ") >= 1 for line in found), found


def test_a_seed_with_nan_is_told_so_and_which_weight_has_it(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "seed")
    SEEDS["NaN in a weight"](tmp_path / "seed")
    with pytest.raises(ValueError) as error:
        model.pretrained(str(tmp_path / "seed"), None, N_TOKENS, SEQ_LEN)
    assert f"{tmp_path / 'seed'}: NaN or infinity in model.norm.weight of its weights. Expected" in str(
        error.value
    )


@pytest.mark.parametrize("name", GOOD)
def test_doctor_and_training_take_a_seed(name: str, whole: Path, tmp_path: Path) -> None:
    seed = tmp_path / "seed"
    shutil.copytree(whole, seed)
    GOOD[name](seed)
    prepare(seed, tmp_path / "made")
    assert not of_seed(seed)


SCRATCH: dict[str, dict[str, Any]] = {
    "that reads ahead": {"model_type": "bert"},
    "with an unknown key": {"model_type": "llama", "hiden_size": 3},
    "of sizes that do not fit": {"model_type": "llama", "num_key_value_heads": 3},
    "with a small vocabulary": {"model_type": "llama", "vocab_size": 100},
}


@pytest.mark.parametrize("name", SCRATCH)
def test_doctor_fails_first_on_a_model_from_scratch(name: str) -> None:
    keys = {**LLAMA, "vocab_size": N_TOKENS, **SCRATCH[name]}
    with pytest.raises(ValueError) as error:
        model.scratch(keys, N_TOKENS, 0, SEQ_LEN, 0)
    content = {
        "model": {"scratch": keys},
        "train": {"seq_len": SEQ_LEN},
        "eval": {"stride": SEQ_LEN},
        "tokenizer": {"vocab_size": N_TOKENS},
    }
    assert failures(content, run_checks.check_model, fit_checks.check_seed) == [str(error.value)]


def lines(n: int, **more: Any) -> bytes:
    return b"".join(json.dumps({**row, **more}).encode() + b"\n" for row in made_texts.rows(n))


# how many documents to train on and to hold out, and what is wrong with them
HELD_OUT: dict[str, dict[str, Any]] = {
    "one document is held out": {"train": lines(20), "eval": lines(1, id="held")},
    "all held-out rows are bad": {"train": lines(20), "eval": b"broken\n" * 3},
    "held-out rows have one id": {"train": lines(20), "eval": lines(3, id="same")},
    "nothing is held out": {"train": lines(20), "eval_fraction": 0.0001},
    "all rows are bad": {"train": b"broken\n" * 3, "eval_fraction": 0.5},
    "no field is called so": {"train": lines(20), "eval_fraction": 0.5, "text_field": "body"},
    "the corpus is empty": {"train": b"\n", "eval_fraction": 0.5},
    "the held-out file is no Parquet": {"train": lines(20), "eval": b"x" * 100, "suffix": ".parquet"},
    "the held-out array has no end": {"train": lines(20), "eval": b'[{"id": 1', "suffix": ".json"},
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_doctor_fails_first_on_a_held_out_set(name: str, tmp_path: Path) -> None:
    about = dict(HELD_OUT[name])
    suffix = about.pop("suffix", ".jsonl")
    for split in ("train", "eval"):
        if split in about:
            path = tmp_path / f"{split}{suffix if split == 'eval' else '.jsonl'}"
            path.write_bytes(about[split])
            about[split] = [str(path)]
    tokenizer_json = made_texts.make_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError):
        plan = made_texts.shard_plan(**about)
        shard.make(plan, tokenizer_json, tmp_path / "s/manifest.json", 1, None, tmp_path / "seen", None, 0.3)
    assert failures({"corpus": about}, fit_checks.check_held_out)


def test_doctor_reads_no_more_of_the_corpus_than_it_needs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(3000) + b"broken")
    about = {"train": [str(tmp_path / "a.jsonl")], "eval_fraction": 0.5}
    assert not failures({"corpus": about}, fit_checks.check_held_out)
