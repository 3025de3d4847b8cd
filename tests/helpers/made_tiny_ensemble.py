"""A tiny ensemble as a folder of transformers: random llama experts, term vectors and centres."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from cbtm_pipeline.base import artifact
from cbtm_pipeline.inference import package

VOCAB_SIZE, N_COMPONENTS = 257, 6  # the separator and the bytes
SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,  # experts that differ much
}


class Ensemble(NamedTuple):
    """Where it lies, and what its router knows."""

    folder: Path
    embedding_VD: np.ndarray
    centres_KD: np.ndarray

    @property
    def experts(self) -> list[Path]:
        """The folders of the experts, in the order of the centres."""
        return [self.folder / "experts" / str(j) for j in range(len(self.centres_KD))]


def make(
    folder: Path,
    rng_seeds: Sequence[int] = (0, 1, 2, 3),
    sizes: dict[str, Any] | None = None,
    vocab_size: int = VOCAB_SIZE,
    n_components: int = N_COMPONENTS,
    **settings: Any,
) -> Ensemble:
    """Write an ensemble.

    Experts with the same random seed are identical. `sizes` are keys of their configuration class, SIZES if
    None. `settings` are keys of CBTMConfig.
    """
    rng = np.random.default_rng(0)
    _write_tokenizer(folder / "made/tokenizer")
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    keys: dict[str, Any] = {**(SIZES if sizes is None else sizes), "vocab_size": vocab_size, **tokens}
    config = AutoConfig.for_model(**keys)
    experts = {str(j): folder / f"made/experts/{j}" for j in range(len(rng_seeds))}
    for path, rng_seed in zip(experts.values(), rng_seeds, strict=True):
        torch.manual_seed(rng_seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    embedding_VD = rng.normal(size=(vocab_size, n_components)).astype(np.float32)
    embedding_VD[0] = 0  # the separator is no term
    centres_KD = rng.normal(size=(len(rng_seeds), n_components)).astype(np.float32)
    centres_KD /= np.linalg.norm(centres_KD, axis=1, keepdims=True)
    settings = {"router": "filter", "router_temperature": 0.3, "epsilon": 0.1, "beta": 0.5, **settings}
    parts = package.Parts(
        embedding_VD,
        centres_KD,
        experts,
        folder / "made/tokenizer",
        0,
        vocab_size,
        settings,
        "Made for tests.",
    )
    package.write(parts, folder / "ensemble/files.json", artifact.make_meta("ensemble", {}))
    return Ensemble(folder / "ensemble", embedding_VD, centres_KD)


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes, the separator first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<sep>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<sep>", "eos_token": "<sep>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def text(n_tokens: int, rng_seed: int, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Token ids of a sequence, (1, n_tokens): the separator, and runs of few words each."""
    rng = np.random.default_rng(rng_seed)
    runs = (rng.choice(rng.integers(1, vocab_size, 4), 10) for _ in itertools.count())
    words = itertools.chain.from_iterable(runs)
    return torch.tensor([[0, *itertools.islice(words, n_tokens - 1)]], dtype=torch.long)
