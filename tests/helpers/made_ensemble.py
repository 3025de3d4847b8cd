"""A made-up finished run whose result can be used: tiny random experts, random vectors, a real tokenizer."""

import functools
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cbtm_pipeline import ensemble, tokenizer
from cbtm_pipeline.base import artifact, cli
from made_project import TOPICS

VOCAB_SIZE, N_COMPONENTS, CONTEXT = 300, 6, 32
SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,  # experts that differ much
}
WORDS = " ".join(TOPICS.values()).split()
TABLE = "system  perplexity\nfilter all-3 *  12.00\n"
FILTER = {"router": "filter", "top_k": 3, "temperature": 0.3, "epsilon": 0.1, "beta": 0.5}


def text(n_words: int, rng_seed: int = 0) -> str:
    return " ".join(random.Random(rng_seed).choices(WORDS, k=n_words))


def row(calibration_nll: float, **settings: Any) -> dict[str, Any]:
    """A headline in metrics.json."""
    given = {**FILTER, **settings}
    about = {"system": "ensemble", "headline": True, "calibrated": True, "k": 3, "n_active": given["top_k"]}
    return {**about, **given, "calibration_nll": calibration_nll, "perplexity": 12.0}


def write(
    outdir: Path,
    rows: Sequence[dict[str, Any]] = (row(3.0),),
    terms: Sequence[Sequence[str]] = (("butter", "flour"), ("ship", "mast"), ("rose", "soil")),
    sizes: dict[str, Any] = SIZES,
) -> Path:
    """Write what `ensemble` reads, and the manifest of the assignments. Returns the outdir."""
    rng = np.random.default_rng(0)
    k = len(terms)
    _write_tokenizer(outdir / "tokenizer")
    card = artifact.read_sealed(outdir / "tokenizer/card.json", "tokenizer")
    names = [*map(str, range(k)), "dense", "seed"]
    weights = {name: _write_expert(outdir / "experts" / name, sizes, i, card) for i, name in enumerate(names)}
    E_VD = rng.normal(size=(VOCAB_SIZE, N_COMPONENTS)).astype(np.float32)
    E_VD[card["separator_id"]] = 0
    centres_KD = rng.normal(size=(k, N_COMPONENTS)).astype(np.float32)
    centres_KD /= np.linalg.norm(centres_KD, axis=1, keepdims=True)
    write_fitted(outdir, E_VD, centres_KD, terms)
    systems = {"systems": list(rows), "matrix": {"experts": names[:k]}, "weights": weights}
    write_metrics(outdir, **systems)
    return outdir


def write_fitted(
    outdir: Path, E_VD: np.ndarray, centres_KD: np.ndarray, terms: Sequence[Sequence[str]]
) -> None:
    """Write embedder, clusterer, top terms and the manifest of the assignments."""
    k = len(terms)
    embedder = artifact.write_npz(
        outdir / "embed/embedder.npz", artifact.make_meta("embedder", {}), E_VD=E_VD, idf_V=E_VD[:, 0]
    )
    meta = artifact.make_meta("clusterer", {"vectors": "v", "embedder": embedder})
    zeros_K = np.zeros(k)
    seal = artifact.write_npz(
        outdir / "cluster/clusterer.npz", meta, centres_KD=centres_KD, prices_K=zeros_K, loads_K=zeros_K
    )
    found = artifact.make_meta("top_terms", {"clusterer": seal}, top_terms=[list(some) for some in terms])
    artifact.write_sealed(outdir / "cluster/top_terms.json", found)
    about = {"n_documents": [10] * k, "n_tokens": [1000 * (j + 1) for j in range(k)], "k": k}
    meta = artifact.make_meta(
        "assignments", {"clusterer": seal}, identity_groups=[f"tokens-{j}" for j in range(k)]
    )
    artifact.write_sealed(outdir / "assignments/manifest.json", {**meta, **about})


def write_metrics(outdir: Path, **content: Any) -> None:
    table = outdir / "eval/table.txt"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(TABLE)
    meta = artifact.make_meta("metrics", {}, table=artifact.identity(table))
    artifact.write_sealed(outdir / "eval/metrics.json", {**meta, **content})


@functools.cache
def _trained() -> Any:
    return tokenizer.train([text(400, i).encode() for i in range(3)], VOCAB_SIZE)


def _write_tokenizer(folder: Path) -> None:
    """The files that the rule writes, for a tokenizer that is trained on the words."""
    folder.mkdir(parents=True)
    trained = _trained()
    trained.save(str(folder / "tokenizer.json"))
    sep = tokenizer.SEPARATOR
    artifact.write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": sep, "eos_token": sep},
    )
    files = {path.name: artifact.identity(path) for path in folder.iterdir()}
    about = {
        "separator_id": trained.token_to_id(sep),
        "vocab_size": VOCAB_SIZE,
        "files": files,
        "identity": files["tokenizer.json"],
    }
    artifact.write_sealed(folder / "card.json", artifact.make_meta("tokenizer", {}, {}, **about))


def _write_expert(folder: Path, sizes: dict[str, Any], rng_seed: int, tokenizer: dict[str, Any]) -> str:
    """Write an expert's folder; returns the hash of the weights."""
    sep = tokenizer["separator_id"]
    ids = {"bos_token_id": sep, "eos_token_id": sep, "pad_token_id": None}
    torch.manual_seed(rng_seed)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, "vocab_size": VOCAB_SIZE, **ids}))
    net.save_pretrained(folder)
    weights = artifact.identity(folder / "model.safetensors")
    made_from = {"tokenizer": tokenizer["identity"], "tokens": f"tokens-{folder.name}"}
    identity = artifact.fingerprint([weights, artifact.identity(folder / "config.json")])
    about = {"expert": folder.name, "weights": weights, "identity": identity, "validation_loss": 3.5}
    about |= {"n_parameters": 1234, "n_train_tokens": 5678}
    card = artifact.make_meta("expert", made_from, {"seq_len": CONTEXT, "data": "clusters"}, **about)
    artifact.write_sealed(folder / "card.json", card)
    (folder / "README.md").write_text(f"Expert {folder.name}\n")
    files = {path.name: artifact.identity(path) for path in folder.iterdir() if path.suffix != ".safetensors"}
    meta = artifact.make_meta("expert_files", {"expert": identity}, files=files)
    artifact.write_sealed(folder / "files.json", meta)
    return weights


def arguments(outdir: Path, out: Path | None = None) -> list[str]:
    """The command line of the rule `ensemble`."""
    experts = sorted(path for path in (outdir / "experts").iterdir() if path.name.isdecimal())
    return [
        *("--metrics", str(outdir / "eval/metrics.json"), "--embedder", str(outdir / "embed/embedder.npz")),
        *("--clusterer", str(outdir / "cluster/clusterer.npz")),
        *("--top-terms", str(outdir / "cluster/top_terms.json")),
        *("--tokenizer", str(outdir / "tokenizer/tokenizer.json")),
        *("--experts", *(str(folder / "model.safetensors") for folder in experts)),
        *("--out", str(out or outdir / "ensemble/files.json")),
    ]


def make(outdir: Path, **parts: Any) -> Path:
    """Write a run and its ensemble. Returns the ensemble's folder."""
    write(outdir, **parts)
    run(ensemble.main, arguments(outdir))
    return outdir / "ensemble"


def run(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run a rule in this process, and remove its log handlers again."""
    handlers = list(cli.log.handlers)
    try:
        main(argv)
    finally:
        cli.log.handlers[:] = handlers


def command(main: Callable[[], None], *argv: object) -> int:
    """Run a command in this process as its command line would. Returns the exit status."""
    before, handlers = sys.argv, list(cli.log.handlers)
    sys.argv, cli.log.handlers[:] = ["cbtm", *map(str, argv)], []  # pytest has a handler of its own
    try:
        cli.run(main)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv, cli.log.handlers[:] = before, handlers
    return 0
