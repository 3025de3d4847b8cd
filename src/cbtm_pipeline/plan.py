"""What each rule depends on, and who is trained on what: the compute-matched plans of C-BTM (section 3.3).

A *plan* holds exactly the config values that a rule's result depends on. An artifact keeps it as `made_with`,
and a start compares both (`stale.py`): a rule reruns when its plan or its inputs change, and only then.

Every phase-two system spends the same tokens, T = train.steps * train.batch_size * train.seq_len:

    k experts     steps with batch_size / k sequences each    (k experts on random clusters likewise)
    dense-batch   steps with batch_size sequences             the paper's baseline: a k times larger batch
    dense-steps   k * steps with batch_size / k sequences     an expert's batch, for k times more steps

dense-large has twice the layers of an expert, and so about the parameters of two active experts. It begins
from scratch, and spends the training FLOPs of the seed and of all experts together.

With cluster.parents or cluster.second_round, the k experts share these tokens with the models of a first
stage, as which they begin (plan_first.py).

Neither dense, dense-large nor the seed depends on k. Where batch_size / k is not whole, the batch is rounded,
and the number of steps makes up for it. The seed spends seed_share of the compute of seed and experts.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from cbtm_pipeline import plan_first, plan_search, plan_tasks, presets
from cbtm_pipeline.config import Config
from cbtm_pipeline.plan_base import EnsemblePlan, Plan
from cbtm_pipeline.plan_clusters import assign, assign_random, fit_kmeans, score_training, second_round
from cbtm_pipeline.plan_training import LARGE, LARGE_DEPTH, Data, LargePlan, SeedPlan, TrainingPlan


@dataclass(frozen=True)
class _CorpusPlan(Plan):
    """The keys of section corpus that decide what a document is and which documents are held out."""

    train: tuple[str, ...] = dataclasses.field(metadata={"path": True})
    eval: tuple[str, ...] | None = dataclasses.field(metadata={"path": True})
    eval_fraction: float | None  # None: `eval` names the held-out documents
    text_field: str
    id_field: str | None  # None: file and row name a document
    txt_documents: Literal["file", "block"]


@dataclass(frozen=True)
class TokenizerPlan(_CorpusPlan):
    """Rule `tokenizer`. `model` is model.pretrained, whose tokenizer is used if `pretrained` is None."""

    pretrained: str | None
    vocab_size: int
    train_bytes: int
    model: str | None
    revision: str | None = None  # of the repository on the hub

    def content(self) -> dict[str, Any]:
        """As of any plan. A tokenizer that is not trained depends on its source alone."""
        source = {"pretrained": self.pretrained} if self.pretrained else {"model": self.model}
        revision = {"revision": self.revision} if self.revision else {}
        return {**source, **revision} if self.source else super().content()

    @property
    def source(self) -> str | None:
        """Folder or hub name of the tokenizer; None: train one on the corpus."""
        return self.pretrained or self.model


@dataclass(frozen=True)
class ShardPlan(_CorpusPlan):
    """Rule `shard`: the whole section corpus."""

    max_bad_share: float
    shard_bytes: int
    label_field: str | None = None


@dataclass(frozen=True)
class TfidfPlan(Plan):
    """Rule `embed` with the linear tf-idf."""

    n_components: int
    idf_power: float
    max_df: float
    min_df: int
    fit_documents: int
    rng_seed: int


@dataclass(frozen=True)
class EncoderPlan(Plan):
    """Rule `embed` with an encoder, a folder or a name on the hub."""

    encoder: str
    windows: int
    revision: str | None = None


@dataclass(frozen=True)
class ScorePlan(Plan):
    """Rule `score_expert`: windows of `context` tokens that advance by `stride` tokens."""

    max_document_tokens: int | None
    stride: int
    context: int


@dataclass(frozen=True)
class RoutePlan(Plan):
    """Rule `route`. `window_tokens` matters to encoders only."""

    max_document_tokens: int | None
    window_tokens: int | None = None


@dataclass(frozen=True)
class EvalPlan(Plan):
    """Rule `eval_ensemble`: the settings of the routers that are tried, and how the result is told."""

    routers: tuple[str, ...]
    top_k: tuple[int, ...]
    temperature: tuple[float, ...]
    epsilon: tuple[float, ...]
    beta: tuple[float, ...]
    calibration_share: float
    bootstrap: int
    rng_seed: int
    hysteresis: tuple[float, ...] = (1.0,)
    fix_after: tuple[int, ...] = ()
    merge: bool = False


def cluster_experts(config: Config) -> list[str]:
    """Ids of the experts on the clusters, in cluster order."""
    return [str(i) for i in range(config.cluster.k)]


def random_experts(config: Config) -> list[str]:
    """Ids of the experts on random clusters; none unless train.controls asks for them."""
    return [f"random-{i}" for i in range(config.cluster.k)] if "random" in config.train.controls else []


def dense_experts(config: Config) -> list[str]:
    """`dense`, and the dense models that train.controls adds, but the one that `dense` already is."""
    extra = [name for name in config.train.controls if name in {"dense-batch", "dense-steps", LARGE}]
    return ["dense", *(name for name in dict.fromkeys(extra) if name != f"dense-{config.train.dense}")]


def experts(config: Config) -> list[str]:
    """Ids of all models that are compared with the seed."""
    return [*cluster_experts(config), *dense_experts(config), *random_experts(config)]


def evaluated(config: Config) -> list[str]:
    """Ids of the models that are scored and compared: all but a first stage. The seed comes first."""
    return ["seed", *experts(config)]


def trained(config: Config) -> list[str]:
    """Ids of everything that is trained. What others begin as comes before them."""
    return ["seed", *plan_first.firsts(config), *experts(config)]


def data_of(expert: str) -> tuple[Data, int]:
    """Which documents a training reads: (`corpus`, 0), (`clusters`, i), (`parents`, i), (`first`, i) or
    (`random`, i).
    """
    expert = plan_search.base(expert)
    if expert.isdecimal():
        return "clusters", int(expert)
    if expert.startswith("random-"):
        return "random", int(expert.removeprefix("random-"))
    if expert.startswith(plan_first.PARENT):
        return "parents", int(expert.removeprefix(plan_first.PARENT))
    if expert.startswith(plan_first.FIRST):
        return "first", int(expert.removeprefix(plan_first.FIRST))
    return "corpus", 0


def scratch(config: Config) -> dict[str, Any]:
    """Keys of the seed model's configuration class: those of model.preset, else those of model.scratch."""
    return presets.scratch(config.model.preset) if config.model.preset else config.model.scratch


def tokenizer(c: Config) -> TokenizerPlan:
    pretrained = c.tokenizer if c.tokenizer.pretrained else c.model
    revision = pretrained.revision if pretrained.pretrained else None
    corpus = _corpus(c, without={"max_bad_share", "shard_bytes", "label_field"})
    own = _values(c.tokenizer, without={"revision"})
    return TokenizerPlan(**corpus, **own, model=c.model.pretrained, revision=revision)


def shard(c: Config) -> ShardPlan:
    return ShardPlan(**_corpus(c))


def _corpus(c: Config, without: set[str] | None = None) -> dict[str, Any]:
    """Section corpus. A fraction to hold out has no effect where `eval` names files."""
    return _values(c.corpus, without) | ({"eval_fraction": None} if c.corpus.eval else {})


def embed(c: Config) -> TfidfPlan | EncoderPlan:
    if c.embed.encoder:
        return EncoderPlan(c.embed.encoder, c.embed.windows, c.embed.revision)
    return TfidfPlan(**_values(c.embed, without={"encoder", "windows", "revision"}), rng_seed=c.seed)


def branches(expert: str) -> bool:
    """Whether a training begins as another model. The seed itself and dense-large begin from scratch."""
    return plan_search.base(expert) not in ("seed", LARGE)


def begins_as(c: Config, expert: str) -> str | None:
    """The model that a training begins as: the seed, or one of a first stage. None if from scratch."""
    return (plan_first.first_of(c, expert) or "seed") if branches(expert) else None


def train_expert(c: Config, training: str) -> TrainingPlan:
    """Plan of the training of one expert, of `seed`, or of a candidate (plan_search.py).

    The plan of an expert whose rate is searched is that of its first candidate: they differ in nothing else.
    """
    t, k, expert = c.train, c.cluster.k, plan_search.base(training)
    data, group = data_of(expert)
    others = {"batch_size", "steps", "seed_share", "first_share", "seed_batch_size", "dense", "controls"}
    others |= {"lr"}
    about: dict[str, Any] = {"expert": expert, "data": data, "group": group, "rng_seed": c.seed}
    about |= {**_values(t, without=others), "lr": plan_search.rate(c, training)}
    about["candidate"] = plan_search.is_searched(c, expert)
    about["begins"] = plan_first.first_of(c, expert)
    about["children"] = plan_first.n_children(c) if data == "parents" else 1
    about["only"] = t.only if data != "corpus" else "all"  # seed and dense models train all
    total = t.steps * t.batch_size  # sequences of every phase-two system

    if expert in ("seed", LARGE):
        n_steps = plan_search.seed_steps(c)
        about |= {"pretrained": c.model.pretrained, "scratch": scratch(c), "revision": c.model.revision}
        about["batch_size"] = t.seed_batch_size
        if expert == "seed":
            return SeedPlan(**about, n_steps=n_steps)
        return LargePlan(**about, n_steps=n_steps + round(total / t.seed_batch_size), depth=LARGE_DEPTH)
    if expert == "dense-batch" or (expert == "dense" and t.dense == "batch"):
        return TrainingPlan(**about, n_steps=t.steps, batch_size=t.batch_size)
    batch_size = max(1, round(t.batch_size / k))
    n_steps = max(1, round(total / (k * batch_size)))
    first = plan_first.share_of(c, n_steps)
    n_steps = {
        "corpus": k * n_steps,
        "random": n_steps,
        "parents": about["children"] * first,
        "first": first,
        "clusters": n_steps - first,
    }[data]
    return TrainingPlan(**about, n_steps=n_steps, batch_size=batch_size)


def trainings(c: Config) -> dict[str, TrainingPlan]:
    """The plan of every training by id, the seed first. Searched experts are there as their candidates."""
    names = [name for expert in trained(c) for name in plan_search.candidates(c, expert) or [expert]]
    return {name: train_expert(c, name) for name in names}


def folders(c: Config) -> list[str]:
    """The folders below experts/: those of all experts and of all candidates."""
    return list(dict.fromkeys([*trained(c), *trainings(c)]))


def kinds(c: Config) -> dict[str, list[str]]:
    """What is trained, by kind: all models of a kind have the same learning rate."""
    found: dict[str, list[str]] = {}
    for expert in trained(c):
        found.setdefault(plan_search.kind(expert), []).append(expert)
    return found


def searched(c: Config) -> dict[str, list[str]]:
    """The kinds whose learning rate is searched, with their models."""
    return {kind: names for kind, names in kinds(c).items() if plan_search.is_searched(c, names[0])}


def score_expert(c: Config) -> ScorePlan:
    return ScorePlan(c.eval.max_document_tokens, c.eval.stride, c.train.seq_len)


def route(c: Config) -> RoutePlan:
    return RoutePlan(c.eval.max_document_tokens, c.route.window_tokens if c.embed.encoder else None)


def eval_ensemble(c: Config) -> EvalPlan:
    tried = _values(c.route, without={"window_tokens"})
    return EvalPlan(**tried, bootstrap=c.eval.bootstrap, rng_seed=c.seed, merge=c.eval.merge)


def ensemble(c: Config) -> EnsemblePlan:
    return EnsemblePlan(c.tags or None)


RULES: dict[str, Callable[..., Plan]] = {
    "demo_corpus": lambda c: Plan(),
    "tokenizer": tokenizer,
    "shard": shard,
    "embed": embed,
    "fit_kmeans": fit_kmeans,
    "assign": assign,
    "assign_random": assign_random,
    "score_training": score_training,
    "second_round": second_round,
    "train_expert": train_expert,
    "choose": plan_search.choose,
    "adopt": lambda c: Plan(),
    "score_expert": score_expert,
    "route": route,
    "eval_ensemble": eval_ensemble,
    "report": lambda c: Plan(),
    "ensemble": ensemble,
    "eval_task": plan_tasks.eval_task,
    "tasks_table": lambda c: Plan(),
}


def content(config: Config, rule: str, expert: str | None = None) -> dict[str, Any]:
    """A rule's plan (for train_expert: that expert's) as its record keeps it."""
    plan = RULES[rule](config, expert) if rule == "train_expert" else RULES[rule](config)
    return plan.content()


def _values(section: BaseModel, without: set[str] | None = None) -> dict[str, Any]:
    """The keys of a section; lists become tuples."""
    values = section.model_dump(exclude=without)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
