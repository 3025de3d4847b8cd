"""Does decoding say what the evaluation says? Every held-out document of a run, token by token.

    python benchmarks/decoding.py [RESULTS]

Documents are decoded in batches with left padding, one token at a time, with the cache. Each token's
log-probability is compared with the mixture of the stored `scores/` and `route/distances.npz`, for both
routers and with 1, 2 and all experts active. Prints the largest difference for each setting, and ends with
status 1 if one is above TOLERANCE.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cbtm_pipeline import config
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import heldout
from cbtm_pipeline.inference.modeling_cbtm import CBTMForCausalLM
from cbtm_pipeline.mixture import ensemble

TOLERANCE = 1e-5  # of a token's log-probability
BATCH = 256
SETTINGS = {"router_temperature": 0.1, "epsilon": 0.05, "beta": 0.5}


def offline(
    router: str, n_active: int, logprob_NK: np.ndarray, d2_NK: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """The mixture's log-probability of each token (N), by the functions of the evaluation."""
    if router == "paper":
        logw_NK = ensemble.paper_log_weights(d2_NK, SETTINGS["router_temperature"], n_active)
    else:
        temperature, epsilon, beta = SETTINGS.values()
        logw_NK = ensemble.filter_log_weights(
            logprob_NK, d2_NK, offsets, temperature, epsilon, beta, n_active
        )
    return ensemble.mix(logprob_NK, logw_NK)


def decode(model: CBTMForCausalLM, texts: list[np.ndarray], pad: int) -> Iterator[np.ndarray]:
    """Log-probabilities of all tokens but the first, of each text. All texts are one padded batch."""
    length = max(map(len, texts))
    ids, mask = np.full((len(texts), length), pad), np.zeros((len(texts), length), np.int64)
    for row, text in enumerate(texts):
        ids[row, length - len(text) :], mask[row, length - len(text) :] = text, 1
    ids_BT, mask_BT, cache, found = torch.from_numpy(ids), torch.from_numpy(mask), None, []
    with torch.inference_mode():
        for t in range(length - 1):
            out = model(
                ids_BT[:, t : t + 1],
                attention_mask=mask_BT[:, : t + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            found.append(out.logits[:, -1].gather(1, ids_BT[:, t + 1 : t + 2])[:, 0])
    logprob_BT = torch.stack(found, 1).double().numpy()
    yield from (logprob_BT[row, length - len(text) :] for row, text in enumerate(texts))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", nargs="?", type=Path, default=Path("results"))
    p.add_argument("--documents", type=int, help="only the first so many")
    args = p.parse_args()
    results = args.results
    cfg = config.read(results / "config.json")
    manifest = artifact.read_sealed(results / "shards/manifest.json", "shards")
    limit = min(cfg.eval.max_document_tokens or cfg.train.seq_len, cfg.train.seq_len)
    texts = [
        d[: limit + 1].astype(np.int64) for _, d in heldout.documents(results / "shards", manifest, limit)
    ]
    texts = texts[: args.documents]
    arrays, _ = artifact.read_npz(results / "route/distances.npz", "distances")
    names = [str(j) for j in range(arrays["d2_NK"].shape[1])]
    scores = [artifact.read_npz(results / f"scores/{name}.npz", "scores")[0]["logprob_N"] for name in names]
    logprob_NK, worst = np.stack(scores, 1).astype(np.float64), 0.0
    for router in ("filter", "paper"):
        for n_active in sorted({1, 2, len(names)}):
            begin = time.perf_counter()
            model = CBTMForCausalLM.from_pretrained(
                results / "ensemble", router=router, n_active=n_active, **SETTINGS
            ).eval()
            token, document = [], []
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                for i, found in zip(rows, decode(model, [texts[i] for i in rows], 0), strict=True):
                    first = arrays["offsets"][i]
                    part = slice(first, first + len(found))
                    expected = offline(
                        router, n_active, logprob_NK[part], arrays["d2_NK"][part], np.array([0, len(found)])
                    )
                    token.append(np.abs(found - expected).max())
                    document.append(abs(found.mean() - expected.mean()))
            worst = max(worst, *token)
            print(
                f"{router:6} top-{n_active}: {len(texts)} documents, largest difference of a document's mean "
                f"{max(document):.1e}, of a token {max(token):.1e}; documents with a token above 1e-5: "
                f"{sum(t > TOLERANCE for t in token)} ({time.perf_counter() - begin:.0f} s)",
                flush=True,
            )
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
