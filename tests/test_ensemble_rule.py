"""The rule `ensemble`: the folder that a run ends with."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import made_ensemble as made
from cbtm_pipeline import config, ensemble
from cbtm_pipeline.base import artifact
from cbtm_pipeline.inference import model_card, modeling_cbtm, moe_folder, package
from cbtm_pipeline.provenance import kept, made_from, records, stale
from changed_config import changed
from resealed import change_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outdir of a run with its ensemble. Tests must leave it as it is."""
    return made.make(tmp_path_factory.mktemp("run") / "results").parent


@pytest.fixture
def outdir(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "results")
    return tmp_path / "results"


def make(outdir: Path, out: Path | None = None) -> None:
    made.run(ensemble.main, made.arguments(outdir, out))


def refusal(outdir: Path, out: Path | None = None) -> str:
    with pytest.raises(ValueError) as error:
        make(outdir, out)
    assert "\n" not in str(error.value) and ". Expected " in str(error.value)
    return str(error.value)


def logits(folder: Path) -> torch.Tensor:
    model = modeling_cbtm.CBTMForCausalLM.from_pretrained(folder)
    return model(torch.tensor([[model.config.bos_token_id, 5, 6, 7]])).logits


def test_the_moved_folder_says_what_it_said(outdir: Path, tmp_path: Path) -> None:
    before = logits(outdir / "ensemble")
    (outdir / "ensemble").rename(tmp_path / "elsewhere")
    shutil.rmtree(outdir)
    assert torch.equal(logits(tmp_path / "elsewhere"), before)
    assert torch.allclose(before.exp().sum(-1), torch.tensor(1.0), atol=1e-5)
    package.verify(tmp_path / "elsewhere")


def test_weights_take_no_space_twice(whole: Path) -> None:
    for name in "012":
        path = Path("experts", name, "model.safetensors")
        assert (whole / path).samefile(whole / "ensemble" / path)


def test_the_record_names_all_files_and_what_they_were_made_from(whole: Path) -> None:
    record = records.read(whole, "ensemble")
    folder = whole / "ensemble"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == {*record["files"], "files.json"}
    assert records.missing(whole, "ensemble", None, record) == []
    metrics, clusterer = (records.read(whole, rule) for rule in ("eval_ensemble", "fit_kmeans"))
    cards = {name: records.read(whole, "train_expert", name) for name in "012"}
    terms = records.read_top_terms(whole)
    expected = made_from.ensemble(metrics, clusterer, terms, records.read(whole, "tokenizer"), cards)
    assert record["made_from"] == expected and record["made_with"] == {}
    assert not [path for path in there if str(whole) in (folder / path).read_bytes().decode("latin1")]


def test_a_missing_file_of_an_expert_is_noticed(outdir: Path) -> None:
    (outdir / "ensemble/experts/1/config.json").unlink()
    record = records.read(outdir, "ensemble")
    assert records.missing(outdir, "ensemble", None, record) == [outdir / "ensemble/experts/1/config.json"]


def test_the_mixture_is_the_best_on_the_calibration_documents(tmp_path: Path) -> None:
    rows = [
        made.row(3.1, top_k=1),
        made.row(3.0, router="paper", top_k=2, temperature=0.05, epsilon=None, beta=None),
        {**made.row(2.0, top_k=2), "headline": False},
    ]
    folder = made.make(tmp_path / "results", rows=rows)
    config = modeling_cbtm.CBTMConfig.from_pretrained(folder)
    assert (config.router, config.n_active, config.router_temperature) == ("paper", 2, 0.05)


def test_a_router_that_the_model_lacks_gives_way_to_the_best_that_it_has(tmp_path: Path, monkeypatch) -> None:
    from cbtm_pipeline.mixture.routers import ROUTERS

    monkeypatch.setitem(ROUTERS, "nearest", ROUTERS["paper"]._replace(in_model=False))
    rows = [made.row(2.0, router="nearest"), made.row(3.0)]
    folder = made.make(tmp_path / "both", rows=rows)
    assert modeling_cbtm.CBTMConfig.from_pretrained(folder).router == "filter"
    made.write(tmp_path / "one", rows=rows[:1])
    assert refusal(tmp_path / "one").startswith("route.routers: ")


def test_the_model_card_has_the_table_and_shows_terms_as_text(tmp_path: Path) -> None:
    terms = [("a|b", "<script>", "\x1b[31m"), ("`x`",), ("\n",)]
    card = (made.make(tmp_path / "results", terms=terms) / "README.md").read_text()
    assert f"```text\n{made.TABLE}```" in card
    assert r"| 0 | 1,234 | 5,678 tokens | 3.500 | a\|b, &lt;script&gt;, \\x1b\[31m |" in card
    assert r"| \`x\` |" in card and "licences" in card


def test_the_same_run_gives_the_same_bytes(whole: Path, outdir: Path, tmp_path: Path) -> None:
    make(outdir, tmp_path / "again/files.json")
    for path in [*package.files(whole / "ensemble"), whole / "ensemble/files.json"]:
        assert (tmp_path / "again" / path.relative_to(whole / "ensemble")).read_bytes() == path.read_bytes()


def test_an_earlier_ensemble_goes_and_other_folders_are_left_alone(outdir: Path, tmp_path: Path) -> None:
    (outdir / "ensemble/experts/9").mkdir()
    (outdir / "ensemble/merges.txt").write_text("of another tokenizer")
    make(outdir)
    assert {path.name for path in (outdir / "ensemble/experts").iterdir()} == {"0", "1", "2"}
    assert not (outdir / "ensemble/merges.txt").exists()
    before = {path: path.stat().st_mtime_ns for path in outdir.rglob("*")}
    assert "holds no ensemble" in refusal(outdir, outdir / "files.json")
    assert {path: path.stat().st_mtime_ns for path in outdir.rglob("*")} == before


def test_experts_that_were_not_evaluated_are_refused(outdir: Path) -> None:
    metrics = outdir / "eval/metrics.json"
    content = artifact.read_sealed(metrics, "metrics")
    change_json(metrics, weights={**content["weights"], "1": "0" * 32})
    assert "not the expert that was evaluated" in refusal(outdir)
    change_json(metrics, weights=content["weights"], matrix={"experts": ["0", "1"]})
    assert refusal(outdir).startswith("--experts: 0, 1, 2. ")


@pytest.mark.parametrize(
    "name",
    [
        *("experts/1/model.safetensors", "experts/1/config.json", "tokenizer/tokenizer.json"),
        *("eval/table.txt", "cluster/clusterer.npz", "cluster/top_terms.json", "embed/embedder.npz"),
    ],
)
def test_a_damaged_file_is_refused(outdir: Path, name: str) -> None:
    content = bytearray((outdir / name).read_bytes())
    content[len(content) // 2] ^= 1
    (outdir / name).unlink()
    (outdir / name).write_bytes(content)
    assert str(outdir / name) in refusal(outdir)


def test_parts_of_other_runs_are_refused(outdir: Path) -> None:
    arrays, _ = artifact.read_npz(outdir / "embed/embedder.npz", "embedder")
    made.write_fitted(outdir, arrays["E_VD"], np.eye(3, made.N_COMPONENTS, dtype=np.float32), [["a"]] * 3)
    make(outdir)
    meta = artifact.make_meta("embedder", {}, other=1)
    artifact.write_npz(outdir / "embed/embedder.npz", meta, **arrays)
    assert "made from another embedder" in refusal(outdir)


def test_an_encoder_has_no_ensemble(outdir: Path) -> None:
    meta = artifact.make_meta("embedder", {}, encoder={"name": "me/encoder"})
    artifact.write_npz(outdir / "embed/embedder.npz", meta)
    assert refusal(outdir).startswith("embed.encoder: ")
    with_one, without = (config.validate(changed(**keys)) for keys in ({}, {"embed__encoder": "me/encoder"}))
    assert stale.Job("ensemble") in stale.jobs(with_one)
    assert stale.Job("ensemble") not in stale.jobs(without)
    kept.put_away(outdir, ["0", "1", "2", "dense", "seed"], stale.packs(with_one))
    assert (outdir / "ensemble").exists()
    kept.put_away(outdir, ["0", "1", "2", "dense", "seed"], stale.packs(without))
    assert not (outdir / "ensemble").exists(), "it would be that of another config"


def test_sizes_of_a_model_with_other_names_for_them(tmp_path: Path) -> None:
    sizes = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = modeling_cbtm.CBTMConfig.from_pretrained(made.make(tmp_path / "results", sizes=sizes))
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (32, 1, 32)


def test_a_model_that_is_saved_in_place_leaves_the_kept_one_as_it_was(outdir: Path) -> None:
    """A start keeps what it replaces: its weights are a second link, and all else a copy."""
    kept.keep(outdir, [stale.Job("train_expert", "1")])
    (folder,) = kept.replaced(outdir)
    weights = outdir / "experts/1/model.safetensors"
    assert (folder / weights.name).samefile(weights)
    before = {path.name: artifact.identity(path) for path in folder.iterdir()}
    assert before == {path.name: artifact.identity(path) for path in weights.parent.iterdir()}
    for path in weights.parent.glob("*.json"):
        with path.open("w") as file:  # as transformers writes
            file.write("{}")
    assert before == {path.name: artifact.identity(path) for path in folder.iterdir()}


def test_a_changed_ensemble_claims_only_the_licence_that_all_its_experts_have() -> None:
    cards = {"0": {"n_parameters": 1}, "law": {"n_parameters": 1}}
    row = made.row(3.0, top_k=1)
    before = model_card.render(row, made.TABLE, {"0": cards["0"]}, [[]], {"0": {"licence": "cc-by"}}, None)
    assert "license: cc-by\n" in before and "states it: cc-by. The licences of these" in before
    tags = {"0": {"licence": "cc-by"}, "law": {"licence": "cc-by-nc"}}
    mixed = model_card.changed(before, cards, [[], []], tags, "law was added.")
    assert "license: unknown\n" in mixed and "states it" not in mixed
    alike = model_card.changed(mixed, cards, [[], []], dict.fromkeys(cards, tags["law"]), "tags.")
    assert "license: cc-by-nc\n" in alike and "states it: cc-by-nc. The licences of these" in alike
    about = {"experts": list(cards), "tags": tags}
    assert "license: unknown\n" in moe_folder.header(about)
