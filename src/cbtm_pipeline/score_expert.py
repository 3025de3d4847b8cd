"""Score the held-out text with one expert.

    python -m cbtm_pipeline.score_expert --config results/config.json \\
        --expert-weights results/experts/0/model.safetensors --shards results/shards/manifest.json \\
        --out results/scores/0.npz --threads 1

With --ensemble DIR, the expert is one of an ensemble's folder, and is verified by the record there.

The score of a token is its natural log-probability, given the separator and the tokens before it. The rows
are those of corpus/heldout.py. All computation is in float32, on CPUs and GPUs alike.

Shapes: N held-out tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli, device
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.corpus import heldout
from cbtm_pipeline.inference import package
from cbtm_pipeline.provenance import expert_files, made_from
from cbtm_pipeline.training import model
from cbtm_pipeline.training.scoring import score


def read_card(weights: Path, manifest: dict[str, Any], ensemble: Path | None) -> dict[str, Any]:
    """The card of an expert, verified; of an expert of an ensemble, its name and its identity there.

    Raises ValueError if the expert has another tokenizer than the shards, or was trained on other text.
    """
    if ensemble:  # whose tokenizer is the run's: its command has checked that
        name = weights.parent.name
        record = package.verify(ensemble, lambda file: file.startswith(f"experts/{name}/"))
        return {"expert": name, "identity": package.expert_identity(record, name)}
    card = expert_files.read_card(weights)
    artifact.check_made_from(weights, card, "tokenizer", manifest["made_from"]["tokenizer"])
    # Shards without training text hold other text than the run's. Of the experts on clusters, eval_ensemble
    # checks the tokens.
    trained = any(entry["split"] == "train" for entry in manifest["shards"])
    if trained and card["made_with"]["data"] == "corpus":
        artifact.check_made_from(weights, card, "tokens", made_from.tokens([0], manifest))
    return card


def main(argv: list[str] | None = None) -> None:
    p = cli.parser(__doc__)
    p.add_argument(
        "--expert-weights", required=True, type=Path, help="model.safetensors in the folder of the expert"
    )
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--out", required=True, type=Path, help="npz to write")
    p.add_argument("--ensemble", type=Path, help="folder of the ensemble that the expert belongs to")
    p.add_argument("--threads", type=int, default=1, help="threads that the model computes with on a CPU")
    args = p.parse_args(argv)
    plan = plans.score_expert(config.read(args.config))
    cli.start_logging(f"score {args.expert_weights.parent.name}", args.log)
    torch.set_num_threads(args.threads)

    manifest = artifact.read_sealed(args.shards, "shards")
    card = read_card(args.expert_weights, manifest, args.ensemble)
    documents = [
        document for _, document in heldout.documents(args.shards.parent, manifest, plan.max_document_tokens)
    ]

    net = model.load(args.expert_weights.parent).eval()
    device.move(net)
    logprob_N = score(net, documents, plan.context, plan.stride)
    if not np.isfinite(logprob_N).all():
        raise ValueError(
            f"{args.expert_weights}: some log-probabilities are not finite. Expected finite numbers. "
            "Lower train.lr."
        )
    identities = made_from.score_expert(card, manifest)
    meta = artifact.make_meta("scores", identities, plan.content(), expert=card["expert"])
    artifact.write_npz(args.out, meta, logprob_N=logprob_N)
    log.info("%d tokens, %.4f nats each", len(logprob_N), -logprob_N.mean() if len(logprob_N) else 0)


if __name__ == "__main__":
    cli.run(main)
