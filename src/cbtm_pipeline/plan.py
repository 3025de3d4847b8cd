"""Who is trained on what, and for how long: the compute-matched training plans of C-BTM (paper, section 3.3).

Every phase-two system spends the same tokens, T = train.steps * train.batch_size * train.seq_len:

    k experts     steps with batch_size / k sequences each                  (k experts on random clusters likewise)
    dense-batch   steps with batch_size sequences                           the paper's dense baseline: a k times larger batch
    dense-steps   k * steps with batch_size / k sequences                   the same batch as an expert's, k times more steps

so that neither the dense model nor the seed depends on k, and the expert's share shrinks as k grows. Where batch_size / k is not whole, the
batch is rounded and the number of steps makes up for it. The seed model spends seed_share of the compute of seed and experts together.
"""

from typing import TYPE_CHECKING, Any

from cbtm_pipeline import presets

if TYPE_CHECKING:
    from cbtm_pipeline.config import Config


def cluster_experts(config: "Config") -> list[str]:
    """Ids of the experts on the clusters, in cluster order."""
    return [str(i) for i in range(config.cluster.k)]


def random_experts(config: "Config") -> list[str]:
    """Ids of the experts on random clusters; none unless train.controls asks for them."""
    return [f"random-{i}" for i in range(config.cluster.k)] if "random" in config.train.controls else []


def dense_experts(config: "Config") -> list[str]:
    """`dense`, and the dense models that train.controls adds, without one that `dense` already is."""
    extra = [c for c in config.train.controls if c.startswith("dense-") and c != f"dense-{config.train.dense}"]
    return ["dense", *dict.fromkeys(extra)]


def experts(config: "Config") -> list[str]:
    """Ids of everything that is trained from the seed, the seed not included."""
    return [*cluster_experts(config), *dense_experts(config), *random_experts(config)]


def data_of(expert: str) -> tuple[str, int]:
    """Which documents an expert reads: (`corpus`, 0), (`clusters`, i) or (`random`, i)."""
    if expert.isdecimal():
        return "clusters", int(expert)
    if expert.startswith("random-"):
        return "random", int(expert.removeprefix("random-"))
    return "corpus", 0


def scratch(config: "Config") -> dict[str, Any]:
    """Keys of the seed model's configuration class: those of model.preset, or of model.scratch without one."""
    return presets.scratch(config.model.preset) if config.model.preset else config.model.scratch


def expert(config: "Config", expert_id: str) -> dict[str, Any]:
    """The training of one expert (or of `seed`): all that its weights depend on besides the data and the seed model.

    Keys: `expert`, `data`, `group`, `n_steps`, `batch_size` (sequences), `scratch` and `pretrained` (seed only), `rng_seed`, and the keys
    of section train that say how a step is done. A pretrained seed has n_steps = 0.
    """
    t, k = config.train, config.cluster.k
    data, group = data_of(expert_id)
    how = t.model_dump(exclude={"batch_size", "steps", "seed_share", "seed_batch_size", "dense", "controls"})
    plan: dict[str, Any] = {"expert": expert_id, "data": data, "group": group, "rng_seed": config.seed, **how}
    total = t.steps * t.batch_size  # sequences of every phase-two system

    if expert_id == "seed":
        sequences = t.seed_share / (1 - t.seed_share) * total if config.model.pretrained is None else 0
        n_steps, batch_size = round(sequences / t.seed_batch_size), t.seed_batch_size
        plan |= {"pretrained": config.model.pretrained, "scratch": scratch(config)}
    elif expert_id == "dense-batch" or (expert_id == "dense" and t.dense == "batch"):
        n_steps, batch_size = t.steps, t.batch_size
    else:
        batch_size = max(1, round(t.batch_size / k))
        n_steps = max(1, round(total / (k * batch_size)))
        if data == "corpus":
            n_steps *= k
    return {**plan, "n_steps": n_steps, "batch_size": batch_size}
