"""Which label a language model gives an example: the scores of few-shot classification by label.

A label y is the continuation of a prompt x. With log-probabilities of whole labels, and d a string that only
names the domain:

    lm           log P(y | x)
    token mean   log P(y | x) / the number of tokens of y
    PMI          log P(y | x) - log P(y)
    DC-PMI       log P(y | x) - log P(y | d)            domain-conditional PMI

PMI and DC-PMI are of Holtzman et al. 2021 (Surface form competition, arXiv 2104.08315, equations 2 and 3).
P(y) is that of y after the separator alone.

Shape: Y labels.
"""

from collections.abc import Mapping, Sequence

import numpy as np


def chosen(
    logprob_Y: Sequence[float],
    n_tokens_Y: Sequence[int] | None = None,
    alone_Y: Sequence[float] | None = None,
    domain_Y: Sequence[float] | None = None,
) -> dict[str, int]:
    """The index of the best label by each score that the arguments allow; of equals, the first.

    `alone_Y` and `domain_Y` are log P(y) and log P(y | d).
    """
    score = np.asarray(logprob_Y, np.float64)
    by_score: Mapping[str, np.ndarray] = {
        "lm": score,
        **({"token_mean": score / np.maximum(n_tokens_Y, 1)} if n_tokens_Y is not None else {}),
        **({"pmi": score - np.asarray(alone_Y)} if alone_Y is not None else {}),
        **({"dcpmi": score - np.asarray(domain_Y)} if domain_Y is not None else {}),
    }
    return {name: int(score_Y.argmax()) for name, score_Y in by_score.items()}
