"""Write an ensemble as a mixture-of-experts folder that plain transformers and engines load."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbtm_pipeline.base import artifact, hub
from cbtm_pipeline.base.cli import Progress
from cbtm_pipeline.base.publish import fresh
from cbtm_pipeline.corpus import heldout, token_files
from cbtm_pipeline.inference import document_scores, model_card, moe, package
from cbtm_pipeline.provenance import card_header, records
from cbtm_pipeline.training import model

N_SEQUENCES = 64  # of each cluster, that routers are fitted on
BATCH = 8  # sequences of a step
CARD = """\
{header}# {k} experts as one {kind} model

The feed-forwards of {k} expert language models (Cluster-Branch-Train-Merge,
[Gururangan et al. 2023](https://arxiv.org/abs/2303.14177)) are the experts of each layer; {n_active} run
for each token. All other weights are averages ([BTX](https://arxiv.org/abs/2403.07816)). The routers are
ridge regressions onto the clusters ([DUME](https://arxiv.org/abs/2603.29765)), trained for {n_steps} more
steps.

It is not the ensemble: it predicts other probabilities. The licences of the training texts, and of the model
that the experts began as, apply to what you do with it.
"""


def training_texts(outdir: Path, names: Sequence[str], n_context: int) -> dict[int, list[torch.Tensor]]:
    """Sequences (T,) of training tokens of each expert's cluster, from the start of the files.

    Raises ValueError if the run's assignments are missing or damaged.
    """
    path, _ = records.clusters(outdir)
    if not path.exists():
        raise ValueError(
            f"{path}: missing. Expected the run of the ensemble, on whose texts the routers are fitted. "
            "Name it with --outdir."
        )
    manifest, found = artifact.read_sealed(path, "assignments"), {j: [] for j in range(len(names))}
    for entry in manifest["shards"]:
        file = path.with_name(f"{entry['name']}.arrow")
        identities = token_files.read_identities(file, entry["identity"])
        for j, name in enumerate(names):
            values = token_files.read(file, int(name), identities[int(name)]).values
            for begin in range(0, len(values), n_context):
                if (
                    len(found[j]) < N_SEQUENCES
                    and len(part := values[begin : begin + n_context]) == n_context
                ):
                    found[j].append(torch.from_numpy(part.astype(np.int64)))
    return found


def write(outdir: Path, to: Path, n_steps: int) -> tuple[Any, Any]:
    """Write the folder `to`, which is there whole or not at all. Returns the model, and the experts' average.

    Raises ValueError if `to` is not empty or lies in the ensemble, or if the architecture has no twin.
    """
    from transformers import AutoConfig

    folder = outdir / "ensemble"
    package.check_new(to, folder)
    package.verify(folder)
    about = artifact.read_json(folder / "config.json")
    names, n_active = about["experts"], about.get("n_active") or len(about["experts"])
    paths = [folder / "experts" / name for name in names]
    moe.twin(hub.load(AutoConfig, paths[0]), len(names), n_active)  # refuse before work is done
    texts = training_texts(outdir, names, about["max_position_embeddings"])
    experts = [model.load(path).eval() for path in paths]
    made, mean = moe.build(experts, n_active), moe.average(experts)
    moe.fit_routers(made, mean, texts)
    pool = [ids for sequences in texts.values() for ids in sequences]
    rng = np.random.default_rng(0)
    order = [rng.choice(len(pool), min(BATCH, len(pool)), replace=False) for _ in range(n_steps)]
    moe.train_routers(made, lambda step: torch.stack([pool[i] for i in order[step]]), n_steps)
    sizes = {"k": len(names), "n_active": n_active, "n_steps": n_steps}
    save(made, folder, CARD.format(header=header(about), kind=made.config.model_type, **sizes), to)
    return made, mean


def header(about: dict[str, Any]) -> str:
    """The header of the card. `about` is the config of the ensemble; its licence is that of all experts."""
    tags = [about.get("tags", {}).get(name, {}) for name in about["experts"]]
    return card_header.render(model_card.LABELS, model_card.shared(tags), None)


def save(made: Any, folder: Path, card: str, to: Path) -> None:
    """Write a model with its card and the tokenizer of the ensemble in `folder`, whole or not at all."""
    from transformers.utils import logging

    to = to.resolve()
    staging = fresh(to.with_name(f".{to.name}.{os.getpid()}.tmp"))
    try:
        logging.disable_progress_bar()
        made.save_pretrained(staging)
        for path in folder.iterdir():
            if path.name == "generation_config.json" or path.name.startswith(
                ("tokenizer", "vocab", "merges")
            ):
                shutil.copyfile(path, staging / path.name)
        (staging / "README.md").write_text(card, "utf-8")
        staging.replace(to)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def perplexity(net: Any, outdir: Path, cfg: Any, calibration_share: float) -> float:
    """Perplexity on the documents that metrics.json reports on, in the same windows. `cfg` is the run's."""
    manifest = artifact.read_sealed(outdir / "shards/manifest.json", "shards")
    found = list(heldout.documents(outdir / "shards", manifest, cfg.eval.max_document_tokens))
    arrays, _ = artifact.read_npz(outdir / "route/distances.npz", "distances")  # the ids in the same order
    is_calibration_D = heldout.calibration_documents(arrays["doc_id"], calibration_share, cfg.seed)
    reported = [doc for (_, doc), skip in zip(found, is_calibration_D.tolist(), strict=True) if not skip]
    progress = Progress("measured", sum(len(document) - 1 for document in reported), "tokens")
    scored = []
    for document in reported:
        scored.append(document_scores.score(net, document, cfg.train.seq_len, cfg.eval.stride))
        progress.add(len(document) - 1)
    return float(np.exp(-np.concatenate(scored).mean(dtype=float)))
