"""Encoders for tests: tiny random models, their tokenizer, sentence-transformers' files, and a hub."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

import made_corpus
from made_project import TOPICS

SPECIAL = ["[PAD]", "[CLS]", "[SEP]"]
HIDDEN = 32
VOCAB = 400
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXTS = [
    "butter flour",
    "the ship sails out of the harbour at dawn",
    "naïve 日本",
    "x",
    "rose soil seed prune water " * 6,
]
COMMIT = "0123456789abcdef" * 2 + "01234567"  # of me/tiny


def tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the words of the made corpora, with [CLS] before and [SEP] after a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = [*made_corpus.words(4), *(f" {word}" for topic in TOPICS.values() for word in topic.split())]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", **more
    )


def bert(rng_seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(rng_seed)
    sizes: dict[str, Any] = SIZES | {
        "vocab_size": VOCAB,
        "num_hidden_layers": 2,
        "max_position_embeddings": 48,
    }
    # with smaller weights, the vectors of all texts would be nearly equal
    return BertModel(BertConfig(**sizes, initializer_range=0.3)).eval()


def write(folder: Path, net: PreTrainedModel | None = None, **more: Any) -> Path:
    """An encoder without sentence-transformers files: 48 positions of a small BERT."""
    (net or bert()).save_pretrained(folder)
    tokenizer(**more).save_pretrained(folder)
    return folder


def add_modules(
    folder: Path, pooling: dict[str, Any], dense: dict[str, Any] | None = None, normalize: bool = True
) -> Path:
    """Add modules.json and its modules.

    Pooling has the config `pooling`. Dense, to 8 dimensions, has the config `dense` and is left out for None.
    """
    kinds = [
        "Transformer",
        "Pooling",
        *(["Dense"] if dense is not None else []),
        *(["Normalize"] if normalize else []),
    ]
    modules = []
    for i, kind in enumerate(kinds):
        path = f"{i}_{kind}" if i else ""
        (folder / path).mkdir(exist_ok=True)
        modules.append(
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": HIDDEN, **pooling}))
    if dense is not None:
        width = HIDDEN * sum(value is True for value in pooling.values())
        generator = torch.Generator().manual_seed(0)
        weights = {
            "linear.weight": torch.randn(8, width, generator=generator) / width**0.5,
            "linear.bias": torch.randn(8, generator=generator),
        }
        (folder / "2_Dense/config.json").write_text(
            json.dumps({"in_features": width, "out_features": 8, "bias": True, **dense})
        )
        save_file(weights, folder / "2_Dense/model.safetensors")
    return folder


def put_in_cache(cache: Path, folder: Path, commit: str = COMMIT, ref: str = "main") -> Path:
    """Copy an encoder into a cache as the hub's client lays it out: me/tiny, where `ref` is at `commit`."""
    repository = cache / "models--me--tiny"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


@contextmanager
def empty_hub(cache: Path) -> Iterator[list[str]]:
    """A local hub without any repository, with the cache `cache`. Yields the paths of the requests so far."""
    requests: list[str] = []

    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    constants = huggingface_hub.constants
    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            with (
                mock.patch.object(constants, "ENDPOINT", url),
                mock.patch.object(constants, "HF_HUB_CACHE", str(cache)),
            ):
                yield requests
        finally:
            server.shutdown()
            thread.join()
