"""Score the held-out text with one expert.

    python -m cbtm_pipeline.score_expert --config results/config.json \\
        --expert-weights results/experts/0/model.safetensors --shards results/shards/manifest.json \\
        --out results/scores/0.npz --threads 1

With --ensemble DIR, the expert is one of an ensemble's folder, and is verified by the record there.

The score of a token is its natural log-probability, given the separator and the tokens before it. The rows
are those of corpus/heldout.py. All computation is in float32, on CPUs and GPUs alike.

Shapes: B windows, T inputs of the longest one, V tokens in the vocabulary, N held-out tokens.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli, device
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.corpus import heldout
from cbtm_pipeline.corpus.windows import windows
from cbtm_pipeline.inference import package
from cbtm_pipeline.provenance import expert_files, made_from
from cbtm_pipeline.training import model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096  # in one forward pass
LOGIT_BYTES = 1 << 28  # in one forward pass: with a large vocabulary, it has fewer tokens


class Window(NamedTuple):
    """A piece of a document: `tokens` are its inputs and the token after the last one.

    The targets of inputs `n_context`, `n_context` + 1, ... are scored, and go to `rows` of the result.
    """

    tokens: np.ndarray
    n_context: int
    rows: slice


def cut(documents: Sequence[np.ndarray], context: int, stride: int) -> Iterator[Window]:
    """The windows of documents `[sep, x_0, ..., x_(n-1)]`, with the rows of their scored tokens."""
    row = 0
    for document in documents:
        n_tokens = len(document) - 1
        for start, first, stop in windows(n_tokens, context, stride):
            yield Window(document[start : stop + 1], first - start, slice(row + first, row + stop))
        row += n_tokens


def batched(all_windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Batches of windows of similar length, the longest first.

    A batch has at most `batch_tokens` inputs, with padding, or a single window.
    """
    order = sorted(all_windows, key=lambda window: -len(window.tokens))
    while order:
        n = max(1, batch_tokens // (len(order[0].tokens) - 1))
        yield order[:n]
        order = order[n:]


def logprobs(net: "PreTrainedModel", batch: Sequence[Window]) -> np.ndarray:
    """The log-probability of the token after each input (float32, (B, T)); undefined after a window's end.

    Windows are padded on the right. A causal model never looks there, so no mask is needed.
    """
    tokens_BT = np.zeros((len(batch), len(batch[0].tokens)), np.int64)
    for row, window in zip(tokens_BT, batch, strict=True):
        row[: len(window.tokens)] = window.tokens
    with torch.inference_mode():
        ids = torch.from_numpy(tokens_BT).to(net.device)
        logits_BTV = net(input_ids=ids[:, :-1], use_cache=False).logits.float()
        chosen_BT = logits_BTV.gather(2, ids[:, 1:, None]).squeeze(2)
        return (chosen_BT - logits_BTV.logsumexp(2)).cpu().numpy()


def score(
    net: "PreTrainedModel",
    documents: Sequence[np.ndarray],
    context: int,
    stride: int,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """The log-probability of each token of documents `[sep, x_0, ..., x_(n-1)]`, in order (float32, (N,)).

    Separators have no score.
    """
    n_tokens = sum(len(document) - 1 for document in documents)
    batch_tokens = min(batch_tokens, LOGIT_BYTES // (4 * net.config.get_text_config().vocab_size))
    logprob_N = np.full(n_tokens, np.nan, np.float32)
    progress = cli.Progress("scored", n_tokens, "tokens")
    for batch in batched(list(cut(documents, context, stride)), batch_tokens):
        for scored_T, window in zip(logprobs(net, batch), batch, strict=True):
            logprob_N[window.rows] = scored_T[window.n_context : len(window.tokens) - 1]
            progress.add(window.rows.stop - window.rows.start)
    return logprob_N


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
        artifact.check_made_from(weights, card, "tokens", made_from.tokens(0, manifest))
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
