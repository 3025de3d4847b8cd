"""Train one expert, or the seed model that experts start from: AdamW on one device or several, exactly resumable.

    python -m cbtm_pipeline.train_expert --config results/config.json --expert 0 --data results/assignments/manifest.json \\
        --tokenizer results/tokenizer/tokenizer.json --seed-model results/experts/seed/model.safetensors \\
        --out results/experts/0/model.safetensors --work results/work/0 --threads 1

Equal inputs and an equal number of threads give equal weights, bit by bit, however often the training was stopped on the way: state is
saved in --work every run.checkpoint_seconds, and on SIGTERM, SIGUSR1 and SIGUSR2 after the current step (exit status 85: saved, start
again). Once the weights are published the state is removed, so that whoever deletes them and starts again trains from the seed.

Started WORLD_SIZE times by torchrun or srun, the processes share each batch among them. The plan does not know how many there are: a state
that other numbers of processes have saved is taken up, and the sums of its further steps are rounded in another order.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cbtm_pipeline import config, plan
from cbtm_pipeline.base import artifact, cli, lock
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.corpus import token_files
from cbtm_pipeline.training import batches, checkpoint, distributed, expert_folder, loop, model, placement, training_log, validation
from cbtm_pipeline.training import step as train_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVED = 85  # exit status: stopped by a signal, state saved
MAX_REPEATS = 4  # text read more often than this teaches little (Muennighoff et al. 2023)


class Data(NamedTuple):
    """The tokens that an expert reads, and where they are from: `made_from` for its card, `corpus` the identity of shards/manifest.json."""

    stream: batches.Stream
    validation: batches.Stream | None
    manifest: dict[str, Any]
    made_from: dict[str, str]
    corpus: str


def read_data(path: Path, how: dict[str, Any]) -> Data:
    """Map the tokens that an expert reads by its plan `how`. Raises ValueError when a file is not what the manifest says."""
    data, group = how["data"], how["group"]
    manifest = artifact.read_json(path, "shards" if data == "corpus" else "assignments")
    if data != "corpus" and ("clusterer" in manifest["made_from"]) != (data == "clusters"):
        raise ValueError(f"{path}: other clusters. Expected {data}. Give assignments/manifest.json or random/manifest.json.")
    segments = []
    for entry in manifest["shards"]:
        if entry.get("split") == "eval":
            continue
        file = path.with_name(f"{entry['name']}.arrow")
        if token_files.read_meta(file)["made_from"] != manifest["made_from"]:
            raise ValueError(f"{file}: made from something else than its manifest. Expected both from one run. Make {path} again.")
        segments.append(token_files.read(file, group).values)
    stream = batches.Stream(segments)
    if data == "corpus":
        expected = sum(s["n_tokens"] + s["n_documents"] for s in manifest["shards"] if s["split"] == "train")
    else:
        expected = manifest["n_tokens"][group] + manifest["n_documents"][group]
    if stream.n_tokens != expected:
        raise ValueError(f"{path}: {stream.n_tokens} tokens in its files. Expected {expected}. Make {path} again.")
    identity = artifact.identity(path)
    name = {"corpus": "shards", "clusters": "assignments", "random": "random"}[data]
    return Data(
        stream,
        validation.stream(path, manifest, how),
        manifest,
        {name: identity},
        identity if data == "corpus" else manifest["made_from"]["shards"],
    )


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
    card = expert_folder.read_card(files.seed_model)
    artifact.check_made_from(files.seed_model, card, "shards", data.corpus)
    if card["tokenizer"] != tokenizer:
        raise ValueError(f"{files.tokenizer}: not the tokenizer of the seed model. Expected identity {card['tokenizer']}. Check the paths.")
    return model.load(files.seed_model.parent), {"seed": card["weights"]}


def train_and_publish(
    how: dict[str, Any],
    run: config.Run,
    files: Files,
    stop: Callable[[], Any],
    waited: bool = False,
    group: distributed.Group = distributed.ALONE,
) -> bool:
    """Train by the plan `how` and publish the expert's folder, its weights last. False: stopped on the way, state is saved.

    `waited`: another process was here before, and may have published the very same already.
    """
    data = read_data(files.data, how)
    net, seed = start_from(files, how, data)
    made_from = {**data.made_from, **seed}
    precision = "bf16 autocast" if train_step.use_bf16(how["precision"]) else "float32"
    _announce(net, how, data.stream.n_tokens, precision)

    state = files.work / "state"
    if group.first_does("look", lambda: waited and expert_folder.is_published(files.out, how, made_from)):
        if group.rank == 0:
            checkpoint.discard(state)
            log.info("%s was published meanwhile", files.out)
        return True
    fingerprint = artifact.fingerprint({"plan": how, "made_from": made_from})
    n_steps = loop.train(net, data.stream, how, run, state, fingerprint, stop, group, data.validation)
    if n_steps is None:
        return False
    net = placement.gathered(net, group.rank == 0)
    if net is None:
        return True
    n_train_tokens = n_steps * how["batch_size"] * how["seq_len"]
    losses, looks = training_log.history(state / "metrics.jsonl", 10)
    flops_per_token = model.flops_per_token(net, how["seq_len"])
    card = artifact.make_meta(
        "expert",
        made_from,
        expert=how["expert"],
        plan=how,
        corpus=data.corpus,
        tokenizer=artifact.identity(files.tokenizer),
        n_parameters=model.n_parameters(net),
        n_steps=n_steps,
        n_train_tokens=n_train_tokens,
        flops_per_token=flops_per_token,
        train_flops=flops_per_token * n_train_tokens,
        precision=precision,
        final_loss=sum(losses) / len(losses) if losses else None,
        validation_loss=looks[-1] if looks else None,
    )
    lock.check()
    card = expert_folder.publish(files.out, net, files.tokenizer, state / "metrics.jsonl", card)
    checkpoint.discard(state)
    log.info("published %s (%s)", files.out, card["weights"])
    return True


def _announce(net: "PreTrainedModel", how: dict[str, Any], n_tokens: int, precision: str) -> None:
    n_train_tokens = how["n_steps"] * how["batch_size"] * how["seq_len"]
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
    if args.out.name != expert_folder.WEIGHTS:
        p.error(f"--out: {args.out.name}. Expected {expert_folder.WEIGHTS}.")
    how = config.parameters(cfg, "train_expert", args.expert)
    group = distributed.from_environment(os.environ)
    if how["batch_size"] < group.world_size:
        raise ValueError(
            f"WORLD_SIZE: {group.world_size} processes for expert {args.expert}. Expected at most {how['batch_size']}, the sequences of "
            "its batches. Start fewer processes, or raise train.batch_size (for the seed, train.seed_batch_size)."
        )
    if group.rank == 0:
        cli.start_logging(f"expert {args.expert}", args.log)
    else:
        cli.start_logging(f"expert {args.expert}, process {group.rank}", None)
        log.setLevel(logging.ERROR)
    stopping: list[int] = []
    make_deterministic(args.threads)
    files = Files(args.data, args.tokenizer, args.seed_model, args.out, args.work)
    with distributed.joined(group):
        waited = group.first_does("lock", lambda: lock.hold(args.work, wait=True))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: stopping.append(number))
        finished = train_and_publish(how, cfg.run, files, lambda: stopping, waited, group)
    if not finished:
        sys.exit(SAVED)


if __name__ == "__main__":
    cli.run(main)
