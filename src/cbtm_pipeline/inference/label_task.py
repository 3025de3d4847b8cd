"""A task of lm-evaluation-harness that also scores labels by token mean and by domain-conditional PMI.

The harness itself knows log P(y | x) (`acc`) and PMI (`acc_mutual_info`). This class adds
`acc_token_mean` and, where the task file has `metadata.cbtm.domain`, `acc_dcpmi` (label_scores.py). For the
latter it asks the model for each label after the domain string, too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from lm_eval.api.task import ConfigurableTask

from cbtm_pipeline.inference import label_scores

METRICS = {"token_mean": "acc_token_mean", "dcpmi": "acc_dcpmi"}


class LabelTask(ConfigurableTask):
    """A multiple-choice task with these scores. `count_tokens`: the number of tokens of a continuation."""

    def __init__(self, config: dict[str, Any], domain: str | None, count_tokens: Callable[[str], int]):
        super().__init__(config=config)
        self.domain, self.count_tokens = domain, count_tokens

    def _continuations(self, doc: dict[str, Any]) -> list[str]:
        return [f"{self.config.target_delimiter}{choice}" for choice in self.doc_to_choice(doc)]

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> Any:
        """The harness's requests, and each label after the domain string."""
        requests: Any = super().construct_requests(doc, ctx, **kwargs)
        if self.domain is None:
            return requests
        first, n = requests[0], len(requests)
        # lists of answers of their own: `replace` alone would share those of the first
        return requests + [
            dataclasses.replace(first, arguments=(self.domain, text), idx=n + i, resps=[], filtered_resps={})
            for i, text in enumerate(self._continuations(doc))
        ]

    def process_results(self, doc: dict[str, Any], results: Any) -> dict[str, Any]:
        """The harness's metrics of one example, and 1.0 or 0.0 for each further score."""
        texts = self._continuations(doc)
        n = len(texts)
        n_own = n if self.domain is not None else 0
        found: Any = super().process_results(doc, results[: len(results) - n_own])
        logprob_Y = [logprob for logprob, _ in results[:n]]
        domain_Y = [logprob for logprob, _ in results[-n:]] if n_own else None
        chosen = label_scores.chosen(logprob_Y, [*map(self.count_tokens, texts)], None, domain_Y)
        gold: Any = self.doc_to_target(doc)
        right = self.doc_to_choice(doc).index(gold) if isinstance(gold, str) else int(gold)
        return {**found, **{METRICS[k]: float(j == right) for k, j in chosen.items() if k in METRICS}}

    def aggregation(self) -> dict[str, Any]:
        from lm_eval.api.metrics import mean

        return {**super().aggregation(), **dict.fromkeys(METRICS.values(), mean)}

    def higher_is_better(self) -> dict[str, Any]:
        return {**super().higher_is_better(), **dict.fromkeys(METRICS.values(), True)}
