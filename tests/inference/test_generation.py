"""A generation, step by step, against transformers' own `generate`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import made_server
from cbtm_pipeline.base import hub
from cbtm_pipeline.inference import modeling_cbtm  # noqa: F401, registers the model
from cbtm_pipeline.inference.generation import Generation, Token
from cbtm_pipeline.inference.requests import Prompt, Task

IDS = [0, *range(3, 300)]  # longer than a block
N_NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_server.write_ensemble(tmp_path_factory.mktemp("made"))


def load(folder: Path, **settings: Any) -> Any:
    return hub.load(AutoModelForCausalLM, folder, **settings)


def run(model: Any, task: Task, stop_after: dict[int, int] | None = None) -> dict[int, list[Token]]:
    """The tokens of each answer. `stop_after`: how many tokens answers have that end early."""
    generation = Generation(model, task.prompts[0], task, 0)
    for _ in generation.read():
        pass
    found: dict[int, list[Token]] = {row: [] for row in range(task.n)}
    for step in range(1, task.max_tokens + 1):
        for token in generation.step():
            found[token.row].append(token)
        for row, n in (stop_after or {}).items():
            if n == step:
                generation.stop(row)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "paper"},
        {"route": "once"},
        {"mode": "merge"},
        {"fix_after": 280},
        {"hysteresis": 5.0},
        {"max_loaded": 1},
        {"exclude": ["harbour"], "n_active": 1},
    ],
    ids=str,
)
def test_a_generation_is_transformers_own(folder: Path, settings: dict[str, Any]) -> None:
    model = load(folder, **settings)
    whole = model.generate(torch.tensor([IDS]), do_sample=False, max_new_tokens=N_NEW)
    expected = whole[0, len(IDS) :].tolist()
    assert len(set(expected)) > 3, "a text of one token would show nothing"
    task = Task([Prompt(IDS)], N_NEW, temperature=0, n_top=0)
    found = run(load(folder, **settings), task)[0]
    assert [token.id for token in found] == expected
    assert all(token.weights and sum(token.weights) == pytest.approx(1) for token in found)


def test_a_prompt_in_parts_costs_no_more_than_in_one(folder: Path) -> None:
    for router in ("filter", "paper"):
        model, parts = load(folder, router=router), load(folder, router=router)
        model(torch.tensor([IDS]), logits_to_keep=1)
        list(Generation(parts, Prompt(IDS), Task([Prompt(IDS)], 1), 0).read())
        assert parts.n_passes == model.n_passes > 0


def test_answers_that_end_leave_the_others_as_they_are(folder: Path) -> None:
    task = Task([Prompt(IDS)], N_NEW, n=3, seed=1)
    whole = run(load(folder), task)
    model = load(folder)
    fewer = run(model, task, stop_after={0: 2, 2: 5})
    assert [len(fewer[row]) for row in range(3)] == [2, N_NEW, 5]
    for row in range(3):
        assert [token.id for token in fewer[row]] == [token.id for token in whole[row]][: len(fewer[row])]
    assert len({tuple(token.id for token in tokens) for tokens in whole.values()}) == 3


def test_answers_that_end_cost_no_more(folder: Path) -> None:
    task, model = Task([Prompt(IDS)], N_NEW, n=2, seed=1), load(folder, n_active=3)
    generation = Generation(model, Prompt(IDS), task, 0)
    list(generation.read())
    generation.step()
    before = model.n_passes
    generation.step()
    assert model.n_passes - before == 6, "two rows through three experts"
    generation.stop(0)
    before = model.n_passes
    generation.step()
    assert model.n_passes - before == 3
