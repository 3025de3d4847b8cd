"""The folder of a finished expert: whatever happens to one of its files, readers refuse it."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import damaged
import made_training as made
from cbtm_pipeline import plan
from cbtm_pipeline.base import artifact
from cbtm_pipeline.provenance import expert_files
from cbtm_pipeline.training import expert_card, expert_folder

FILES = [  # of an expert, by their path in its folder
    *("README.md", "card.json", "config.json", "files.json", "generation_config.json", "metrics.jsonl"),
    *(
        "model.safetensors",
        "tensorboard/events.out.tfevents.0.cbtm",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
]
N_DAMAGES = 40  # of each file


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A small corpus with a trained seed model."""
    out = tmp_path_factory.mktemp("folder")
    made.write_seed(out)
    return out


@pytest.fixture
def weights(outdir, tmp_path) -> Path:
    """The weights in a copy of the seed's folder."""
    return shutil.copytree(outdir / "experts/seed", tmp_path / "seed") / "model.safetensors"


def test_the_folder_has_these_files_and_the_record_all_of_them(weights):
    found = sorted(
        str(path.relative_to(weights.parent)) for path in weights.parent.rglob("*") if path.is_file()
    )
    assert found == FILES
    record = artifact.read_sealed(weights.with_name("files.json"), "expert_files")
    assert sorted(record["files"]) == [name for name in FILES if name not in ("files.json", weights.name)]
    card = expert_files.read_card(weights)
    assert record["made_from"] == {"expert": card["identity"]}
    assert card["weights"] == artifact.identity(weights)


def test_other_programs_are_told_of_padding_and_of_the_longest_text(weights):
    config = json.loads(weights.with_name("tokenizer_config.json").read_text())
    assert (config["model_max_length"], config["padding_side"]) == (made.SEQ_LEN, "left")
    generation = json.loads(weights.with_name("generation_config.json").read_text())
    assert [generation[f"{role}_token_id"] for role in ("pad", "bos", "eos")] == [0, 0, 0]
    assert json.loads(weights.with_name("config.json").read_text())["pad_token_id"] is None, "is its identity"


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_model_card_says_what_the_hub_asks_for(weights):
    card = expert_files.read_card(weights)
    text = weights.with_name("README.md").read_text()
    assert header(text)["license"] == "unknown" and "base_model" not in header(text)
    assert f"| final training loss | {card['final_loss']:.4f} nats per token |" in text
    assert "| began as | random weights |" in text and "ids = [0, *tokenizer(" in text
    about = expert_card.About("X", 7, None, "me/base", {"licence": "CC-BY-4.0", "language": "is"})
    named = expert_card.render({**card, "validation_loss": 1.5}, about)
    expected = {"license": "cc-by-4.0", "language": "is", "base_model": "me/base"}
    assert expected.items() <= header(named).items()
    assert "| validation loss | 1.5000 nats" in named and "| began as | me/base |" in named
    odd = expert_card.render(card, about._replace(base="", tags={"license": "a: b\n# |c|"}))
    assert header(odd)["license_name"] == "a: b\n# |c|" and "base_model" not in header(odd)
    assert (
        "| licence of its text | a: b\\\\x0a# \\|c\\| |" in odd
        and "| began as | a model in a folder |" in odd
    )


def test_the_identity_is_that_of_weights_and_configuration(weights):
    card = expert_files.read_card(weights)
    config = artifact.identity(weights.with_name("config.json"))
    assert card["identity"] == artifact.fingerprint([card["weights"], config])


@pytest.mark.parametrize("name", [name for name in FILES if expert_files.is_read(name)])
def test_no_flipped_bit_and_no_cut_of_any_file_goes_unnoticed(weights, name):
    path = weights.parent / name
    n_refused = 0
    for content in damaged.versions(path.read_bytes(), N_DAMAGES):
        with (
            damaged.replaced(path, content),
            pytest.raises(ValueError, match=rf"(Make it|train the model) again: .*{weights}$|Check the path"),
        ):
            expert_files.read_card(weights)
        n_refused += 1
    assert n_refused == N_DAMAGES
    with damaged.replaced(path, None), pytest.raises(FileNotFoundError):
        expert_files.read_card(weights)
    assert expert_files.read_card(weights)["expert"] == "seed"


@pytest.mark.parametrize("name", ["card.json", "files.json"])
def test_no_flipped_bit_of_a_record_goes_unnoticed(weights, name):
    path = weights.parent / name
    content = path.read_bytes()
    for at in range(len(content)):
        with damaged.replaced(path, damaged.flipped(content, at, at % 8)), pytest.raises(ValueError):
            expert_files.read_card(weights)


def test_the_card_of_another_expert_is_refused(outdir, weights):
    other = made.files(outdir, "0")
    made.train(made.make_config(steps=1), other, "0")
    for names in (["card.json"], ["files.json"], ["model.safetensors"], ["card.json", "model.safetensors"]):
        mixed = shutil.copytree(weights.parent, weights.parents[1] / "-".join(names))
        for name in names:
            shutil.copy(other.out.with_name(name), mixed)
        with pytest.raises(ValueError, match=r"another"):
            expert_files.read_card(mixed / "model.safetensors")


def test_one_file_is_checked_alone(weights):
    card = expert_files.read_card(weights)
    metrics = weights.with_name("metrics.jsonl")
    expert_files.check_file(metrics, card)
    with damaged.replaced(weights.with_name("README.md"), b"mine"):
        expert_files.check_file(metrics, card)
    with (
        damaged.replaced(metrics, metrics.read_bytes() + b"\n"),
        pytest.raises(ValueError, match="metrics.jsonl"),
    ):
        expert_files.check_file(metrics, card)


def test_a_folder_is_published_if_it_is_whole_and_of_this_training(weights):
    how = plan.train_expert(made.make_config(), "seed")
    origin = json.loads(weights.with_name("card.json").read_text())["made_from"]
    assert expert_folder.is_published(weights, how, origin)
    assert not expert_folder.is_published(weights, how, {**origin, "tokens": "0" * 32})
    assert not expert_folder.is_published(
        weights, plan.train_expert(made.make_config(lr=1.0), "seed"), origin
    )
    with damaged.replaced(weights.with_name("tokenizer.json"), b"{}"):
        assert not expert_folder.is_published(weights, how, origin)
    with damaged.replaced(weights, None):
        assert not expert_folder.is_published(weights, how, origin)


def publish_only(n: int, folder: Path, patched: pytest.MonkeyPatch) -> list[str]:
    """Let only n files come into the folder. Returns their paths in it, which are listed as they come."""
    published, publish = [], artifact.publish

    def publish_up_to_n(path: Path):
        if folder in path.parents and ".staging" not in path.parts:
            if len(published) == n:
                raise KeyboardInterrupt
            published.append(str(path.relative_to(folder)))
        return publish(path)

    patched.setattr(artifact, "publish", publish_up_to_n)
    return published


def test_published_over_an_older_folder_and_killed_on_the_way(outdir, weights, monkeypatch):
    """New files among old ones are refused until the weights, which come last, are there."""
    where = made.files(outdir, "seed")._replace(out=weights, work=weights.parents[1] / "work")
    cfg = made.make_config(lr=0.02)
    for n in range(len(FILES)):
        with monkeypatch.context() as patched:
            published = publish_only(n, weights.parent, patched)
            with pytest.raises(KeyboardInterrupt):
                made.train(cfg, where, "seed")
        assert len(published) == n
        if any(expert_files.is_read(name) for name in published):
            with pytest.raises(ValueError):
                expert_files.read_card(weights)
    assert published[-1] == "files.json"
    made.train(cfg, where, "seed")
    made.check_published(where, 5)


def test_a_model_that_is_trained_again_keeps_the_evaluation_of_its_weights(weights):
    text = weights.with_name("README.md").read_text()
    before = weights.parent
    assert expert_card.add_evaluation(
        before, "Seed", expert_card.Evaluation({"all": 12.5}, {"all": None}, "dense", ())
    )
    evaluated = weights.with_name("README.md").read_text()
    hashed = expert_files.read_card(weights)["weights"]
    assert "| all | 12.50 |  |" in evaluated and "12.50" not in text
    assert expert_card.with_evaluation_of(text, evaluated, hashed) == evaluated
    assert expert_card.with_evaluation_of(text, evaluated, "0" * 32) == text
