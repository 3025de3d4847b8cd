"""A made-up run for tests of the rules after scoring: its records, distances and scores as in a real run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import made_corpus
from cbtm_pipeline import config, eval_ensemble, plan, report
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.corpus import labels, shard_files
from cbtm_pipeline.provenance import made_from

DEFAULTS = Path(__file__).parents[2] / "config.yaml"
TOKENIZER, EMBEDDER = "7" * 32, "e" * 32  # identities
LABELS = ("news", "<b>mail</b>", "", "news")  # of documents, in turn, if the config has a field for labels
QUICK: dict[str, Any] = {  # sections of a config with a small sweep
    "route": {"top_k": [1, 2, 9], "temperature": [0.1, 0.5], "epsilon": [0.01, 0.1], "beta": [1.0]},
    "eval": {"bootstrap": 200},
}


class Files(NamedTuple):
    """Paths of a made-up run; scores and cards by expert, manifests by the data of experts."""

    config: Path
    manifests: dict[plan.Data, Path]
    clusterer: Path
    distances: Path
    scores: dict[str, Path]
    cards: dict[str, Path]
    out: Path

    def arguments(self) -> list[str]:
        """The command line of eval_ensemble."""
        shards = self.manifests["corpus"]
        labelled = config.read(self.config).corpus.label_field is not None
        clusters = [str(path) for data, path in self.manifests.items() if data != "corpus"]
        return [
            *("--config", str(self.config), "--distances", str(self.distances), "--out", str(self.out)),
            *("--scores", *map(str, self.scores.values())),
            *("--experts", *map(str, self.cards.values())),
            *("--clusters", *clusters),
            *(("--shards", str(shards)) if labelled else ()),
        ]


class HeldOut(NamedTuple):
    """Held-out documents: their offsets, the cluster of each document, and how hard each token is."""

    offsets: np.ndarray
    cluster_D: np.ndarray
    difficulty_N: np.ndarray

    @property
    def cluster_N(self) -> np.ndarray:
        return np.repeat(self.cluster_D, np.diff(self.offsets))


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
    k = cfg.cluster.k
    n_tokens_D = rng.integers(1, 60, n_documents)
    offsets = np.concatenate([[0], np.cumsum(n_tokens_D)])
    cluster_D = rng.integers(0, k, n_documents).astype(np.int32)
    d2_NK = rng.uniform(0.3, 0.9, (offsets[-1], k))
    d2_NK[np.arange(offsets[-1]), np.repeat(cluster_D, n_tokens_D)] -= 0.2
    held_out = HeldOut(offsets, cluster_D, rng.gamma(2.0, 2.0, offsets[-1]))

    cfg_path = folder / "config.json"
    config.write(cfg, cfg_path)
    manifests, clusterer = _write_manifests(folder, cfg, n_documents)
    distances, out = folder / "route/distances.npz", folder / "eval/metrics.json"
    files = Files(cfg_path, manifests, clusterer, distances, {}, {}, out)
    shards = artifact.read_sealed(manifests["corpus"], "shards")
    identities = made_from.route(shards, artifact.read_record(clusterer, "clusterer"))
    artifact.write_npz(
        distances,
        artifact.make_meta("distances", identities, plan.route(cfg).content()),
        d2_NK=d2_NK.astype(np.float32),
        offsets=offsets.astype(np.int64),
        n_bytes=(4 * n_tokens_D + rng.integers(0, 3, n_documents)).astype(np.int64),
        cluster=cluster_D,
        doc_id=np.array([f"document-{i}" for i in range(n_documents)]),
    )
    for name in plan.trained(cfg):
        _write_expert(folder, cfg, name, files, held_out, rng)
    return files


def _write_manifests(folder: Path, cfg: config.Config, n_held_out: int) -> tuple[dict[plan.Data, Path], Path]:
    """Write the manifests of shards and clusters, the clusterer and its terms; return the paths."""
    rng = np.random.default_rng(0)
    shards, clusterer = folder / "shards/manifest.json", folder / "cluster/clusterer.npz"
    splits = [
        ("train-00000", "train", 900),
        ("train-00001", "train", 334),
        ("eval-00000", "eval", n_held_out),
    ]
    entries = [
        {
            **{"name": name, "split": split, "n_documents": n, "n_tokens": 300 * n, "n_bytes": 1200 * n},
            "identity_groups": [artifact.fingerprint(name)],
        }
        for name, split, n in splits
    ]
    if cfg.corpus.label_field is not None:
        for entry in entries:
            _write_labels(shards.parent, entry)
    identities = {
        f"identity_{split}": artifact.fingerprint([split, n_held_out]) for split in ("train", "eval")
    }
    more = {"vocab_size": 4096, "n_quarantined": 17, "encoder": "gigatoken", "separator_id": 0}
    origin = {"tokenizer": TOKENIZER, "corpus": artifact.fingerprint(entries)}
    made_with = plan.shard(cfg).content()
    meta = artifact.make_meta("shards", origin, made_with, shards=entries, **identities, **more)
    artifact.write_sealed(shards, meta)

    k, record = cfg.cluster.k, artifact.read_sealed(shards, "shards")
    origin = {"vectors": "0" * 32, "embedder": EMBEDDER}
    meta = artifact.make_meta("clusterer", origin, plan.fit_kmeans(cfg).content())
    clusters = {"seal": artifact.write_npz(clusterer, meta, centres_KD=rng.random((k, 3)))}
    terms = [[f" term{j}", "<script>alert(1)</script>", "&amp;", "ünï"] for j in range(k)]
    meta = artifact.make_meta("top_terms", {"clusterer": clusters["seal"]}, top_terms=terms)
    artifact.write_sealed(folder / "cluster/top_terms.json", meta)

    manifests: dict[plan.Data, Path] = {"corpus": shards, "clusters": folder / "assignments/manifest.json"}
    made_with = plan.assign(cfg).content()
    _write_clusters(
        manifests["clusters"], k, made_from.assign(record, clusters), made_with, cfg.cluster.balance
    )
    if plan.random_experts(cfg):
        manifests["random"] = folder / "random/manifest.json"
        made_with = plan.assign_random(cfg).content()
        _write_clusters(manifests["random"], k, made_from.assign_random(record), made_with, "random")
    return manifests, clusterer


def _write_labels(folder: Path, entry: dict[str, Any]) -> None:
    """Write a shard of nothing but labels, and tell its entry."""
    column = [LABELS[i % len(LABELS)] for i in range(entry["n_documents"])]
    table = pa.table({shard_files.LABEL: pa.array(column, pa.string())})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{entry['name']}.parquet")
    identity = made_corpus.column_identity(table[shard_files.LABEL])
    entry |= {
        "identity_columns": {shard_files.LABEL: identity},
        shard_files.N_LABELLED: sum(map(bool, column)),
    }


def _write_clusters(
    path: Path, k: int, origin: dict[str, str], made_with: dict[str, Any], balance: str
) -> None:
    """Write the manifest of clusters, or of random ones."""
    n_documents = np.random.default_rng(0).multinomial(1234, np.full(k, 1 / k)).tolist()
    sizes = {"k": k, "n_documents": n_documents, "n_tokens": [301 * n for n in n_documents]}
    identities = [artifact.fingerprint([balance, j]) for j in range(k)]
    content = {**sizes, "balance": balance, "identity_groups": identities, "identity_validation": None}
    if "labels" in origin:
        crossed = labels.Crossed(k)
        for j, n in enumerate(n_documents):
            crossed.add([LABELS[i % len(LABELS)] for i in range(n)], np.full(n, j))
        content["labels"] = crossed.content()
    artifact.write_sealed(path, artifact.make_meta("assignments", origin, made_with, **content))


def _write_expert(
    folder: Path, cfg: config.Config, name: str, files: Files, held_out: HeldOut, rng: np.random.Generator
) -> None:
    """Write the card of an expert, and its scores. Add them to `files`."""
    files.cards[name] = folder / f"experts/{name}/card.json"
    files.scores[name] = folder / f"scores/{name}.npz"
    card = _write_card(cfg, name, files)
    gain = {"seed": 0.0, "dense": 0.45, "dense-steps": 0.6, "dense-batch": 0.45, "dense-large": 0.5}.get(
        name, 0.3
    )
    own_N = 0.4 * (held_out.cluster_N == int(name)) if name.isdecimal() else 0.0
    noise_N = rng.normal(0, 0.3, len(held_out.difficulty_N))
    logprob_N = -np.maximum(held_out.difficulty_N - gain - own_N + noise_N, 0.01)
    shards = artifact.read_sealed(files.manifests["corpus"], "shards")
    identities, made_with = made_from.score_expert(card, shards), plan.score_expert(cfg).content()
    meta = artifact.make_meta("scores", identities, made_with, expert=name)
    artifact.write_npz(files.scores[name], meta, logprob_N=logprob_N.astype(np.float32))


def _write_card(cfg: config.Config, name: str, files: Files) -> dict[str, Any]:
    """Write the card of an expert, after that of the seed; return it."""
    how = plan.train_expert(cfg, name)
    data = artifact.read_json(files.manifests[how.data])
    seed = None if not plan.branches(name) else artifact.read_sealed(files.cards["seed"], "expert")
    identities = made_from.train_expert(how, data, {"identity": TOKENIZER}, seed)
    weights = artifact.fingerprint([name, "weights"])
    content = {
        "expert": name,
        "weights": weights,
        "identity": artifact.fingerprint([weights, "configuration"]),
        "n_parameters": 10**6,
        "flops_per_token": 6e6,
        "train_flops": 6e6 * how.n_steps * how.step_tokens,
    }
    artifact.write_sealed(
        files.cards[name], artifact.make_meta("expert", identities, how.content(), **content)
    )
    return content


def make_report_inputs(files: Files) -> list[str]:
    """Write the training logs, and return the command line of the report."""
    rng = np.random.default_rng(0)
    logs = []
    for name, card in files.cards.items():
        content = artifact.read_sealed(card, "expert")
        logs.append(card.with_name("metrics.jsonl"))
        _write_training_log(logs[-1], content["made_with"], 8.3 if name == "seed" else 5.5, rng)
        hashes = {path.name: artifact.identity(path) for path in (card, logs[-1])}
        meta = artifact.make_meta("expert_files", {"expert": content["identity"]}, files=hashes)
        artifact.write_sealed(card.with_name("files.json"), meta)
    top_terms = files.clusterer.with_name("top_terms.json")
    return [
        *("--metrics", str(files.out), "--top-terms", str(top_terms)),
        *("--assignments", str(files.manifests["clusters"]), "--shards", str(files.manifests["corpus"])),
        *("--records", str(files.clusterer), str(files.distances), str(files.scores["seed"])),
        *("--training", *map(str, logs), "--out", str(files.out.parents[1] / "report.html")),
    ]


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
