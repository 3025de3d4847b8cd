"""The scores of one document under a model, in the windows of the evaluation."""

from typing import Any

import numpy as np
import torch

from cbtm_pipeline.corpus.windows import windows


def score(net: Any, document: np.ndarray, context: int, stride: int) -> np.ndarray:
    """Log-probability of each token of `[sep, x_0, ...]`, (n,) float32; long documents in windows."""
    scored = np.empty(len(document) - 1, np.float32)
    for start, first, stop in windows(len(scored), context, stride):
        ids = torch.from_numpy(document[start : stop + 1].astype(np.int64))[None].to(net.device)
        with torch.inference_mode():
            logits = net(input_ids=ids[:, :-1], use_cache=False).logits[0].float()
            logprob_T = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu().numpy()
        scored[first:stop] = logprob_T[first - start :]
    return scored
