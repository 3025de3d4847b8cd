"""A model that somebody has made or trained on, in the place of an expert."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import made_ensemble as made
from cbtm_pipeline import replace_expert
from cbtm_pipeline.base import artifact
from cbtm_pipeline.inference import package
from made_project import ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.make(tmp_path_factory.mktemp("run") / "results")


@pytest.fixture
def trained(base: Path, tmp_path: Path) -> Path:
    """Expert 1 after a step of training with plain transformers, and its tokenizer, both saved by it."""
    model = AutoModelForCausalLM.from_pretrained(base / "experts/1")
    ids = torch.arange(5, 25)[None]
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.save_pretrained(tmp_path / "ft")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "ft")
    return tmp_path / "ft"


def replace(base: Path, new: Path, out: Path) -> int:
    return made.command(replace_expert.main, "1", "--with", new, "--from", base, "--out", out)


def test_a_model_and_its_tokenizer_saved_by_transformers_are_taken(
    base: Path, trained: Path, tmp_path: Path, capsys
) -> None:
    assert (trained / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()
    assert replace(base, trained, tmp_path / "out") == 0, capsys.readouterr().err
    assert package.verify(tmp_path / "out")["files"]["tokenizer.json"] == artifact.identity(
        base / "tokenizer.json"
    )
    card = artifact.read_sealed(tmp_path / "out/experts/1/card.json", "expert")
    assert card["made_from"] == {"tokenizer": artifact.identity(base / "tokenizer.json")}


def no_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_more_layers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    more = {
        name.replace("layers.0", "layers.1"): w.clone() for name, w in weights.items() if "layers.0" in name
    }
    save_file(weights | more, folder / "model.safetensors", {"format": "pt"})


def configured(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        artifact.write_json(folder / "config.json", {**artifact.read_json(folder / "config.json"), **values})

    return change


def other_word(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def lower_case(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "normalizer": {"type": "Lowercase"}}))


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (no_number, r"NaN or infinity in .* Expected finite numbers"),
        (cut, r"cannot be loaded \(.*\)\. Expected a causal language model"),
        (without_a_tensor, r"no fitting weights for model\.norm\.weight"),
        (of_another_shape, r"no fitting weights for model\.norm\.weight"),
        (with_more_layers, r"config\.json has no place for .* Expected it to fit the weights"),
        (configured(hidden_size=48), r"Expected every weight|cannot be loaded"),
        (configured(max_position_embeddings=8), r"a context of 8 tokens\. Expected 32 or more"),
        (configured(vocab_size=301), r"a vocabulary of 301 tokens\. Expected 300"),
        (other_word, r"another tokenizer \(other vocabulary or merges\)\. Expected that of"),
        (lower_case, r"another tokenizer \(other normaliser\)\. Expected that of"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            r"no tokenizer\. Expected .* Save tokenizer\.json",
        ),
    ],
)
def test_a_model_that_cannot_stand_for_an_expert_is_refused_before_anything_is_written(
    base: Path, trained: Path, tmp_path: Path, spoil: Callable[[Path], None], line: str, capsys
) -> None:
    spoil(trained)
    capsys.readouterr()
    assert replace(base, trained, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(str(trained)) and re.search(line, error), error
    assert not (tmp_path / "out").exists()


def test_an_expert_that_was_trained_on_in_its_own_folder_is_told_about_its_card(
    base: Path, trained: Path, tmp_path: Path, capsys
) -> None:
    shutil.copyfile(base / "experts/1/card.json", trained / "card.json")
    assert replace(base, trained, tmp_path / "out") == 1
    assert "Remove card.json from a model that you have trained on." in capsys.readouterr().err
    (trained / "card.json").unlink()
    assert replace(base, trained, tmp_path / "out") == 0


@pytest.mark.slow
def test_the_commands_of_the_documentation_train_an_expert_on(finished: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    (project / "mine.txt").write_text(made.text(400))
    text = (
        (ROOT / "docs/ensemble.md").read_text().partition("## Train an expert on\n")[2].partition("\n## ")[0]
    )
    blocks = re.findall(r"(?ms)^```(python|sh)\n(.*?)^```$", text)
    assert [kind for kind, _ in blocks] == ["python", "sh"]
    (project / "train_on.py").write_text(blocks[0][1])
    script = f'cbtm() {{ "{sys.executable}" -m cbtm_pipeline "$@"; }}\nset -e\n{blocks[1][1]}'
    for words in ([sys.executable, "train_on.py"], ["bash", "-c", script]):
        run = subprocess.run(words, cwd=project, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    assert "my-ensemble: 2 experts, with another 1" in run.stdout
    package.verify(project / "my-ensemble")
