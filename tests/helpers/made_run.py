"""A made-up run for tests of the rules after scoring: distances, scores and cards as in a real run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cbtm_pipeline import config, eval_ensemble, plan, report
from cbtm_pipeline.base import artifact, cli

DEFAULTS = Path(__file__).parents[2] / "config.yaml"
SHARDS = "5" * 32  # identity of the manifest of the shards
QUICK: dict[str, Any] = {  # sections of a config with a small sweep
    "route": {"top_k": [1, 2, 9], "temperature": [0.1, 0.5], "epsilon": [0.01, 0.1], "beta": [1.0]},
    "eval": {"bootstrap": 200},
}


class Files(NamedTuple):
    """Paths of a made-up run; scores and cards by expert."""

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
    """Write a run in which each expert is good at its cluster, and the nearest centre is often the right one.

    `n_documents` are held out.
    """
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
    made_from = {"clusterer": "c" * 32, "embedder": "e" * 32, "shards": SHARDS}
    artifact.write_npz(
        files.distances,
        artifact.make_meta("distances", made_from, **plan.route(cfg).content()),
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
        files.cards[name] = folder / f"experts/{name}/card.json"
        weights = _write_card(files.cards[name], cfg, name, rng_seed)
        files.scores[name] = folder / f"scores/{name}.npz"
        keys = {"expert": name, **plan.score_expert(cfg).content()}
        meta = artifact.make_meta("scores", {"expert": weights, "shards": SHARDS}, **keys)
        artifact.write_npz(files.scores[name], meta, logprob_N=logprob_N.astype(np.float32))
    return files


def _write_card(path: Path, cfg: config.Config, name: str, rng_seed: int) -> str:
    """Write the card of an expert; return the hash of its weights."""
    how = plan.train_expert(cfg, name)
    origin = {"corpus": "shards", "clusters": "assignments", "random": "random"}[how.data]
    made_from = {origin: SHARDS}
    if name != "seed":
        made_from["seed"] = artifact.fingerprint(["seed", rng_seed])
    content = {
        "expert": name,
        "plan": how.content(),
        "weights": artifact.fingerprint([name, rng_seed]),
        "n_parameters": 10**6,
        "flops_per_token": 6e6,
        "train_flops": 6e6 * how.n_steps * how.step_tokens,
    }
    artifact.write_json(path, artifact.make_meta("expert", made_from, **content))
    return content["weights"]


def change_npz(path: Path, kind: str, meta: dict[str, Any] | None = None, **arrays: np.ndarray) -> None:
    """Write an npz artifact again with some keys of its meta record or some of its arrays replaced."""
    old_arrays, old_meta = artifact.read_npz(path, kind)
    artifact.write_npz(path, {**old_meta, **(meta or {})}, **{**old_arrays, **arrays})


def change_json(path: Path, **keys: Any) -> None:
    """Write a JSON artifact again with some keys replaced."""
    artifact.write_json(path, {**json.loads(path.read_text()), **keys})


def make_report_inputs(folder: Path, cfg: config.Config, files: Files) -> list[str]:
    """Write what the report needs besides metrics.json, and return its command line."""
    rng = np.random.default_rng(0)
    shards, assignments, top_terms = _write_manifests(folder, cfg.cluster.k, rng)
    logs = []
    for name, card in files.cards.items():
        content = json.loads(card.read_text())
        if name in plan.cluster_experts(cfg):
            made_from = {**content["made_from"], "assignments": artifact.identity(assignments)}
            change_json(card, made_from=made_from)
        logs.append(card.with_name("metrics.jsonl"))
        _write_training_log(logs[-1], content["plan"], 8.3 if name == "seed" else 5.5, rng)
    return [
        *("--config", str(files.config), "--metrics", str(files.out), "--top-terms", str(top_terms)),
        *("--assignments", str(assignments), "--shards", str(shards)),
        *("--training", *map(str, logs), "--out", str(folder / "report.html")),
    ]


def _write_manifests(folder: Path, k: int, rng: np.random.Generator) -> tuple[Path, Path, Path]:
    """Write the manifests of the shards and of the assignments, and the top terms; return their paths."""
    shards, assignments = folder / "shards/manifest.json", folder / "assignments/manifest.json"
    top_terms = folder / "cluster/top_terms.json"
    splits = [("train-00000", "train", 900), ("train-00001", "train", 334), ("eval-00000", "eval", 40)]
    content = {
        "shards": [
            {"name": name, "split": split, "n_documents": n, "n_tokens": 300 * n, "n_bytes": 1200 * n}
            for name, split, n in splits
        ],
        "vocab_size": 4096,
        "n_quarantined": 17,
        "encoder": "gigatoken",
        "separator_id": 0,
    }
    artifact.write_json(shards, artifact.make_meta("shards", {"tokenizer": "d" * 32}, **content))
    made_from = {"clusterer": "c" * 32, "shards": artifact.identity(shards)}
    n_documents = rng.multinomial(1234, np.full(k, 1 / k)).tolist()
    sizes = {"k": k, "n_documents": n_documents, "n_tokens": [301 * n for n in n_documents]}
    artifact.write_json(assignments, artifact.make_meta("assignments", made_from, **sizes))
    terms = [[f" term{j}", "<script>alert(1)</script>", "&amp;", "ünï"] for j in range(k)]
    artifact.write_json(top_terms, artifact.make_meta("top_terms", {"clusterer": "c" * 32}, top_terms=terms))
    return shards, assignments, top_terms


def _write_training_log(path: Path, how: dict[str, Any], first_loss: float, rng: np.random.Generator) -> None:
    """Write a log with the number of steps of the training plan `how`; the loss falls to about 4.2."""
    n_steps, step_tokens = how["n_steps"], how["batch_size"] * how["seq_len"]
    loss = 4.2 + (first_loss - 4.2) * np.exp(-np.arange(n_steps) / 60) + rng.normal(0, 0.08, n_steps)
    rows = [
        {"step": i + 1, "loss": float(x), "lr": 1e-3, "n_tokens": (i + 1) * step_tokens}
        for i, x in enumerate(loss)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_rule(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a rule in this process as its command line would, and remove its log handlers again."""
    handlers = list(cli.log.handlers)
    try:
        cli.run(lambda: main(arguments))
    finally:
        cli.log.handlers[:] = handlers


def evaluate(files: Files) -> dict[str, Any]:
    """Run eval_ensemble and return metrics.json."""
    run_rule(eval_ensemble.main, files.arguments())
    return json.loads(files.out.read_text())


def render(arguments: list[str]) -> str:
    """Run report with this command line and return report.html."""
    run_rule(report.main, arguments)
    return Path(arguments[arguments.index("--out") + 1]).read_text("utf-8")
