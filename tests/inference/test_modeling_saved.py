"""`save_pretrained` of an ensemble: what is shipped, what is refused, and what stays as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import made_ensemble
import made_tiny_ensemble
from cbtm_pipeline.base import artifact
from cbtm_pipeline.inference import loaded, mixture, package
from cbtm_pipeline.inference.modeling_cbtm import CBTMForCausalLM
from made_tiny_ensemble import Ensemble, text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Ensemble:
    tags = {"1": {"licence": "none"}, "2": {"licence": "cc-by"}}
    return made_tiny_ensemble.make(tmp_path_factory.mktemp("made"), (0, 1, 2, 3), n_active=2, tags=tags)


def hashes(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): artifact.identity(path) for path in paths}


def test_an_expert_that_is_excluded_is_not_shipped(tmp_path: Path) -> None:
    folder = made_ensemble.make(tmp_path / "results")
    model = CBTMForCausalLM.from_pretrained(folder, exclude=["1"])
    ids = torch.randint(1, 300, (1, 20))
    expected = model(ids, output_router_weights=True)
    model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved/experts").iterdir()) == ["0", "2"]
    again = CBTMForCausalLM.from_pretrained(tmp_path / "saved")
    assert (again.names, again.config.exclude) == (["0", "2"], [])
    assert torch.equal(again(ids).logits, expected.logits)
    assert len(load_file(tmp_path / "saved/router.safetensors")["centres"]) == 2
    # the commands take the folder: its record fits
    record = package.verify(tmp_path / "saved")
    assert "expert-1" not in record["made_from"] and record["changes"][-1]["excluded"] == ["1"]
    terms = mixture.read(folder).terms
    assert mixture.read(tmp_path / "saved").terms == [terms[0], terms[2]]
    assert set(loaded.load(tmp_path / "saved", "saved").terms) == {"0", "2"}


def test_tags_and_a_second_saving_go_along(made: Ensemble, tmp_path: Path) -> None:
    model = CBTMForCausalLM.from_pretrained(made.folder, exclude=["tag:licence=none"], hysteresis=2.0)
    model.save_pretrained(tmp_path / "first")
    again = CBTMForCausalLM.from_pretrained(tmp_path / "first", exclude="0")
    assert again.config.tags == {"2": {"licence": "cc-by"}} and again.config.hysteresis == 2.0
    again.save_pretrained(tmp_path / "second")
    assert CBTMForCausalLM.from_pretrained(tmp_path / "second").names == ["2", "3"]
    assert [c["excluded"] for c in package.verify(tmp_path / "second")["changes"]] == [["1"], ["0"]]


def test_a_folder_without_a_record_is_saved_without_one(made: Ensemble, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "made")
    (tmp_path / "made/files.json").unlink()
    CBTMForCausalLM.from_pretrained(tmp_path / "made").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/files.json").exists()
    assert CBTMForCausalLM.from_pretrained(tmp_path / "saved").expert(0) is not None


def test_weights_that_were_changed_are_not_lost_without_a_word(made: Ensemble, tmp_path: Path) -> None:
    model = CBTMForCausalLM.from_pretrained(made.folder).half()
    model(text(9, 1))
    model.save_pretrained(tmp_path / "saved")  # a cast is none of the folder's business
    next(iter(model.expert(2).parameters())).data += 1
    with pytest.raises(ValueError, match=r"^experts\.2: other weights than its folder has\. .*\)\.$"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    expert: Any = model.experts["2"]
    expert.save_pretrained(tmp_path / "expert")  # as the line says
    assert (tmp_path / "expert/model.safetensors").exists()


def test_places_that_would_do_harm_are_refused_in_one_line(made: Ensemble, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "made")
    model, before = CBTMForCausalLM.from_pretrained(tmp_path / "made"), hashes(tmp_path / "made")
    with pytest.raises(ValueError, match=r"made/sub: within .*Give another name\.$"):
        model.save_pretrained(tmp_path / "made/sub")
    fewer = CBTMForCausalLM.from_pretrained(tmp_path / "made", exclude=["0"])
    for to in (tmp_path / "made", shutil.copytree(made.folder, tmp_path / "there")):
        with pytest.raises(ValueError, match=r"holds experts that are not saved \(0\)\."):
            fewer.save_pretrained(to)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file: a file\. "):
        model.save_pretrained(tmp_path / "file")
    refused: Any = (("state_dict", {"a": torch.zeros(1)}), ("push_to_hub", True), ("variant", "fp16"))
    for name, value in refused:
        with pytest.raises(ValueError, match=rf"^{name}: .*Leave it out\.$"):
            model.save_pretrained(tmp_path / "new", **{name: value})
    with pytest.raises(TypeError, match="'max_shard_sise'. Did you mean 'max_shard_size'"):
        model.save_pretrained(tmp_path / "new", max_shard_sise="1GB")
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert hashes(tmp_path / "made") == before and not (tmp_path / "new").exists()


def test_a_folder_that_was_replaced_is_not_saved(made: Ensemble, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "made")
    model = CBTMForCausalLM.from_pretrained(tmp_path / "made")
    shutil.copyfile(made.experts[1] / "model.safetensors", tmp_path / "made/experts/0/model.safetensors")
    with pytest.raises(ValueError, match=r"another file than when the ensemble was loaded"):
        model.save_pretrained(tmp_path / "saved")


def test_saving_an_expert_in_place_leaves_the_folder_that_it_came_from(tmp_path: Path) -> None:
    """What is derived has links to the weights, and JSON files of its own: transformers writes in place."""
    folder = made_ensemble.make(tmp_path / "results")
    experts = {path: hashes(tmp_path / f"results/experts/{path}") for path in "012"}
    weights = tmp_path / "results/experts/1/model.safetensors"
    assert (folder / "experts/1/model.safetensors").samefile(weights), "weights are links"
    model = CBTMForCausalLM.from_pretrained(folder)
    expert = model.expert(1)
    next(iter(expert.parameters())).data += 1
    expert.config.max_position_embeddings = 7
    expert.save_pretrained(folder / "experts/1")
    assert json.loads((folder / "experts/1/config.json").read_text())["max_position_embeddings"] == 7
    assert {path: hashes(tmp_path / f"results/experts/{path}") for path in "012"} == experts


def test_saving_over_links_leaves_what_they_link_to(made: Ensemble, tmp_path: Path) -> None:
    folder = made_ensemble.make(tmp_path / "results")
    before = hashes(tmp_path / "results/experts")
    other = CBTMForCausalLM.from_pretrained(made.folder, exclude=["3"])
    other.save_pretrained(folder)
    assert hashes(tmp_path / "results/experts") == before
    assert package.verify(folder)["changes"]
