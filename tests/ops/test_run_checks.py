"""What the doctor finds of pretrained models, encoders and the disk, with a made-up cache and hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import made_hub
from cbtm_pipeline.ops import cost, run_checks
from cbtm_pipeline.ops.facts import Facts
from cbtm_pipeline.ops.finding import Line
from cbtm_pipeline.ops.planned import PlannedJob
from cbtm_pipeline.training import model
from made_hub import NEW, OLD
from made_run import make_config

SCRATCH = make_config().model.scratch
TOKENIZER = {"pretrained": "me/tiny", "revision": None}
WIDE = {**SCRATCH, "hidden_size": 2 * SCRATCH["hidden_size"]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with me/tiny: on `main` a model and a tokenizer's file, on `wide` another model only."""
    folder = tmp_path_factory.mktemp("hub")
    main = made_hub.snapshot(folder, "me/tiny", NEW, "main")
    model.scratch(SCRATCH, 300, 0, 256, 0).save_pretrained(main)
    (main / "tokenizer.json").write_text("{}")
    wide = made_hub.snapshot(folder, "me/tiny", OLD, "wide")
    model.scratch(WIDE, 300, 0, 256, 0).save_pretrained(wide)
    return folder


@pytest.fixture(autouse=True)
def a_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that has me/other, and me/tiny at v2, and nothing else."""
    with made_hub.server("me/other", "me/other/revision/v1", "me/tiny/revision/v2") as (endpoint, _):
        made_hub.use(monkeypatch, cache, endpoint)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield


def submitted(*rules: str) -> list[PlannedJob]:
    """Jobs of these rules that go to Slurm."""
    resources = {"slurm_partition": "gpu", "runtime": 60, "mem_mb": 16000, "gpus": 1}
    return [PlannedJob(rule, resources, 8, True) for rule in rules]


def models(
    pretrained: str, *rules: str, revision: str | None = None, tokenizer: dict[str, Any] | None = None
) -> list[Line]:
    """The findings for a config with this model and tokenizer, whose `rules` go to Slurm."""
    config = make_config(model={"pretrained": pretrained, "revision": revision}, tokenizer=tokenizer or {})
    return list(run_checks.check_model(Facts([], None, config, submitted(*rules))))


def levels(lines: list[Line]) -> list[str]:
    return [level for level, _ in lines]


def test_models_have_to_be_here_where_jobs_may_have_no_network() -> None:
    assert levels(models("me/tiny", "tokenizer", "train_expert")) == ["ok", "ok"]
    assert "HF_HUB_OFFLINE" in models("me/tiny", "tokenizer")[0][1]
    assert "HF_HUB_OFFLINE" not in models("me/tiny")[0][1]
    (found,) = models("me/other", "train_expert")
    assert found[0] == "FAIL" and found[1].endswith("Run hf download me/other")
    ((level, text),) = models("me/other")
    assert level == "ok" and "the hub has it" in text
    ((level, text),) = models("me/nobody")
    assert level == "FAIL" and "no public me/nobody" in text
    other = {"pretrained": "me/other"}
    assert levels(models("me/tiny", "tokenizer", tokenizer=other)) == ["ok", "FAIL", "ok"]
    assert levels(models("me/tiny", "train_expert", tokenizer=other)) == ["ok", "ok", "ok"]


def test_a_model_is_looked_for_at_its_revision() -> None:
    facts = [
        Facts(
            [], None, make_config(model={"pretrained": "me/tiny", "revision": revision}, tokenizer=TOKENIZER)
        )
        for revision in (None, NEW, "wide", OLD)
    ]
    found = [list(run_checks.check_model(f)) for f in facts]
    assert {level for lines in found for level, _ in lines} == {"ok"}
    folders = [lines[0][1].partition("models--me--tiny/snapshots/")[2].split(";")[0] for lines in found]
    assert folders == [NEW, NEW, OLD, OLD]
    n_parameters = [f.model and f.model.n_parameters for f in facts]
    sizes = [model.n_parameters(model.scratch(scratch, 300, 0, 256, 0)) for scratch in (SCRATCH, WIDE)]
    assert n_parameters == [sizes[0], sizes[0], sizes[1], sizes[1]] and sizes[0] != sizes[1]


def test_the_advice_names_the_revision() -> None:
    ((level, text),) = models("me/tiny", "train_expert", revision="v2")
    assert level == "FAIL" and text.endswith("Run hf download me/tiny --revision v2")
    ((level, text),) = models("me/tiny", revision="v2")
    assert level == "ok" and "the hub has it" in text
    ((level, text),) = models("me/tiny", revision="v3")
    assert level == "FAIL" and "no public me/tiny at v3" in text
    assert text.endswith("or run hf download me/tiny --revision v3")


def test_a_model_and_its_tokenizer_may_have_two_revisions() -> None:
    first, second, third = models(
        "me/tiny", "tokenizer", "train_expert", revision="wide", tokenizer=TOKENIZER
    )
    assert [first[0], second[0], third[0]] == ["ok", "ok", "ok"]
    assert OLD in first[1] and NEW in second[1]
    ((level, text), _) = models("me/tiny", "tokenizer", revision="wide")  # this branch has no tokenizer
    assert level == "FAIL" and text.partition(" lacks ")[2].startswith("tokenizer.json. ")
    assert text.endswith("Run hf download me/tiny --revision wide again, or choose a model that has it")


def test_a_folder_that_lacks_files(tmp_path: Path) -> None:
    ((level, text),) = models(str(tmp_path))
    assert level == "FAIL" and "lacks config.json, model.safetensors" in text and text.endswith("Complete it")


def encoders(encoder: str | None, *rules: str, revision: str | None = None) -> Facts:
    """Facts of a run with this encoder, of which `rules` go to Slurm."""
    embed = {"encoder": encoder, "n_components": 7, "revision": revision}
    return Facts([], None, make_config(embed=embed), submitted(*rules))


def test_an_encoder_has_to_be_here_too(tmp_path: Path) -> None:
    assert list(run_checks.check_encoder(encoders(None, "embed"))) == []
    facts = encoders("me/tiny", "embed")
    ((level, text),) = run_checks.check_encoder(facts)
    assert level == "ok" and "HF_HUB_OFFLINE" in text
    assert facts.n_dimensions == SCRATCH["hidden_size"]
    ((level, text),) = run_checks.check_encoder(encoders("me/other", "embed"))
    assert level == "FAIL" and text.endswith("Run hf download me/other")
    ((level, text),) = run_checks.check_encoder(encoders("me/other", "train_expert"))
    assert level == "ok" and "lacks the encoder, but the hub has it" in text
    ((level, text),) = run_checks.check_encoder(encoders(str(tmp_path), "embed"))
    assert level == "FAIL" and "lacks config.json" in text and text.endswith("Complete it")


def test_an_encoder_is_looked_for_at_its_revision() -> None:
    facts = encoders("me/tiny", "embed", revision="wide")
    ((level, text),) = run_checks.check_encoder(facts)
    assert facts.n_dimensions == WIDE["hidden_size"]
    assert level == "FAIL" and f"{OLD} lacks tokenizer.json. " in text
    ((level, text),) = run_checks.check_encoder(encoders("me/other", "embed", revision="v1"))
    assert level == "FAIL" and text.endswith("Run hf download me/other --revision v1")
    ((level, text),) = run_checks.check_encoder(encoders("me/other", revision="v1"))
    assert level == "ok" and "the hub has it" in text


def test_the_disk_holds_vectors_of_the_encoder(tmp_path: Path) -> None:
    def disk(encoder: str | None) -> tuple[float, str]:
        facts = encoders(encoder)
        assert facts.config
        facts.config = facts.config.model_copy(update={"outdir": str(tmp_path)})
        facts.model = cost.Size(1, 6, 300)
        list(run_checks.check_encoder(facts))
        ((level, text),) = run_checks.check_disk(facts)
        assert level == "ok" and text.startswith("disk: ")
        return float(text.split()[1]), text

    (linear, _), (tiny, known), (other, assumed) = disk(None), disk("me/tiny"), disk("me/other")
    megabytes = cost.DEMO_BYTES / cost.DOCUMENT_BYTES * 4 / 1e6  # of one number per document
    assert tiny - linear == pytest.approx(megabytes * (SCRATCH["hidden_size"] - 7), abs=0.1)
    assert other - linear == pytest.approx(megabytes * (768 - 7), abs=0.1)
    assert "taken to have" not in known and "the encoder's vectors are taken to have 768 numbers" in assumed


@pytest.mark.parametrize(
    ("profile", "mode", "level"), [(None, 0o755, ""), ("slurm", 0o755, ""), (None, 0o777, "warn")]
)
def test_an_outdir_that_everybody_may_write_to(
    tmp_path: Path, profile: str | None, mode: int, level: str
) -> None:
    outdir = tmp_path / "results"
    outdir.mkdir()
    outdir.chmod(mode)
    config = make_config().model_copy(update={"outdir": str(outdir)})
    assert levels(list(run_checks.check_folder(Facts([], profile, config)))) == ([level] if level else [])
    outdir.chmod(0o777)
    with pytest.raises(ValueError, match="everybody may write there"):
        list(run_checks.check_folder(Facts([], "slurm", config)))
