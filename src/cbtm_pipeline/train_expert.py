"""Train one expert, or the seed model that experts start from: exactly resumable, on one device or several.

    python -m cbtm_pipeline.train_expert --config results/config.json --expert 0 \\
        --data results/assignments/manifest.json --tokenizer results/tokenizer/tokenizer.json \\
        --seed-model results/experts/seed/model.safetensors --out results/experts/0/model.safetensors \\
        --work results/work/0 --threads 1

Equal inputs and an equal number of threads give equal weights, bit by bit, however often the training was
stopped. Its state is saved in --work every run.checkpoint_seconds. On Ctrl-C, on the end of the terminal, on
SIGTERM, SIGUSR1 and SIGUSR2 it is saved after the current step, and the exit status is 85: start again to go
on. Once the weights are published, the state is removed. So if you delete the weights and start again, the
expert is trained again from the seed.

torchrun or srun may start this module WORLD_SIZE times. Then the processes share each batch. The plan does
not depend on their number: a training goes on from a state that another number of processes has saved, and
the sums of its further steps are rounded in another order.
"""

import argparse
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cbtm_pipeline import config, plan_added
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli, lock
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.corpus import encoding
from cbtm_pipeline.ops import worded
from cbtm_pipeline.plan import LargePlan, SeedPlan, TrainingPlan
from cbtm_pipeline.provenance import expert_files, made_from
from cbtm_pipeline.training import (
    checkpoint,
    distributed,
    expert_folder,
    large,
    loop,
    model,
    placement,
    training_log,
)
from cbtm_pipeline.training import data as training_data
from cbtm_pipeline.training import step as train_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_TAGS: Mapping[str, str] = {}
STOPS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
MAX_REPEATS = 4  # text read more often than this teaches little (Muennighoff et al. 2023)


class Files(NamedTuple):
    """Paths of a training. `seed_model` is None for the seed."""

    data: Path
    tokenizer: Path
    seed_model: Path | None
    out: Path
    work: Path


class Start(NamedTuple):
    """The model before its first step, the card of the model that it begins as, its commit if it is from the
    hub, and how many steps it is trained for.
    """

    net: "PreTrainedModel"
    card: dict[str, Any] | None
    commit: str | None
    n_steps: int


def start_from(
    files: Files, plan: TrainingPlan, data: training_data.Data, tokenizer: dict[str, Any]
) -> Start:
    """The model before its first step. `tokenizer` is the record of the tokenizer."""
    artifact.check_made_from(files.data, data.manifest, "tokenizer", tokenizer["identity"])
    if isinstance(plan, SeedPlan):
        vocab_size, separator_id = data.manifest["vocab_size"], data.manifest["separator_id"]
        if isinstance(plan, LargePlan):
            net, n_steps = large.scratch(plan, vocab_size, separator_id)
            return Start(net, None, None, n_steps)
        if plan.pretrained is not None:
            n_ids = min(vocab_size, encoding.n_ids_of(files.tokenizer, separator_id))
            net, commit = model.pretrained(plan.pretrained, plan.revision, n_ids, plan.seq_len)
            return Start(net, None, commit, plan.n_steps)
        net = model.scratch(plan.scratch, vocab_size, separator_id, plan.seq_len, plan.rng_seed)
        return Start(net, None, None, plan.n_steps)
    assert files.seed_model is not None
    card = expert_files.read_card(files.seed_model)
    artifact.check_made_from(files.seed_model, card, "tokenizer", tokenizer["identity"])
    if plan.begins not in (None, card["expert"]):
        raise ValueError(
            f"{files.seed_model}: {card['expert']}. Expected {plan.begins}, as which expert {plan.expert} "
            "begins by the config. Give its model.safetensors."
        )
    net = model.load(files.seed_model.parent)
    if plan.only == "feed-forward":
        model.train_feed_forwards_only(net)
    return Start(net, card, None, plan.n_steps)


def train_and_publish(
    plan: TrainingPlan,
    run: config.Run,
    files: Files,
    stop: Callable[[], Any],
    waited: bool = False,
    group: distributed.Group = distributed.ALONE,
    tags: Mapping[str, str] = NO_TAGS,
) -> bool:
    """Train by the plan, and publish the expert's folder, its weights last. False: stopped on the way, state
    is saved.

    `waited`: another process held the folder before, and may have published this very training already.
    `tags` are for the model card.
    """
    data = training_data.read(files.data, plan)
    tokenizer = encoding.read_card(files.tokenizer)
    start = start_from(files, plan, data, tokenizer)
    identities = made_from.train_expert(plan, data.manifest, tokenizer, start.card)
    actual = dataclasses.replace(plan, n_steps=start.n_steps)
    _announce(start.net, actual, data.stream.n_tokens)

    state = files.work / "state"
    if group.first_does("look", lambda: waited and expert_folder.is_published(files.out, plan, identities)):
        if group.rank == 0:
            checkpoint.discard(state)
            log.info("%s was published meanwhile", files.out)
        return True
    fingerprint = artifact.fingerprint({"plan": plan.content(), "made_from": identities})
    task = loop.Task(actual, run, data.stream, data.validation, state, fingerprint)
    n_steps, more = _train(start, task, stop, group)
    if n_steps is None:
        return False
    net = placement.gathered(start.net, group.rank == 0)
    if net is None:
        return True
    metrics = state / "metrics.jsonl"
    about = {**describe(net, plan, n_steps, metrics), **more}
    card = artifact.make_meta("expert", identities, plan.content(), **about)
    lock.check()
    origin = expert_folder.Origin(base_of(plan, start), tags)
    card = expert_folder.publish(files.out, net, files.tokenizer, metrics, card, origin)
    checkpoint.discard(state)
    log.info("published %s (%s)", files.out, card["weights"])
    losses = {"loss": card["final_loss"], "validation": card["validation_loss"]}
    known = "".join(f", {name} {value:.4f}" for name, value in losses.items() if value is not None)
    log.info("%d steps, %d tokens%s", n_steps, card["n_train_tokens"], known)
    return True


def _train(
    start: Start, task: loop.Task, stop: Callable[[], Any], group: distributed.Group
) -> tuple[int | None, dict[str, Any]]:
    """Train. Returns the number of steps, as loop.train does, and what the card says of some trainings only.

    A candidate may diverge: then its model is that of the last good step, and it has no validation loss.
    """
    more: dict[str, Any] = {"pretrained_commit": start.commit} if start.commit else {}
    if task.plan.data in ("parents", "first") and (base := base_of(task.plan, start)) is not None:
        more["base"] = base
    if not task.plan.candidate:
        return loop.train(start.net, task, stop, group), more
    more["n_validation_tokens"] = task.validation.n_tokens if task.validation else 0
    try:
        return loop.train(start.net, task, stop, group), more
    except loop.Diverged as error:
        log.warning("the rate %g is not chosen: it diverged after %d steps", task.plan.lr, error.n_steps)
        return error.n_steps, {**more, "diverged": True, "validation_loss": None}


def base_of(plan: TrainingPlan, start: Start) -> str | None:
    """The model on the hub that the seed is, "" if it is one in a folder; None if it was trained here."""
    if start.card is None:
        name, commit = getattr(plan, "pretrained", None), start.commit
    else:
        if "base" in start.card:  # it is of a first stage
            return start.card["base"]
        name, commit = start.card["made_with"].get("pretrained"), start.card.get("pretrained_commit")
    return None if name is None else name if commit else ""


def describe(net: "PreTrainedModel", plan: TrainingPlan, n_steps: int, metrics: Path) -> dict[str, Any]:
    """What the card says of a finished training of `n_steps` steps, whose log is `metrics`."""
    n_train_tokens = n_steps * plan.step_tokens
    losses, validation_losses = training_log.history(metrics, 10)
    flops_per_token = model.flops_per_token(net, plan.seq_len)
    return {
        "expert": plan.expert,
        "n_parameters": model.n_parameters(net),
        "n_steps": n_steps,
        "n_train_tokens": n_train_tokens,
        "flops_per_token": flops_per_token,
        "train_flops": flops_per_token * n_train_tokens,
        "precision": _precision(plan),
        "final_loss": sum(losses) / len(losses) if losses else None,
        "validation_loss": validation_losses[-1] if validation_losses else None,
    }


def _precision(plan: TrainingPlan) -> str:
    return "bf16 autocast" if train_step.use_bf16(plan.precision) else "float32"


def _announce(net: "PreTrainedModel", plan: TrainingPlan, n_tokens: int) -> None:
    """Log what is trained. Warn if the text would be read too often."""
    n_train_tokens = plan.n_steps * plan.step_tokens
    size = f"{type(net).__name__} with {model.n_parameters(net):,} parameters"
    steps = f"{plan.n_steps} steps of {plan.batch_size} sequences"
    tokens = f"{n_train_tokens:,} training tokens from a text of {n_tokens:,}"
    log.info("%s, %s, %s, %s", size, steps, tokens, _precision(plan))
    if n_train_tokens > MAX_REPEATS * n_tokens:
        log.warning(
            "reads its text %.1f times; more than %d times teaches little: lower train.steps, or add text",
            n_train_tokens / n_tokens,
            MAX_REPEATS,
        )


def make_deterministic(n_threads: int) -> None:
    """Let equal inputs give equal bits on this machine, whatever the device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]
    torch.set_num_threads(n_threads)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, config.Config]:
    """The command line and the config. Exits with a usage message if they do not fit together."""
    p = cli.parser(__doc__)
    p.add_argument(
        "--expert",
        required=True,
        help="seed, parent-0 ..., first-0 ..., 0 ... k-1, dense, dense-batch, dense-steps, dense-large, "
        "random-0 ...; with a rate of train.lr where that is a list: 0@0.004",
    )
    p.add_argument(
        "--data",
        required=True,
        type=Path,
        help="manifest.json of shards, assignments or random: as the expert needs",
    )
    p.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        help="tokenizer.json; the files beside it go into the expert's folder",
    )
    p.add_argument(
        "--seed-model",
        type=Path,
        help="model.safetensors to start from, the seed's or a parent's; for every expert but the seed and "
        "dense-large",
    )
    p.add_argument(
        "--out",
        required=True,
        type=Path,
        help="model.safetensors to publish; the rest of the folder goes beside it",
    )
    p.add_argument(
        "--added",
        action="store_true",
        help="an expert that is added to a run, on all of --data, under any name",
    )
    p.add_argument("--work", required=True, type=Path, help="folder for the resumable state")
    p.add_argument("--threads", type=int, default=1, help="threads of each process")
    args = p.parse_args(argv)
    cfg = config.read(args.config)
    names = list(plans.trainings(cfg))
    if not args.added and args.expert not in names:
        p.error(f"--expert: {args.expert}. Expected one of {', '.join(names)}.")
    if (args.seed_model is not None) != (args.added or plans.branches(args.expert)):
        p.error("--seed-model: expected for every expert but the seed and dense-large.")
    if args.out.name != expert_files.WEIGHTS:
        p.error(f"--out: {args.out.name}. Expected {expert_files.WEIGHTS}.")
    return args, cfg


def main(argv: list[str] | None = None) -> None:
    args, cfg = parse(argv)
    plan = (plan_added if args.added else plans).train_expert(cfg, args.expert)
    group = distributed.from_environment(os.environ)
    if plan.batch_size < group.world_size:
        raise ValueError(
            f"WORLD_SIZE: {group.world_size} processes for expert {args.expert}. Expected at most "
            f"{plan.batch_size}, the sequences of a batch. Start fewer processes, or raise train.batch_size "
            "(for the seed, train.seed_batch_size)."
        )
    if group.rank == 0:
        cli.start_logging(f"expert {args.expert}", args.log)
    else:
        cli.start_logging(f"expert {args.expert}, process {group.rank}", None)
        log.setLevel(logging.ERROR)
    received: list[int] = []  # signals that ask for a stop
    make_deterministic(args.threads)
    files = Files(args.data, args.tokenizer, args.seed_model, args.out, args.work)
    with distributed.joined(group):
        waited = group.first_does("lock", lambda: lock.hold(args.work, wait=True))
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, lambda number, frame: received.append(number))
        tags = config.tags_of(cfg.tags, args.expert)
        with worded.worded("--corpus" if args.added else None):
            finished = train_and_publish(plan, cfg.run, files, lambda: received, waited, group, tags)
    if not finished:
        sys.exit(cli.EXIT_SAVED)


if __name__ == "__main__":
    cli.run(main)
