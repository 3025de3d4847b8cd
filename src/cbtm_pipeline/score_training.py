"""Score training documents with an expert of the first round (cluster.second_round).

    python -m cbtm_pipeline.score_training --config results/config.json \\
        --expert-weights results/experts/first-0/model.safetensors --shards results/shards/manifest.json \\
        --out results/second/scores/first-0.npz --threads 1

The documents are those that clusters are fitted on: cluster.fit_documents of all shards. Of each, the first
train.seq_len tokens are read. The score is the mean negative log-probability of a token.

Shapes: N documents.
"""

from pathlib import Path

import numpy as np
import torch

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli, device
from cbtm_pipeline.corpus import shard_files
from cbtm_pipeline.provenance import expert_files, made_from
from cbtm_pipeline.training import model, scoring


def means(logprob_T: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """The mean negative log-probability of each document's tokens (float32, (N,)); 0 without tokens."""
    ends_N = np.concatenate([[0], np.cumsum(logprob_T, dtype=np.float64)])[np.cumsum(lengths_N)]
    sums_N = np.diff(ends_N, prepend=0.0)
    return (-sums_N / np.maximum(lengths_N, 1)).astype(np.float32)


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__)
    p.add_argument("--expert-weights", required=True, type=Path, help="model.safetensors of the expert")
    p.add_argument("--shards", required=True, type=Path, help="shards/manifest.json")
    p.add_argument("--out", required=True, type=Path, help="npz to write")
    p.add_argument("--threads", type=int, default=1, help="threads that the model computes with on a CPU")
    args = p.parse_args(argv)
    plan = plans.score_training(config.read(args.config))
    cli.start_logging(f"training score {args.expert_weights.parent.name}", args.log)
    torch.set_num_threads(args.threads)

    manifest = artifact.read_sealed(args.shards, "shards")
    card = expert_files.read_card(args.expert_weights)
    artifact.check_made_from(args.expert_weights, card, "tokenizer", manifest["made_from"]["tokenizer"])
    net = model.load(args.expert_weights.parent).eval()
    device.move(net)
    train = shard_files.entries(args.shards, manifest, "train")
    found, n_tokens = [], 0
    for entry, rows in shard_files.sample(train, plan.fit_documents, plan.rng_seed):
        documents = shard_files.documents(args.shards.parent, entry).take(rows)
        begins = [
            documents.values[a : min(b, a + 1 + plan.context)]
            for a, b in zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
        ]
        lengths_N = np.array([len(begin) - 1 for begin in begins], np.int64)
        found.append(means(scoring.score(net, begins, plan.context, plan.context), lengths_N))
        n_tokens += int(lengths_N.sum())
    nll_N = np.concatenate(found)
    if not np.isfinite(nll_N).all():
        raise ValueError(
            f"{args.expert_weights}: some log-probabilities are not finite. Expected finite numbers. "
            "Lower train.lr."
        )
    about = {
        "expert": card["expert"],
        "tokens": card["made_from"]["tokens"],
        "n_tokens": n_tokens,
        "flops": n_tokens * card["flops_per_token"] / 3,
    }
    identities = made_from.score_training(card, manifest)
    artifact.write_npz(
        args.out, artifact.make_meta("training_scores", identities, plan.content(), **about), nll_N=nll_N
    )
    cli.log.info("%d documents, %d tokens, %.4f nats each", len(nll_N), n_tokens, float(nll_N.mean()))


if __name__ == "__main__":
    cli.run(main)
