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

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli, lock
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.plan import SeedPlan, TrainingPlan
from cbtm_pipeline.training import (
    checkpoint,
    distributed,
    expert_folder,
    loop,
    model,
    placement,
    training_log,
)
from cbtm_pipeline.training import data as training_data
from cbtm_pipeline.training import step as train_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_REPEATS = 4  # text read more often than this teaches little (Muennighoff et al. 2023)


class Files(NamedTuple):
    """Paths of a training. `seed_model` is None for the seed."""

    data: Path
    tokenizer: Path
    seed_model: Path | None
    out: Path
    work: Path


class Start(NamedTuple):
    """The model before its first step, what `made_from` says of it, and its commit if it is from the hub."""

    net: "PreTrainedModel"
    made_from: dict[str, str]
    commit: str | None


def start_from(files: Files, plan: TrainingPlan, data: training_data.Data) -> Start:
    """The model before its first step."""
    tokenizer = artifact.identity(files.tokenizer)
    if isinstance(plan, SeedPlan):
        artifact.check_made_from(files.data, data.manifest, "tokenizer", tokenizer)
        vocab_size = data.manifest["vocab_size"]
        if plan.pretrained is not None:
            net, commit = model.pretrained(plan.pretrained, plan.revision, vocab_size, plan.seq_len)
            return Start(net, {}, commit)
        separator_id = data.manifest["separator_id"]
        return Start(
            model.scratch(plan.scratch, vocab_size, separator_id, plan.seq_len, plan.rng_seed), {}, None
        )
    assert files.seed_model is not None
    card = expert_folder.read_card(files.seed_model)
    artifact.check_made_from(files.seed_model, card, "shards", data.corpus)
    if card["tokenizer"] != tokenizer:
        raise ValueError(
            f"{files.tokenizer}: not the tokenizer of the seed model. Expected identity {card['tokenizer']}. Check the paths."
        )
    return Start(model.load(files.seed_model.parent), {"seed": card["weights"]}, None)


def train_and_publish(
    plan: TrainingPlan,
    run: config.Run,
    files: Files,
    stop: Callable[[], Any],
    waited: bool = False,
    group: distributed.Group = distributed.ALONE,
) -> bool:
    """Train by the plan `plan` and publish the expert's folder, its weights last. False: stopped on the way, state is saved.

    `waited`: another process was here before, and may have published the very same already.
    """
    data = training_data.read(files.data, plan)
    start = start_from(files, plan, data)
    net, made_from = start.net, {**data.made_from, **start.made_from}
    precision = "bf16 autocast" if train_step.use_bf16(plan.precision) else "float32"
    _announce(net, plan, data.stream.n_tokens, precision)

    state = files.work / "state"
    if group.first_does("look", lambda: waited and expert_folder.is_published(files.out, plan, made_from)):
        if group.rank == 0:
            checkpoint.discard(state)
            log.info("%s was published meanwhile", files.out)
        return True
    fingerprint = artifact.fingerprint({"plan": plan.content(), "made_from": made_from})
    n_steps = loop.train(net, data.stream, plan, run, state, fingerprint, stop, group, data.validation)
    if n_steps is None:
        return False
    net = placement.gathered(net, group.rank == 0)
    if net is None:
        return True
    n_train_tokens = n_steps * plan.step_tokens
    losses, looks = training_log.history(state / "metrics.jsonl", 10)
    flops_per_token = model.flops_per_token(net, plan.seq_len)
    card = artifact.make_meta(
        "expert",
        made_from,
        expert=plan.expert,
        plan=plan.content(),
        corpus=data.corpus,
        tokenizer=artifact.identity(files.tokenizer),
        **({"pretrained_commit": start.commit} if start.commit else {}),
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


def _announce(net: "PreTrainedModel", plan: TrainingPlan, n_tokens: int, precision: str) -> None:
    n_train_tokens = plan.n_steps * plan.step_tokens
    size = f"{type(net).__name__} with {model.n_parameters(net):,} parameters"
    steps = f"{plan.n_steps} steps of {plan.batch_size} sequences"
    log.info(
        "%s, %s, %s training tokens from a text of %s, %s",
        size,
        steps,
        f"{n_train_tokens:,}",
        f"{n_tokens:,}",
        precision,
    )
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
    p.add_argument(
        "--expert", required=True, help="seed, 0 ... k-1, dense, dense-batch, dense-steps, random-0 ..."
    )
    p.add_argument(
        "--data",
        required=True,
        type=Path,
        help="manifest.json of shards, assignments or random, as the expert needs",
    )
    p.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        help="tokenizer.json; the files beside it go into the expert's folder",
    )
    p.add_argument(
        "--seed-model", type=Path, help="model.safetensors to start from; for every expert but the seed"
    )
    p.add_argument(
        "--out",
        required=True,
        type=Path,
        help="model.safetensors to publish; the rest of the folder goes beside it",
    )
    p.add_argument("--work", required=True, type=Path, help="folder for the resumable state")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    cfg = config.read(args.config)
    if args.expert not in ["seed", *plans.experts(cfg)]:
        p.error(f"--expert: {args.expert}. Expected one of {', '.join(['seed', *plans.experts(cfg)])}.")
    if (args.seed_model is None) != (args.expert == "seed"):
        p.error("--seed-model: expected for every expert but the seed.")
    if args.out.name != expert_folder.WEIGHTS:
        p.error(f"--out: {args.out.name}. Expected {expert_folder.WEIGHTS}.")
    plan = plans.train_expert(cfg, args.expert)
    group = distributed.from_environment(os.environ)
    if plan.batch_size < group.world_size:
        raise ValueError(
            f"WORLD_SIZE: {group.world_size} processes for expert {args.expert}. Expected at most {plan.batch_size}, the sequences of "
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
        finished = train_and_publish(plan, cfg.run, files, lambda: stopping, waited, group)
    if not finished:
        sys.exit(cli.EXIT_SAVED)


if __name__ == "__main__":
    cli.run(main)
