"""What a run costs, from its config alone: jobs, tokens, compute, disk. Pure arithmetic, except `size`, which asks the model's own classes.

The corpus is known by the size of its files only. What follows from that is an estimate: documents of 2 kB, a token for every 3 bytes,
compressed text unpacked to 3 or 4 times its size. For the demo, states left out, it is 12 % below what a run leaves on the disk.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from cbtm_pipeline import plan
from cbtm_pipeline.base import hub
from cbtm_pipeline.base.errors import first_sentence
from cbtm_pipeline.config import Config
from cbtm_pipeline.corpus import files as corpus_files

MFU = 0.4  # share of a GPU's peak that a training is assumed to use
DEMO_BYTES = 9_550_000  # of text in the built-in corpus
DOCUMENT_BYTES, TOKEN_BYTES = 2000, 3  # of text
STATES = 3  # a training keeps two files of its state and writes a third
STATE_BYTES = 12  # of a parameter in a saved state: itself and AdamW's two moments, float32


class Size(NamedTuple):
    """Of a model. `flops_per_token` is that of training (model.flops_per_token)."""

    n_parameters: int
    flops_per_token: int
    vocab_size: int


class Corpus(NamedTuple):
    """Bytes of text, about."""

    train: float
    held_out: float


class Machine(NamedTuple):
    """What a training gets: GPUs of one kind and, on Slurm, a time limit in minutes with a notice in seconds."""

    gpu: str
    peak_flops: float
    n_gpus: int
    runtime_min: float = math.inf
    notice_s: float = 0.0


def n_jobs(config: Config) -> dict[str, int]:
    """How many jobs each rule has, from the first to the last."""
    n_experts = 1 + len(plan.experts(config))
    demo = corpus_files.DEMO in [*config.corpus.train, *(config.corpus.eval or [])]
    random = "random" in config.train.controls
    once = ["tokenizer", "shard", "embed", "fit_kmeans", "assign", "route", "eval_ensemble", "report"]
    return {
        **({"demo_corpus": 1} if demo else {}),
        **dict.fromkeys(once, 1),
        **({"assign_random": 1} if random else {}),
        "train_expert": n_experts,
        "score_expert": n_experts,
    }


def batches(config: Config) -> dict[str, int]:
    """Sequences in a step of everything that is trained, the seed first."""
    plans = {name: plan.train_expert(config, name) for name in ["seed", *plan.experts(config)]}
    return {name: p.batch_size for name, p in plans.items() if p.n_steps}


def n_tokens(config: Config) -> dict[str, int]:
    """How many tokens each expert is trained on, the seed first."""
    plans = {name: plan.train_expert(config, name) for name in ["seed", *plan.experts(config)]}
    return {name: p.n_steps * p.step_tokens for name, p in plans.items()}


def text_bytes(files: Iterable[str]) -> float:
    """About how much text the files of a corpus hold. Raises OSError for one that is not there."""
    total = 0.0
    for file in files:
        if file == corpus_files.DEMO:
            total += DEMO_BYTES
        else:
            total += Path(file).stat().st_size * corpus_files.unpacked(file)
    return total


def corpus(config: Config) -> Corpus:
    """The split that the rule `shard` will make. Raises what corpus_files.find raises."""
    train = text_bytes(corpus_files.find(config.corpus.train, None))
    if config.corpus.eval:
        return Corpus(train, text_bytes(corpus_files.find(config.corpus.eval, None)))
    return Corpus((1 - config.corpus.eval_fraction) * train, config.corpus.eval_fraction * train)


def disk(config: Config, model: Size, text: Corpus, n_dimensions: int, n_running: int) -> dict[str, float]:
    """Bytes under outdir when it is fullest, with vectors of so many dimensions and so many trainings running at once."""
    experts, k = plan.experts(config), config.cluster.k
    both, width = text.train + text.held_out, 2 if model.vocab_size <= 1 << 16 else 4
    groupings = 2 if "random" in config.train.controls else 1
    per_document = config.eval.max_document_tokens or math.inf
    n_scored = min(text.held_out / TOKEN_BYTES, text.held_out / DOCUMENT_BYTES * per_document)
    return {
        "text and tokens": both / 2 + (both + groupings * text.train) / TOKEN_BYTES * width,
        "vectors": both / DOCUMENT_BYTES * n_dimensions * 4,
        "weights": 4 * model.n_parameters * (1 + len(experts)),
        "states of running trainings": STATES * STATE_BYTES * model.n_parameters * n_running,
        "scores and distances": 4 * n_scored * (1 + len(experts) + k),
    }


def peak(gpu: str, peaks: Mapping[str, float]) -> tuple[str, float] | None:
    """(name, FLOP/s) of the GPU that Slurm calls `gpu` (a100, nvidia_h100_pcie, rtx4090), from a table by product name, first fit first."""
    for name, flops in peaks.items():
        if re.search(r"[^a-z0-9]*".join(re.findall(r"[a-z]+|\d+", name.lower())) + r"(?!\d)", gpu.lower()):
            return name, flops
    return None


def n_chained(hours: float, runtime_min: float, notice_s: float) -> int:
    """How many time limits of `runtime_min` minutes a training of so many hours needs, one after another."""
    return max(1, math.ceil(hours * 60 / max(runtime_min - notice_s / 60, 1e-9)))


def seconds_to_save(model: Size, write_rate: float) -> float:
    """For one state: hash it (1 GB/s), write it (bytes/s), read it back and hash it again."""
    return STATE_BYTES * model.n_parameters * (1 / write_rate + 2e-9)


def seconds_to_stop(model: Size, batch_tokens: int, machine: Machine | None, write_rate: float) -> float:
    """From a signal to the saved state: the step under way and the one that a GPU has been given already (0 s if their speed is not known),
    then the save, and another one if it has just begun."""
    step = (
        model.flops_per_token * batch_tokens / (MFU * machine.peak_flops * machine.n_gpus) if machine else 0.0
    )
    return 2 * (step + seconds_to_save(model, write_rate))


def size(config: Config, folder: Path | None) -> Size:
    """The size of the seed model, whose config.json lies in `folder` or which model.scratch describes; no weight is made or read.

    Raises ValueError for what the rule train_expert would refuse. Takes seconds, as it imports torch and transformers.
    """
    import torch

    from cbtm_pipeline.training import model

    seq_len, vocab_size = config.train.seq_len, config.tokenizer.vocab_size
    with torch.device("meta"):
        if folder is None:
            net = model.scratch(plan.scratch(config), vocab_size, 0, seq_len, 0)
        else:
            from transformers import AutoConfig, AutoModelForCausalLM

            try:
                net = AutoModelForCausalLM.from_config(hub.load(AutoConfig, folder), dtype=torch.float32)
            except Exception as error:  # as many types as there are models
                found = first_sentence(error)
                raise ValueError(
                    f"model: {folder} has no size ({found}). Expected a causal language model. Correct it."
                ) from error
    text = net.config.get_text_config()
    n_positions = getattr(text, "max_position_embeddings", None)
    if n_positions is not None and n_positions < seq_len:
        raise ValueError(
            f"train.seq_len: {seq_len}. Expected at most {n_positions}, the positions of the model. Lower train.seq_len."
        )
    return Size(model.n_parameters(net), model.flops_per_token(net, seq_len), text.vocab_size)


def units(value: float, unit: str = "") -> str:
    """4.1e12 B as 4.1 TB."""
    power = min(5, max(0, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}".strip()


def duration(hours: float) -> str:
    """Hours, minutes or seconds, as suits it."""
    if hours < 1:
        return f"{60 * hours:.2g} min" if hours >= 1 / 60 else f"{3600 * hours:.2g} s"
    return f"{hours:.2g} h" if hours < 10 else f"{hours:,.0f} h"


def table(config: Config, submitted: Collection[str], model: Size | None, machine: Machine | None) -> str:
    """What people want to know first: jobs (`submitted`: the rules that go to Slurm), tokens, compute, time. None: not known."""
    jobs = {rule: n for rule, n in n_jobs(config).items() if rule in submitted}
    many = [f"{n} {rule}" for rule, n in jobs.items() if n > 1]
    tokens = n_tokens(config)
    k, n_random = config.cluster.k, len(plan.random_experts(config))
    each = [
        f"experts {k} x {units(tokens['0'])}",
        *([f"random experts {n_random} x {units(tokens['random-0'])}"] if n_random else []),
    ]
    single = [f"{name} {units(tokens[name])}" for name in ["seed", *plan.dense_experts(config)]]
    others = f"{len(jobs) - len(many)} of other rules"
    rows = {
        "jobs": f"{sum(jobs.values())} on Slurm: {', '.join([*many, others])}" if jobs else "none on Slurm",
        "tokens": f"{units(sum(tokens.values()))} in training: {', '.join([*single, *each])}",
    }
    if model is None:
        rows["compute"] = "unknown, as the model is not here"
        return _aligned(rows)
    flops = {name: n * model.flops_per_token for name, n in tokens.items()}
    longest = max(flops, key=lambda name: flops[name])
    most = f"most for {longest}, {flops[longest]:.3g}"
    rows["compute"] = (
        f"{sum(flops.values()):.3g} FLOPs in training, {units(model.flops_per_token)} per token; {most}"
    )
    rows["memory"] = (
        f"{units(4 * STATE_BYTES // 3 * model.n_parameters, 'B')} for weights, gradients and optimiser, on each GPU of a training"
    )
    if machine is None or config.train.precision == "float32":
        rows["GPU-hours"] = "unknown: no GPU is asked for, or one in float32"
        return _aligned(rows)
    hours = {name: n / (MFU * machine.peak_flops) / 3600 for name, n in flops.items()}
    speed = f"{MFU:.0%} of the {machine.peak_flops / 1e12:.0f} bf16 TFLOP/s of {machine.gpu}"
    rows["GPU-hours"] = f"{duration(sum(hours.values()))} at {speed}"
    for name in dict.fromkeys(["seed", "0", longest]):
        wall = hours[name] / machine.n_gpus
        n = n_chained(wall, machine.runtime_min, machine.notice_s)
        chain = (
            f", so {n} time limits of {duration(machine.runtime_min / 60)} one after another" if n > 1 else ""
        )
        rows[f"expert {name}" if name.isdecimal() else name] = (
            f"{duration(wall)} on {machine.n_gpus} GPU{chain}"
        )
    return _aligned(rows)


def _aligned(rows: Mapping[str, str]) -> str:
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items())
