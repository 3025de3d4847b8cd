"""A made-up run for tests of what comes after scoring: distances, scores and cards as the pipeline would leave them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline import config, plan
from cbtm_pipeline.base import artifact

DEFAULTS = Path(__file__).parents[2] / "config.yaml"
SHARDS = "5" * 32


class Files(NamedTuple):
    """Paths of a made-up run, by expert where there are many."""

    config: Path
    distances: Path
    scores: dict[str, Path]
    cards: dict[str, Path]
    out: Path

    def arguments(self) -> list[str]:
        """The command line of eval_ensemble."""
        return [
            *("--config", str(self.config), "--distances", str(self.distances), "--out", str(self.out)),
            *("--scores", *map(str, self.scores.values())),
            *("--experts", *map(str, self.cards.values())),
        ]


def make_config(**sections: Any) -> config.Config:
    """The default config with some keys changed: `make_config(cluster={"k": 2})`."""
    defaults = config.read(DEFAULTS).model_dump()
    for key, value in sections.items():
        defaults[key] = {**defaults[key], **value} if isinstance(value, dict) else value
    return config.validate(defaults)


def make(folder: Path, cfg: config.Config, n_documents: int = 40, rng_seed: int = 0) -> Files:
    """Write a run in which each expert is good at its cluster, and in which the nearest centre is often the right one."""
    rng = np.random.default_rng(rng_seed)
    k, names = cfg.cluster.k, ["seed", *plan.experts(cfg)]
    n_tokens_D = rng.integers(1, 60, n_documents)
    offsets = np.concatenate([[0], np.cumsum(n_tokens_D)])
    cluster_D = rng.integers(0, k, n_documents).astype(np.int32)
    cluster_N = np.repeat(cluster_D, n_tokens_D)
    d2_NK = rng.uniform(0.3, 0.9, (offsets[-1], k))
    d2_NK[np.arange(offsets[-1]), cluster_N] -= 0.2
    difficulty_N = rng.gamma(2.0, 2.0, offsets[-1])

    cfg_path = folder / "config.json"
    config.write(cfg, cfg_path)
    files = Files(cfg_path, folder / "route/distances.npz", {}, {}, folder / "eval/metrics.json")
    artifact.write_npz(
        files.distances,
        artifact.make_meta(
            "distances",
            {"clusterer": "c" * 32, "embedder": "e" * 32, "shards": SHARDS},
            **plan.route(cfg).content(),
        ),
        d2_NK=d2_NK.astype(np.float32),
        offsets=offsets.astype(np.int64),
        n_bytes=(4 * n_tokens_D + rng.integers(0, 3, n_documents)).astype(np.int64),
        cluster=cluster_D,
        doc_id=np.array([f"document-{i}" for i in range(n_documents)]),
    )
    for name in names:
        gain = {"seed": 0.0, "dense": 0.45, "dense-steps": 0.6, "dense-batch": 0.45}.get(name, 0.3)
        own_N = 0.4 * (cluster_N == int(name)) if name.isdecimal() else 0.0
        logprob_N = -np.maximum(difficulty_N - gain - own_N + rng.normal(0, 0.3, offsets[-1]), 0.01)
        weights = artifact.fingerprint([name, rng_seed])
        files.cards[name] = folder / f"experts/{name}/card.json"
        how = plan.train_expert(cfg, name)
        origin = {"corpus": "shards", "clusters": "assignments", "random": "random"}[how.data]
        made_from = {
            origin: SHARDS,
            **({} if name == "seed" else {"seed": artifact.fingerprint(["seed", rng_seed])}),
        }
        train_flops = 6e6 * how.n_steps * how.batch_size * how.seq_len
        about = {
            "weights": weights,
            "n_parameters": 10**6,
            "flops_per_token": 6e6,
            "train_flops": train_flops,
        }
        artifact.write_json(
            files.cards[name],
            artifact.make_meta("expert", made_from, expert=name, plan=how.content(), **about),
        )
        files.scores[name] = folder / f"scores/{name}.npz"
        scored = {"expert": name, **plan.score_expert(cfg).content()}
        artifact.write_npz(
            files.scores[name],
            artifact.make_meta("scores", {"expert": weights, "shards": SHARDS}, **scored),
            logprob_N=logprob_N.astype(np.float32),
        )
    return files


def change_npz(path: Path, kind: str, meta: dict[str, Any] | None = None, **arrays: np.ndarray) -> None:
    """Write an npz artifact again with parts of its meta or some of its arrays replaced."""
    old_arrays, old_meta = artifact.read_npz(path, kind)
    artifact.write_npz(path, {**old_meta, **(meta or {})}, **{**old_arrays, **arrays})


def change_json(path: Path, **keys: Any) -> None:
    """Write a JSON artifact again with some keys replaced."""
    artifact.write_json(path, {**json.loads(path.read_text()), **keys})


def make_report_inputs(folder: Path, cfg: config.Config, files: Files) -> list[str]:
    """Write what the report needs besides metrics.json, and return its command line."""
    rng = np.random.default_rng(0)
    k = cfg.cluster.k
    shards, assignments, top_terms = (
        folder / "shards/manifest.json",
        folder / "assignments/manifest.json",
        folder / "cluster/top_terms.json",
    )
    splits = [("train-00000", "train", 900), ("train-00001", "train", 334), ("eval-00000", "eval", 40)]
    entries = [
        {"name": n, "split": s, "n_documents": d, "n_tokens": 300 * d, "n_bytes": 1200 * d}
        for n, s, d in splits
    ]
    about = {
        "shards": entries,
        "vocab_size": 4096,
        "n_quarantined": 17,
        "encoder": "gigatoken",
        "separator_id": 0,
    }
    artifact.write_json(shards, artifact.make_meta("shards", {"tokenizer": "d" * 32}, **about))
    made_from = {"clusterer": "c" * 32, "shards": artifact.identity(shards)}
    n_documents = rng.multinomial(1234, np.full(k, 1 / k)).tolist()
    sizes = {"k": k, "n_documents": n_documents, "n_tokens": [301 * n for n in n_documents]}
    artifact.write_json(assignments, artifact.make_meta("assignments", made_from, **sizes))
    terms = [[f" term{j}", "<script>alert(1)</script>", "&amp;", "ünï"] for j in range(k)]
    artifact.write_json(top_terms, artifact.make_meta("top_terms", {"clusterer": "c" * 32}, top_terms=terms))
    logs = []
    for name, card in files.cards.items():
        content = json.loads(card.read_text())
        if name in plan.cluster_experts(cfg):
            change_json(
                card, made_from={**content["made_from"], "assignments": artifact.identity(assignments)}
            )
        n_steps, n_tokens = (
            content["plan"]["n_steps"],
            content["plan"]["batch_size"] * content["plan"]["seq_len"],
        )
        start = 8.3 if name == "seed" else 5.5
        loss = 4.2 + (start - 4.2) * np.exp(-np.arange(n_steps) / 60) + rng.normal(0, 0.08, n_steps)
        rows = [
            {"step": i + 1, "loss": float(x), "lr": 1e-3, "n_tokens": (i + 1) * n_tokens}
            for i, x in enumerate(loss)
        ]
        logs.append(card.with_name("metrics.jsonl"))
        logs[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *(
            "--config",
            str(files.config),
            "--metrics",
            str(files.out),
            "--top-terms",
            str(top_terms),
            "--assignments",
            str(assignments),
        ),
        *("--shards", str(shards), "--training", *map(str, logs), "--out", str(folder / "report.html")),
    ]
