"""`cbtm doctor` on k and the training tokens."""

from typing import Any

import pytest

from cbtm_pipeline import config
from cbtm_pipeline.ops import cost, k_checks
from cbtm_pipeline.ops.facts import Facts
from changed_config import changed


def found(n_parameters: int, **keys: Any) -> list[tuple[str, str]]:
    facts = Facts([], None)
    usual = {
        "corpus__train": ["a.jsonl"],
        "train__steps": 1000,
        "train__batch_size": 32,
        "train__seq_len": 256,
    }
    facts.config = config.validate(changed(**{**usual, **keys}))
    facts.model = cost.Size(n_parameters, 1, 2048)
    return list(k_checks.check_k(facts))


def test_doctor_warns_of_too_few_tokens_for_experts() -> None:
    ((level, line),) = found(4_096_000)
    assert level == "warn"
    assert line.startswith("cluster.k: 4 experts with 2 training tokens per parameter")
    assert "Raise train.steps" in line and "docs/which-k.md" in line


def test_doctor_is_content_with_as_many_tokens_as_the_study_had() -> None:
    ((level, line),) = found(204_800, cluster__k=8)
    assert (level, line) == (
        "ok",
        "cluster.k: 8 experts with 40 training tokens per parameter, all experts together",
    )


@pytest.mark.parametrize(
    "keys",
    [{"cluster__k": 1}, {"corpus__train": ["builtin:demo"]}, {"model__pretrained": "gpt2"}],
    ids=["one expert", "demo", "pretrained"],
)
def test_doctor_says_nothing_of_k_where_the_study_says_nothing(keys: dict[str, Any]) -> None:
    assert found(4_096_000, **keys) == []
