"""The way to the hub: what is found on this machine, when the hub is asked, and that no foreign code runs."""

import ast
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import made_hub
from cbtm_pipeline.base import hub
from made_hub import NEW, OLD

SOURCE = Path(hub.__file__).parents[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two commits of me/tiny, a new one at `main` and an old one at `v1`. No hub answers."""
    folder = tmp_path / "cache"
    for commit, ref in ((NEW, "main"), (OLD, "v1")):
        snapshot = made_hub.snapshot(folder, "me/tiny", commit, ref)
        (snapshot / "config.json").write_text("{}")
        (snapshot / "model.safetensors").touch()
    made_hub.use(monkeypatch, folder)
    return folder


def fetch(name: str, revision: str | None = None, optional: tuple[str, ...] = ()) -> Path:
    return hub.fetch("model.pretrained", name, revision, hub.lacks_weights, hub.WEIGHTS, "weights", optional)


# --- what is here -------------------------------------------------------------------------------------------


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert hub.local_folder(str(tmp_path)) == hub.local_folder(str(tmp_path), "v1") == tmp_path
    assert hub.commit(tmp_path) is None


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD), (NEW, NEW)]
)
def test_a_name_is_found_in_the_cache_at_its_revision(cache: Path, revision: str | None, commit: str) -> None:
    folder = hub.local_folder("me/tiny", revision)
    assert folder == cache / "models--me--tiny/snapshots" / commit
    assert folder and hub.commit(folder) == commit


@pytest.mark.parametrize(
    ("name", "revision"),
    [("me/other", None), ("me/tiny", "v2"), ("me/tiny", "f" * 40), ("no such//name", None)],
)
def test_what_is_not_in_the_cache_is_not_found(cache: Path, name: str, revision: str | None) -> None:
    assert hub.local_folder(name, revision) is None


def test_the_cache_is_where_the_environment_says(tmp_path: Path) -> None:
    made_hub.snapshot(tmp_path, "me/tiny", NEW, "main")
    code = "from cbtm_pipeline.base import hub; print(hub.cache(), hub.local_folder('me/tiny'))"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": made_hub.NOBODY}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(tmp_path), str(tmp_path / "models--me--tiny/snapshots" / NEW)]


def test_commit_needs_the_layout_of_the_cache(tmp_path: Path) -> None:
    assert hub.commit(tmp_path / "snapshots" / NEW) == NEW
    assert hub.commit(tmp_path / "other" / NEW) is None
    assert hub.commit(tmp_path / "snapshots" / "main") is None


def test_what_a_model_lacks(tmp_path: Path) -> None:
    assert hub.lacks_weights(None) == ["the model"]
    assert hub.lacks_weights(tmp_path) == ["config.json", "model.safetensors"]
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert hub.lacks_weights(tmp_path) == []
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    (tmp_path / "1.safetensors").touch()
    assert hub.lacks_weights(tmp_path) == ["2.safetensors"]
    for text in ('{"weight', "{}", "[]"):
        index.write_text(text)
        assert hub.lacks_weights(tmp_path) == ["a whole model.safetensors.index.json"]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"]
)
def test_a_tokenizer_lacks_nothing_if_it_has_one_format(tmp_path: Path, name: str) -> None:
    assert hub.lacks_tokenizer(None) == ["the tokenizer"]
    assert hub.lacks_tokenizer(tmp_path) == ["tokenizer.json"]
    (tmp_path / name).touch()
    assert hub.lacks_tokenizer(tmp_path) == []


# --- when the hub is asked ----------------------------------------------------------------------------------


def asked(requests: list[str]) -> list[str]:
    """The requests for models; the library asks for other things, too, when it asks for any."""
    return [path for path in requests if path.startswith("/api/models/")]


def test_the_hub_is_not_asked_for_what_is_complete(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = cache / "models--me--tiny/snapshots"
    with made_hub.server() as (endpoint, requests):
        made_hub.use(monkeypatch, cache, endpoint)
        assert fetch("me/tiny") == fetch("me/tiny", NEW) == snapshots / NEW
        assert fetch("me/tiny", "v1") == snapshots / OLD
        assert fetch(str(snapshots / OLD), "v7") == snapshots / OLD
        assert requests == []
        assert fetch("me/tiny", optional=("modules.json",)) == snapshots / NEW  # it may have this file
        assert asked(requests) == ["/api/models/me/tiny"]
        with pytest.raises(ValueError, match="me/tiny: not found"):
            fetch("me/tiny", "v2")
        assert asked(requests)[1:] == ["/api/models/me/tiny/revision/v2"]


def test_an_incomplete_model_without_a_hub(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cache / "models--me--tiny/snapshots" / OLD / "model.safetensors").unlink()
    caplog.set_level(logging.INFO, "cbtm")
    with pytest.raises(ValueError) as error:
        fetch("me/tiny", "v1")
    text = str(error.value)
    assert re.match(
        r"model\.pretrained: me/tiny: /.*/0{39}1 lacks model\.safetensors\. Expected weights\. ", text
    )
    assert "Run hf download me/tiny --revision v1 where there is a network" in text
    assert "\n" not in text


@pytest.mark.parametrize(("revision", "advice"), [(None, "me/other "), ("v1", "me/other --revision v1 ")])
def test_an_unknown_model_without_a_hub(cache: Path, revision: str | None, advice: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^model\.pretrained: me/other: not found .*run hf download {advice}"
    ):
        fetch("me/other", revision)


def test_an_incomplete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with made_hub.server() as (endpoint, requests):
        made_hub.use(monkeypatch, tmp_path / "cache", endpoint)
        with pytest.raises(ValueError, match=r"lacks config\.json, model\.safetensors\. .*Complete it"):
            fetch(str(tmp_path))
        assert requests == []


def test_why_a_model_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with made_hub.server("me/tiny", "me/tiny/revision/v1") as (endpoint, _):
        made_hub.use(monkeypatch, tmp_path, endpoint)
        assert hub.problem("me/tiny") is hub.problem("me/tiny", "v1") is None
        assert hub.problem("me/other") == "no public me/other"
        assert hub.problem("me/tiny", "v2") == "no public me/tiny at v2"
    made_hub.use(monkeypatch, tmp_path)
    assert "does not answer" in str(hub.problem("me/tiny"))


def test_a_strange_name_stays_a_name_in_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with made_hub.server() as (endpoint, requests):
        made_hub.use(monkeypatch, tmp_path, endpoint)
        assert hub.problem("me/x?full=1#y z") == "no public me/x?full=1#y z"
        assert requests == ["/api/models/me/x%3Ffull%3D1%23y%20z"]


# --- no foreign code ----------------------------------------------------------------------------------------

LOAD = "import sys, transformers as t; t.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, written = tmp_path / "model", tmp_path / "written"
    folder.mkdir()
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    lines = [
        "from pathlib import Path",
        "from transformers import PretrainedConfig, PreTrainedModel",
        f"Path({str(written)!r}).touch()",
        "class OwnConfig(PretrainedConfig): model_type = 'own'",
        "class OwnModel(PreTrainedModel): config_class = OwnConfig",
    ]
    (folder / "own.py").write_text("\n".join(lines))
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code"):
            hub.load(auto, folder)
    assert not written.exists()
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], env=environment, check=True, capture_output=True
    )
    assert written.exists()  # the code would have run


def test_only_this_module_reaches_the_hub() -> None:
    """In code; docstrings and texts may name these functions."""
    names = {"from_pretrained", "snapshot_download", "hf_hub_download", "HfApi", "trust_remote_code"}
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        if path.name == "modeling_cbtm.py":  # travels alone: nothing of ours is there when it is loaded
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            for name in names & {getattr(node, key, None) for key in ("id", "attr", "arg", "name")}:
                found.setdefault(str(path.relative_to(SOURCE)), set()).add(name)
    assert found == {"base/hub.py": names - {"hf_hub_download"}}


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "~/models/x", "/no/such/folder", "a b"])
def test_a_path_that_does_not_exist_gets_no_advice_about_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=r"no such folder\. Expected weights in it\. Correct the path\.$"):
        fetch(name)


@pytest.mark.parametrize("index", ['{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[1]", "{"])
def test_a_broken_index_counts_as_missing_files(tmp_path: Path, index: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert hub.lacks_weights(tmp_path)


def test_the_advice_works_where_the_hub_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.problem("me/tiny") == "HF_HUB_OFFLINE is set"
    assert (
        hub.advice("me/tiny", "my branch")
        == "env HF_HUB_OFFLINE=0 hf download me/tiny --revision 'my branch'"
    )
