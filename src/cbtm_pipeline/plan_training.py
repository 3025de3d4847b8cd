"""The plans of trainings: of an expert or a dense model, of the seed, and of the large dense model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cbtm_pipeline.plan_base import Plan

Data = Literal["corpus", "clusters", "parents", "first", "random"]
LARGE = "dense-large"  # the id of the large dense model
LARGE_DEPTH = 2  # it has so many times the layers of an expert


def groups(group: int, children: int = 1) -> range:
    """The numbers of the clusters that a training reads, by the entries of its plan."""
    return range(group * children, (group + 1) * children)


@dataclass(frozen=True)
class TrainingPlan(Plan):
    """Rule `train_expert`: all that an expert's weights depend on besides its data and the seed model."""

    expert: str  # seed, parent-0 ..., 0 ... k-1, dense, dense-batch, dense-steps, dense-large, random-0 ...
    data: Data  # the documents it reads: the corpus, a (random) cluster, or those of a first stage
    group: int  # the number of that cluster or parent; 0 for the whole corpus
    rng_seed: int
    n_steps: int  # optimiser steps; 0 for a pretrained seed
    batch_size: int  # sequences of a step
    seq_len: int  # tokens of a sequence
    lr: float  # peak learning rate
    schedule: Literal["linear", "cosine"]
    final_lr_ratio: float  # the rate ends at this share of lr
    warmup_ratio: float  # share of the steps over which the rate rises to lr
    betas: tuple[float, float]  # of AdamW
    weight_decay: float  # of AdamW, on matrices only
    clip_norm: float
    max_loss_jump: float  # nats above the usual loss that end the training
    validation_share: float  # of the held-out documents
    validations: int  # how often in the training
    patience: int | None  # validations without a better one that end the training
    micro_batch_size: int | None  # sequences of a forward pass; None: what the memory takes
    recompute: bool | None  # compute activations again in the backward pass; None: where memory needs it
    precision: Literal["auto", "float32", "bf16"]
    compile: bool | None  # torch.compile; None: on a GPU
    only: Literal["all", "feed-forward"] = dataclasses.field(default="all", kw_only=True)
    candidate: bool = dataclasses.field(default=False, kw_only=True)  # its validation loss decides about lr
    begins: str | None = dataclasses.field(
        default=None, kw_only=True
    )  # the model of the first stage it begins as
    children: int = dataclasses.field(default=1, kw_only=True)  # clusters that a parent reads

    @property
    def groups(self) -> range:
        """The numbers of the clusters that it reads."""
        return groups(self.group, self.children)

    @property
    def step_tokens(self) -> int:
        """Training tokens of a step."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class SeedPlan(TrainingPlan):
    """The training of the seed: a model from the keys `scratch`, or a `pretrained` one, not trained here."""

    pretrained: str | None
    scratch: Mapping[str, Any]
    revision: str | None = None


@dataclass(frozen=True)
class LargePlan(SeedPlan):
    """The training of a model with `depth` times the layers of `scratch`, from scratch.

    `n_steps` is how many steps a model of `scratch` would make. The training makes fewer: as many as cost the
    same FLOPs (training/large.py).
    """

    depth: int = dataclasses.field(kw_only=True)
