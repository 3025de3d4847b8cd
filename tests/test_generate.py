"""`cbtm generate`: a text that goes on, in colours on a terminal."""

import io
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import made_ensemble as made
import pseudo_terminal
from cbtm_pipeline import generate
from cbtm_pipeline.inference import colours, loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.make(tmp_path_factory.mktemp("run") / "results", terms=[["butter"], ["\x1b[2J"], ["rose"]])


def printed(capsys: pytest.CaptureFixture, *argv: object) -> str:
    assert made.command(generate.main, *argv) == 0
    return capsys.readouterr().out


def test_equal_seeds_give_equal_texts(folder: Path, capsys) -> None:
    options = ("butter flour", "--model", folder, "--max-new-tokens", 20)
    first, again, other = (printed(capsys, *options, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other
    assert "\x1b[38" not in first, "no colours in a pipe"


def test_the_greedy_text_is_that_of_transformers(folder: Path, capsys) -> None:
    ensemble = loaded.load(folder, "x")
    ids = ensemble.tokenizer("ship mast", add_special_tokens=False).input_ids
    inputs = torch.tensor([[ensemble.separator, *ids]])
    found = ensemble.model.generate(inputs, do_sample=False, max_new_tokens=8)[0, inputs.shape[1] :]
    text = ensemble.tokenizer.decode(found, skip_special_tokens=True)
    options = ("ship mast", "--model", folder, "--max-new-tokens", 8)
    assert printed(capsys, *options, "--greedy") == text + "\n"
    assert printed(capsys, *options, "--temperature", 0) == text + "\n"


def test_fewer_experts_and_another_router_are_heeded(folder: Path, monkeypatch, capsys) -> None:
    configs, load = [], loaded.load

    def noted(*args, **kwargs):
        configs.append((ensemble := load(*args, **kwargs)).model.config)
        return ensemble

    monkeypatch.setattr(loaded, "load", noted)
    options = ("--model", folder, "--max-new-tokens", 2)
    printed(capsys, "rose", *options, "--top-k-experts", 1, "--router", "paper")
    printed(capsys, "rose", *options, "--n-active", 2)
    assert [(c.n_active, c.router) for c in configs] == [(1, "paper"), (2, "filter")]


def test_the_text_ends_where_the_context_does(folder: Path, capsys) -> None:
    assert made.command(generate.main, "--model", folder, "--seed", 3, "--max-new-tokens", 500) == 0
    assert capsys.readouterr().err == f"The experts' context of {made.CONTEXT} tokens is full.\n"
    assert made.command(generate.main, made.text(100), "--model", folder) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("PROMPT: ") and f"Expected at most {made.CONTEXT}" in line


def test_a_prompt_may_come_from_a_pipe(folder: Path, monkeypatch, capsys) -> None:
    options = ("--model", folder, "--max-new-tokens", 5, "--greedy")
    expected = printed(capsys, "sail deck", *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("sail deck"))
    assert printed(capsys, "-", *options) == expected


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--temperature", "inf"), ("--n-active", "0")])
def test_bad_numbers_are_refused(folder: Path, option: tuple[str, str], capsys) -> None:
    assert made.command(generate.main, "x", "--model", folder, *option) == 2
    assert f"argument {option[0]}" in capsys.readouterr().err


def on_terminal(*argv: object, **environment: str) -> str:
    """What the command writes to a terminal."""
    env = {**os.environ, "TERM": "xterm-256color", **environment}
    return pseudo_terminal.shown("generate", *argv, env=env)


def test_a_terminal_shows_each_token_in_the_colour_of_its_expert(folder: Path, capsys) -> None:
    options = ("ship", "--model", folder, "--max-new-tokens", 20, "--seed", 1)
    coloured = on_terminal(*options)
    text, legend = coloured.split("\n\n")[0], coloured.split("\n\n")[-1]
    shown = re.sub(r"\x1b\[(38;5;\d+|0)m", "", coloured)
    assert "\x1b" not in shown, "only our own colours reach the terminal"
    used = set(re.findall(r"\x1b\[38;5;(\d+)m", text))
    assert used and used == set(re.findall(r"\x1b\[38;5;(\d+)m", legend))
    assert used <= set(map(str, colours.PALETTE[:3]))
    plain = on_terminal(*options, NO_COLOR="1")
    assert "\x1b" not in plain and shown.startswith(plain)


def test_the_legend_shows_terms_as_text() -> None:
    lines = colours.legend(["0", "1"], {"1": ["\x1b[2J", "b"]}, Counter({1: 3, 0: 1})).splitlines()
    assert len(lines) == 2 and lines[0].endswith(" 75 %  \\x1b[2J b")
