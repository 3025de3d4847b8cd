"""What a run costs, from its config alone: jobs, tokens, compute, disk.

All is arithmetic, except `size`, which asks the model's own classes. Only the sizes of the corpus files are
known, so all that follows from the corpus is an estimate. It assumes documents of 2 kB, one token per 3
bytes, and text that is 3 or 4 times as large as its compressed file. For the demo, without states, the
estimate is 12 % below the real use of disk.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from cbtm_pipeline import plan, plan_first, plan_search
from cbtm_pipeline.base import hub
from cbtm_pipeline.base.duration import duration
from cbtm_pipeline.base.errors import first_sentence
from cbtm_pipeline.config import Config
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import tokenizer_config
from cbtm_pipeline.provenance import stale

MFU = 0.4  # the share of a GPU's peak that we assume for a training
DEMO_BYTES = 9_550_000  # text of the built-in corpus
DOCUMENT_BYTES, TOKEN_BYTES = 2000, 3  # text per document and per token
STATES = 3  # a training keeps two saved states while it writes a third
STATE_BYTES = 12  # per parameter in a saved state: the parameter and AdamW's two moments, float32


class Size(NamedTuple):
    """The size of a model. `flops_per_token`: of a training, by model.flops_per_token."""

    n_parameters: int
    flops_per_token: int
    vocab_size: int


class TextBytes(NamedTuple):
    """About how many bytes of text a corpus has."""

    train: float
    held_out: float


class Machine(NamedTuple):
    """What a training runs on: GPUs of one kind; on Slurm, a time limit in minutes, its notice in seconds."""

    gpu: str
    peak_flops: float
    n_gpus: int
    runtime_min: float = math.inf
    notice_s: float = 0.0


def n_jobs(config: Config) -> dict[str, int]:
    """The number of jobs of each rule, from the first rule to the last."""
    n_experts, searched = 1 + len(plan.experts(config)), plan.searched(config)
    demo = corpus_files.DEMO in [*config.corpus.train, *(config.corpus.eval or [])]
    random = "random" in config.train.controls
    once = ["tokenizer", "shard", "embed", "fit_kmeans", "assign", "route", "eval_ensemble", "report"]
    return {
        **({"demo_corpus": 1} if demo else {}),
        **dict.fromkeys(once, 1),
        **({"assign_random": 1} if random else {}),
        **({"ensemble": 1} if stale.packs(config) else {}),
        **({"score_training": config.cluster.k, "second_round": 1} if config.cluster.second_round else {}),
        "train_expert": len(plan.trainings(config)),
        **({"choose": len(searched), "adopt": sum(map(len, searched.values()))} if searched else {}),
        "score_expert": n_experts,
        **({"eval_task": len(models), "tasks_table": 1} if (models := stale.task_models(config)) else {}),
    }


def batches(config: Config) -> dict[str, int]:
    """Sequences per step of each expert that is trained, the seed first."""
    return {name: p.batch_size for name, p in plan.trainings(config).items() if p.n_steps}


def n_tokens(config: Config) -> dict[str, int]:
    """Training tokens of each training, the seed first. dense-large reads fewer, as a token costs it more: so
    many cost an expert's model what dense-large costs.
    """
    return {name: p.n_steps * p.step_tokens for name, p in plan.trainings(config).items()}


def text_bytes(files: Iterable[str]) -> float:
    """About how many bytes of text the files of a corpus hold. Raises OSError for a missing file."""
    total = 0.0
    for file in files:
        if file == corpus_files.DEMO:
            total += DEMO_BYTES
        else:
            total += Path(file).stat().st_size * corpus_files.unpacked(file)
    return total


def corpus(config: Config) -> TextBytes:
    """The split that rule `shard` will make. Raises what corpus_files.find raises."""
    train = text_bytes(corpus_files.find(config.corpus.train, None, config.outdir))
    if config.corpus.eval:
        return TextBytes(train, text_bytes(corpus_files.find(config.corpus.eval, None, config.outdir)))
    return TextBytes((1 - config.corpus.eval_fraction) * train, config.corpus.eval_fraction * train)


def disk(config: Config, model: Size, text: TextBytes, n_dimensions: int, n_running: int) -> dict[str, float]:
    """Bytes under outdir when it is fullest, by kind. `n_running`: how many trainings run at once."""
    experts, k = plan.experts(config), config.cluster.k
    both, width = text.train + text.held_out, 2 if model.vocab_size <= 1 << 16 else 4
    groupings = 1 + ("random" in config.train.controls) + config.cluster.second_round
    lent = 1 / (1 - config.cluster.border_share)  # documents that are lent stand twice
    grouped = text.train * (groupings - 1 + lent)
    per_document = config.eval.max_document_tokens or math.inf
    n_scored = min(text.held_out / TOKEN_BYTES, text.held_out / DOCUMENT_BYTES * per_document)
    return {
        "text and tokens": both / 2 + (both + grouped) / TOKEN_BYTES * width,
        "vectors": both / DOCUMENT_BYTES * n_dimensions * 4,
        "weights": 4 * model.n_parameters * _n_models(config),
        "states of running trainings": STATES * STATE_BYTES * model.n_parameters * n_running,
        "scores and distances": 4 * n_scored * (1 + len(experts) + k),
    }


def _n_models(config: Config) -> int:
    """How many models of an expert's size have the size of all models together."""
    trainings = plan.trainings(config).values()
    return sum(p.depth if isinstance(p, plan.LargePlan) else 1 for p in trainings)


def peak(gpu: str, peaks: Mapping[str, float]) -> tuple[str, float] | None:
    """Product name and FLOP/s of the GPU that Slurm calls `gpu` (a100, nvidia_h100_pcie); None if unknown.

    `peaks` holds FLOP/s by product name; the first name that fits counts.
    """
    for name, flops in peaks.items():
        if re.search(r"[^a-z0-9]*".join(re.findall(r"[a-z]+|\d+", name.lower())) + r"(?!\d)", gpu.lower()):
            return name, flops
    return None


def n_chained(hours: float, runtime_min: float, notice_s: float) -> int:
    """How many jobs of `runtime_min` minutes, one after another, a training of `hours` hours needs."""
    return max(1, math.ceil(hours * 60 / max(runtime_min - notice_s / 60, 1e-9)))


def seconds_to_save(model: Size, write_rate: float) -> float:
    """Seconds to save a state: hash it (1 GB/s), write it (`write_rate`, bytes/s), read it, hash it again."""
    return STATE_BYTES * model.n_parameters * (1 / write_rate + 2e-9)


def seconds_to_stop(model: Size, batch_tokens: int, machine: Machine | None, write_rate: float) -> float:
    """Seconds from a signal to the saved state. Slurm's notice has to be longer.

    First end the current step and the one that the GPU has in its queue (0 s if `machine`, and so the speed,
    is unknown). Then come two saves: the signal may find the training at the start of another one.
    """
    step = 0.0
    if machine:
        flops = model.flops_per_token * batch_tokens
        step = flops / (MFU * machine.peak_flops * machine.n_gpus)
    return 2 * (step + seconds_to_save(model, write_rate))


def size(config: Config, folder: Path | None, n_tokens: int | None = None) -> Size:
    """The size of the seed model: of config.json in `folder`, or without a folder of model.scratch.
    `n_tokens` are those of a pretrained tokenizer, where that is known.

    Makes and reads no weights. Takes seconds, as it imports torch and transformers. Raises ValueError for a
    model that the rule train_expert would refuse.
    """
    import torch

    from cbtm_pipeline.training import model

    seq_len, vocab_size = config.train.seq_len, n_tokens or config.tokenizer.vocab_size
    with torch.device("meta"):
        if folder is None:
            net = model.scratch(plan.scratch(config), vocab_size, 0, seq_len, 0)
        else:
            from transformers import AutoConfig, AutoModelForCausalLM

            try:
                net = AutoModelForCausalLM.from_config(hub.load(AutoConfig, folder), dtype=torch.float32)
            except Exception as error:  # each kind of model raises other types
                found = first_sentence(error)
                raise ValueError(
                    f"model: {folder} has no size ({found}). Expected a causal language model. Correct it."
                ) from error
    text = net.config.get_text_config()
    n_positions = tokenizer_config.n_positions(text)
    if n_positions is not None and n_positions < seq_len:
        expected = f"at most {n_positions}, the positions of the model"
        raise ValueError(f"train.seq_len: {seq_len}. Expected {expected}. Lower train.seq_len.")
    return Size(model.n_parameters(net), model.flops_per_token(net, seq_len), text.vocab_size)


def units(value: float, unit: str = "") -> str:
    """A number as text with a decimal prefix: units(4.1e12, "B") is 4.1 TB."""
    power = min(5, max(0, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}{unit}".strip()


def table(config: Config, submitted: Collection[str], model: Size | None, machine: Machine | None) -> str:
    """Jobs, tokens, compute and time of a run as aligned text. `submitted`: the rules that go to Slurm.

    Without a `model`, compute and time are unknown; without a `machine`, the time.
    """
    rows = {"jobs": _jobs(config, submitted), "tokens": _tokens(config)}
    if model is None:
        rows["compute"] = "unknown, as the model is not here"
    else:
        rows |= _compute(config, model)
        rows |= _hours(config, model, machine)
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items())


def _jobs(config: Config, submitted: Collection[str]) -> str:
    jobs = {rule: n for rule, n in n_jobs(config).items() if rule in submitted}
    many = [f"{n} {rule}" for rule, n in jobs.items() if n > 1]
    others = f"{len(jobs) - len(many)} of other rules"
    return f"{sum(jobs.values())} on Slurm: {', '.join([*many, others])}" if jobs else "none on Slurm"


def _tokens(config: Config) -> str:
    tokens = n_tokens(config)
    k, n_random = config.cluster.k, len(plan.random_experts(config))
    parts = [f"{name} {_each(config, name, tokens)}" for name in ["seed", *plan.dense_experts(config)]]
    if firsts := plan_first.firsts(config):
        parts += [f"{plan_search.kind(firsts[0])} {len(firsts)} x {_each(config, firsts[0], tokens)}"]
    parts += [f"experts {k} x {_each(config, '0', tokens)}"]
    parts += [f"random experts {n_random} x {_each(config, 'random-0', tokens)}"] if n_random else []
    return f"{units(sum(tokens.values()))} in training: {', '.join(parts)}"


def _each(config: Config, expert: str, tokens: Mapping[str, int]) -> str:
    """The training tokens of an expert, with the number of learning rates that are tried."""
    names = plan_search.candidates(config, expert)
    fewer = "at most " if expert == plan.LARGE else ""
    rates = f" x {len(names)} rates" if names else ""
    return f"{fewer}{units(tokens[(names or [expert])[0]])}{rates}"


def _flops(config: Config, model: Size) -> dict[str, float]:
    """FLOPs of each training."""
    return {name: n * model.flops_per_token for name, n in n_tokens(config).items()}


def _second_round(config: Config, model: Size) -> float:
    """FLOPs at most to score documents with the experts of the first round: a forward pass is a third of a
    training's, and fewer or shorter documents need less.
    """
    n_read = config.cluster.fit_documents * config.train.seq_len
    return config.cluster.k * n_read * model.flops_per_token / 3


def _compute(config: Config, model: Size) -> dict[str, str]:
    flops = _flops(config, model)
    longest = max(flops, key=lambda name: flops[name])
    large = ", at most twice that for dense-large" if plan.LARGE in config.train.controls else ""
    each = f"{units(model.flops_per_token)} per token; most for {longest}, {flops[longest]:.3g}"
    memory = units(4 * STATE_BYTES // 3 * model.n_parameters, "B")
    second = f"; at most {_second_round(config, model):.3g} to score the documents of the second round"
    return {
        "compute": f"{sum(flops.values()):.3g} FLOPs in training, {each}"
        + (second if config.cluster.second_round else ""),
        "memory": f"{memory} for weights, gradients and optimiser, on each GPU of a training{large}",
    }


def _hours(config: Config, model: Size, machine: Machine | None) -> dict[str, str]:
    """GPU-hours of the run, and how long the seed, expert 0 and the longest training take."""
    if machine is None or config.train.precision == "float32":
        return {"GPU-hours": "unknown: no GPU is asked for, or one in float32"}
    hours = {name: n / (MFU * machine.peak_flops) / 3600 for name, n in _flops(config, model).items()}
    speed = f"{MFU:.0%} of the {machine.peak_flops / 1e12:.0f} bf16 TFLOP/s of {machine.gpu}"
    rows = {"GPU-hours": f"{duration(3600 * sum(hours.values()))} at {speed}"}
    some = [(plan_search.candidates(config, name) or [name])[0] for name in ("seed", "0")]
    for name in dict.fromkeys([*some, max(hours, key=lambda name: hours[name])]):
        wall = hours[name] / machine.n_gpus
        n = n_chained(wall, machine.runtime_min, machine.notice_s)
        limit = duration(60 * machine.runtime_min) if n > 1 else ""
        chain = f", so {n} time limits of {limit} one after another" if n > 1 else ""
        expert = plan_search.base(name)
        title = f"expert {expert}" if expert.isdecimal() else expert
        rows[title] = f"{duration(3600 * wall)} on {machine.n_gpus} GPU{chain}"
    return rows
