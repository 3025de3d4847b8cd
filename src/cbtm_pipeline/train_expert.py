"""Train one expert, or the seed model that experts start from: AdamW on one device, exactly resumable.

    python -m cbtm_pipeline.train_expert --config results/config.json --expert 0 --data results/assignments/manifest.json \\
        --tokenizer results/tokenizer/tokenizer.json --seed-model results/experts/seed/model.safetensors \\
        --out results/experts/0/model.safetensors --work results/work/0 --threads 1

Equal inputs and an equal number of threads give equal weights, bit by bit, however often the training was stopped on the way: state is
saved in --work every run.checkpoint_seconds, and on SIGTERM, SIGUSR1 and SIGUSR2 after the current step (exit status 85: saved, start
again). Once the weights are published the state is removed, so that whoever deletes them and starts again trains from the seed.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cbtm_pipeline import artifact, batches, checkpoint, cli, config, expert, lock, model, plan, tokens, training_log
from cbtm_pipeline.cli import log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVED = 85  # exit status: stopped by a signal, state saved
MAX_REPEATS = 4  # text read more often than this teaches little (Muennighoff et al. 2023)


class Data(NamedTuple):
    """The tokens that an expert reads, and where they are from: `made_from` for its card, `corpus` the identity of shards/manifest.json."""

    stream: batches.Stream
    manifest: dict[str, Any]
    made_from: dict[str, str]
    corpus: str


def read_data(path: Path, data: str, group: int) -> Data:
    """Map the tokens of an expert; `data` and `group` are its plan's. Raises ValueError when a file is not what the manifest says."""
    manifest = artifact.read_json(path, "shards" if data == "corpus" else "assignments")
    if data != "corpus" and ("clusterer" in manifest["made_from"]) != (data == "clusters"):
        raise ValueError(f"{path}: other clusters. Expected {data}. Give assignments/manifest.json or random/manifest.json.")
    segments = []
    for entry in manifest["shards"]:
        if entry.get("split") == "eval":
            continue
        file = path.with_name(f"{entry['name']}.arrow")
        if tokens.read_meta(file)["made_from"] != manifest["made_from"]:
            raise ValueError(f"{file}: made from something else than its manifest. Expected both from one run. Make {path} again.")
        segments.append(tokens.read(file, group).values)
    stream = batches.Stream(segments)
    if data == "corpus":
        expected = sum(s["n_tokens"] + s["n_documents"] for s in manifest["shards"] if s["split"] == "train")
    else:
        expected = manifest["n_tokens"][group] + manifest["n_documents"][group]
    if stream.n_tokens != expected:
        raise ValueError(f"{path}: {stream.n_tokens} tokens in its files. Expected {expected}. Make {path} again.")
    identity = artifact.identity(path)
    name = {"corpus": "shards", "clusters": "assignments", "random": "random"}[data]
    return Data(stream, manifest, {name: identity}, identity if data == "corpus" else manifest["made_from"]["shards"])


def learning_rate(step: int, n_steps: int, lr: float, schedule: str, final_lr_ratio: float, warmup_ratio: float) -> float:
    """The rate of step 0 ... n_steps - 1: up in equal parts to lr, then down on a line or a cosine to final_lr_ratio * lr at the last."""
    n_warmup = math.ceil(warmup_ratio * n_steps)
    if step < n_warmup:
        return lr * (step + 1) / n_warmup
    done = (step + 1 - n_warmup) / (n_steps - n_warmup)
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return lr * (final_lr_ratio + (1 - final_lr_ratio) * left)


def use_bf16(precision: str) -> bool:
    """Whether to train under bf16 autocast. Weights, optimiser and loss are float32 in any case."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def make_optimizer(net: torch.nn.Module, how: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": how["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=how["lr"], betas=tuple(how["betas"]), fused=True)


def accumulate(net: "PreTrainedModel", tokens_BT: torch.Tensor, micro_batch_size: int, bf16: bool) -> torch.Tensor:
    """Add the gradient of the mean loss of a batch (int64, (B, T + 1)) to the parameters; return that loss (nats per token, float32)."""
    n_targets = tokens_BT[:, 1:].numel()
    total = torch.zeros((), device=tokens_BT.device)
    for micro_BT in tokens_BT.split(micro_batch_size):
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=bf16):
            logits_BTV = net(input_ids=micro_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), micro_BT[:, 1:].flatten(), reduction="sum") / n_targets
        loss.backward()
        total += loss.detach()
    return total


def train(
    net: "PreTrainedModel",
    stream: batches.Stream,
    how: dict[str, Any],
    run: config.Run,
    state: Path,
    fingerprint: str,
    stop: Callable[[], Any],
) -> bool:
    """Train `net` by the plan `how`, from the state saved in folder `state` if there is one. False: `stop()` came true, state is saved.

    Raises ValueError before a step whose loss or gradient is no finite number.
    """
    n_steps, n_tokens, bf16 = how["n_steps"], how["batch_size"] * how["seq_len"], use_bf16(how["precision"])
    schedule = {key: how[key] for key in ("n_steps", "lr", "schedule", "final_lr_ratio", "warmup_ratio")}
    order = 2 * how["rng_seed"] + (how["expert"] != "seed")  # experts do not read again, in the same order, what the seed has read
    device = model.to_device(net.train())
    optimizer = make_optimizer(net, how)
    first = 0
    if saved := checkpoint.load(state, fingerprint):
        checkpoint.restore(saved.tensors, net, optimizer)
        first = saved.step
        log.info("going on after step %d", first)
    progress = training_log.Progress(n_steps, first, model.flops_per_token(net, how["seq_len"]), run.log_seconds)
    saved_at = time.monotonic()

    with training_log.Metrics(state / "metrics.jsonl", first) as metrics:
        for step in range(first, n_steps):
            began = time.monotonic()
            torch.manual_seed(((how["rng_seed"] << 32) + step) % 2**63)  # dropout, where a pretrained model has it
            tokens_BT = torch.from_numpy(batches.batch(stream, order, step, how["batch_size"], how["seq_len"])).to(device)
            loss = accumulate(net, tokens_BT, how["micro_batch_size"], bf16)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), how["clip_norm"])
            row = {"step": step + 1, "loss": loss.item(), "grad_norm": norm.item(), "lr": learning_rate(step, **schedule)}
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                raise ValueError(
                    f"expert {how['expert']}, step {step + 1}: loss {row['loss']}, gradient norm {row['grad_norm']}. Expected finite "
                    f"numbers. Lower train.lr or train.clip_norm; the last good state is kept in {state}."
                )
            for group in optimizer.param_groups:
                group["lr"] = row["lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            now = time.monotonic()
            metrics.add({**row, "n_tokens": (step + 1) * n_tokens, "tokens_per_s": n_tokens / (now - began), "time": time.time()})
            if progress.add(n_tokens, row):
                metrics.sync(durable=False)
            stopping = stop() and step + 1 < n_steps
            if stopping or now - saved_at >= run.checkpoint_seconds:
                metrics.sync()
                checkpoint.save(state, step + 1, fingerprint, checkpoint.capture(net, optimizer))
                saved_at = time.monotonic()
            if stopping:
                log.info("told to stop: state saved after step %d of %d, start again to go on", step + 1, n_steps)
                return False
    return True


class Files(NamedTuple):
    """Paths of a training. `seed_model` is None for the seed."""

    data: Path
    tokenizer: Path
    seed_model: Path | None
    out: Path
    work: Path


def start_from(files: Files, how: dict[str, Any], data: Data) -> tuple["PreTrainedModel", dict[str, str]]:
    """The model before its first step, and what `made_from` says of it."""
    tokenizer = artifact.identity(files.tokenizer)
    if files.seed_model is None:
        artifact.check_made_from(files.data, data.manifest, "tokenizer", tokenizer)
        vocab_size = data.manifest["vocab_size"]
        if how["pretrained"] is not None:
            return model.pretrained(how["pretrained"], vocab_size, how["seq_len"]), {}
        return model.scratch(how["scratch"], vocab_size, data.manifest["separator_id"], how["seq_len"], how["rng_seed"]), {}
    card = expert.read_card(files.seed_model)
    artifact.check_made_from(files.seed_model, card, "shards", data.corpus)
    if card["tokenizer"] != tokenizer:
        raise ValueError(f"{files.tokenizer}: not the tokenizer of the seed model. Expected identity {card['tokenizer']}. Check the paths.")
    return model.load(files.seed_model.parent), {"seed": card["weights"]}


def train_and_publish(how: dict[str, Any], run: config.Run, files: Files, stop: Callable[[], Any], waited: bool = False) -> bool:
    """Train by the plan `how` and publish the expert's folder, its weights last. False: stopped on the way, state is saved.

    `waited`: another process was here before, and may have published the very same already.
    """
    data = read_data(files.data, how["data"], how["group"])
    net, seed = start_from(files, how, data)
    made_from = {**data.made_from, **seed}
    n_train_tokens = how["n_steps"] * how["batch_size"] * how["seq_len"]
    precision = "bf16 autocast" if use_bf16(how["precision"]) else "float32"
    _announce(net, how, data.stream.n_tokens, n_train_tokens, precision)

    state = files.work / "state"
    if waited and expert.is_published(files.out, how, made_from):
        checkpoint.discard(state)
        log.info("%s was published meanwhile", files.out)
        return True
    if not train(net, data.stream, how, run, state, artifact.fingerprint({"plan": how, "made_from": made_from}), stop):
        return False
    losses = [row["loss"] for row in training_log.read(state / "metrics.jsonl")[-10:]]
    flops_per_token = model.flops_per_token(net, how["seq_len"])
    card = artifact.make_meta(
        "expert",
        made_from,
        expert=how["expert"],
        plan=how,
        corpus=data.corpus,
        tokenizer=artifact.identity(files.tokenizer),
        n_parameters=model.n_parameters(net),
        n_train_tokens=n_train_tokens,
        flops_per_token=flops_per_token,
        train_flops=flops_per_token * n_train_tokens,
        precision=precision,
        final_loss=sum(losses) / len(losses) if losses else None,
    )
    card = expert.publish(files.out, net, files.tokenizer, state / "metrics.jsonl", card)
    checkpoint.discard(state)
    log.info("published %s (%s)", files.out, card["weights"])
    return True


def _announce(net: "PreTrainedModel", how: dict[str, Any], n_tokens: int, n_train_tokens: int, precision: str) -> None:
    size = f"{type(net).__name__} with {model.n_parameters(net):,} parameters"
    steps = f"{how['n_steps']} steps of {how['batch_size']} sequences"
    log.info("%s, %s, %s training tokens from a text of %s, %s", size, steps, f"{n_train_tokens:,}", f"{n_tokens:,}", precision)
    if n_train_tokens > MAX_REPEATS * n_tokens:
        log.warning(
            "reads its text %.1f times; more than %d times teaches little: lower train.steps or give more text",
            n_train_tokens / n_tokens,
            MAX_REPEATS,
        )


def make_deterministic(n_threads: int) -> None:
    """Let equal inputs give equal bits on this machine, whatever the device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]
    torch.set_num_threads(n_threads)


def main() -> None:
    p = cli.parser(__doc__)
    p.add_argument("--expert", required=True, help="seed, 0 ... k-1, dense, dense-batch, dense-steps, random-0 ...")
    p.add_argument("--data", required=True, type=Path, help="manifest.json of shards, assignments or random, as the expert needs")
    p.add_argument("--tokenizer", required=True, type=Path, help="tokenizer.json; the files beside it go into the expert's folder")
    p.add_argument("--seed-model", type=Path, help="model.safetensors to start from; for every expert but the seed")
    p.add_argument("--out", required=True, type=Path, help="model.safetensors to publish; the rest of the folder goes beside it")
    p.add_argument("--work", required=True, type=Path, help="folder for the resumable state")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    cfg = config.read(args.config)
    if args.expert not in ["seed", *plan.experts(cfg)]:
        p.error(f"--expert: {args.expert}. Expected one of {', '.join(['seed', *plan.experts(cfg)])}.")
    if (args.seed_model is None) != (args.expert == "seed"):
        p.error("--seed-model: expected for every expert but the seed.")
    if args.out.name != expert.WEIGHTS:
        p.error(f"--out: {args.out.name}. Expected {expert.WEIGHTS}.")
    cli.start_logging(f"expert {args.expert}", args.log)
    waited = lock.hold(args.work, wait=True)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: stopping.append(number))
    make_deterministic(args.threads)
    how = config.parameters(cfg, "train_expert", args.expert)
    files = Files(args.data, args.tokenizer, args.seed_model, args.out, args.work)
    if not train_and_publish(how, cfg.run, files, lambda: stopping, waited):
        sys.exit(SAVED)


if __name__ == "__main__":
    cli.run(main)
