"""A tiny made ensemble, and a server of it as its own process."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openai
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cbtm_pipeline.base import artifact
from cbtm_pipeline.inference import package
from made_project import TOPICS

SEPARATOR = "<|endoftext|>"
N_CONTEXT = 4096
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant]"
)


def tokenizer(**more: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; id 0 is the separator."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TOPICS.values(), trainer)
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SEPARATOR)
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles, **more)


def write_ensemble(folder: Path, n_context: int = N_CONTEXT, **tokenizer_options: str) -> Path:
    """Write the folder `ensemble` with three experts of random weights, two of which run. Returns it."""
    words, names = tokenizer(**tokenizer_options), [*TOPICS]
    words.save_pretrained(folder / "tokenizer")
    rng, n_components = np.random.default_rng(0), 8
    for i, name in enumerate(names):
        torch.manual_seed(i)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=n_context,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
        net = LlamaForCausalLM(config)
        with torch.no_grad():
            net.lm_head.weight[0] = 0  # so that a text does not end by chance
        net.save_pretrained(folder / "experts" / name)
    terms = folder / "top_terms.json"
    content = [topic.split()[:10] for topic in TOPICS.values()]
    artifact.write_sealed(terms, artifact.make_meta("top_terms", {}, top_terms=content))
    centres_KD = rng.normal(size=(len(names), n_components)).astype(np.float32)
    parts = package.Parts(
        rng.normal(size=(len(words), n_components)).astype(np.float32),
        centres_KD / np.linalg.norm(centres_KD, axis=1, keepdims=True),
        {name: folder / "experts" / name for name in names},
        folder / "tokenizer",
        0,
        len(words),
        {"router": "filter", "n_active": 2, "router_temperature": 0.5, "epsilon": 0.5},
        "made",
        terms,
    )
    out = folder / "ensemble"
    package.write(parts, out / package.FILES, artifact.make_meta("ensemble", {}))
    return out


@dataclass
class Server:
    """A running server. `log` has what it has printed."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    key: str | None = None
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, key: str | None = None, **options: int) -> openai.OpenAI:
        """OpenAI's own client, which does not try again unless `options` say so."""
        options = {"max_retries": 0, "timeout": 120, **options}
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key or "none", **options)  # pyright: ignore[reportArgumentType]
        self.clients.append(made)
        return made

    def stop(self) -> int:
        """Send SIGTERM. Returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def command(*arguments: str | Path) -> list[str]:
    """The command line of `cbtm serve`."""
    return [sys.executable, "-m", "cbtm_pipeline", "serve", *map(str, arguments)]


@contextmanager
def serving(ensemble: Path, log: Path, *options: str, key: str | None = None) -> Iterator[Server]:
    """A server of this folder at a free port, for the time of the context."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"CBTM_API_KEY": key} if key else {})}
    arguments = command("--model", ensemble, "--port", "0", *options)
    with log.open("wb") as file:
        process = subprocess.Popen(arguments, stderr=file, stdout=file, env=environment)
    try:
        while not (found := re.search(r"at (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        server = Server(found[1], process, log, key)
        yield server
        for client in server.clients:
            client.close()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
