"""Files that do not belong to one run are refused, in one line, and nothing is written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damaged
from cbtm_pipeline import config
from cbtm_pipeline.base import artifact
from made_run import QUICK, Files, evaluate, make, make_config
from resealed import change_json, change_npz


@pytest.fixture
def run(tmp_path: Path) -> Files:
    return make(tmp_path, make_config(outdir=str(tmp_path), cluster={"k": 3}, **QUICK))


def refusal(files: Files, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error. Neither metrics.json nor table.txt may have been written."""
    with pytest.raises(SystemExit) as stop:
        evaluate(files)
    assert stop.value.code == 1
    assert not files.out.exists() and not files.out.with_name("table.txt").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_two_documents_are_enough_and_one_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cfg = make_config(outdir=str(tmp_path), cluster={"k": 2}, **QUICK)
    assert evaluate(make(tmp_path / "two", cfg, n_documents=2))["n_documents"] == 1
    capsys.readouterr()
    assert "1 held-out document. Expected at least 2" in refusal(
        make(tmp_path / "one", cfg, n_documents=1), capsys
    )


def retrained(run: Files, name: str, **origin: str) -> None:
    """An expert's card says that it was made from something else, or that it is another expert."""
    found = artifact.read_sealed(run.cards[name], "expert")["made_from"]
    change_json(run.cards[name], **{"made_from": {**found, **origin}} if origin else {"identity": "f" * 32})


def changed(path: Path, kind: str, key: str, **values: Any) -> None:
    """An npz has other `values` in the entry `key` of its record: made_from or made_with."""
    found = artifact.read_npz(path, kind)[1][key]
    change_npz(path, kind, meta={key: {**found, **values}})


def regrouped(run: Files, **origin: str) -> None:
    """The clusters are in another order, or are made from something else."""
    path = run.manifests["clusters"]
    found = artifact.read_sealed(path, "assignments")
    groups = found["identity_groups"] if origin else found["identity_groups"][::-1]
    change_json(path, identity_groups=groups, made_from={**found["made_from"], **origin})


def other_k(run: Files) -> None:
    config.write(make_config(outdir="results", cluster={"k": 2}, **QUICK), run.config)
    for name in ("2", "random-2"):
        del run.scores[name], run.cards[name]


def nan(run: Files) -> None:
    logprob_N = artifact.read_npz(run.scores["1"], "scores")[0]["logprob_N"]
    change_npz(run.scores["1"], "scores", logprob_N=logprob_N * np.float32(np.nan))


OTHER = "a" * 32
REFUSED = {
    "retrained": (lambda r: retrained(r, "2"), "scores/2.npz: made from another expert"),
    "retrained seed": (lambda r: retrained(r, "seed"), "experts/0/card.json: made from another seed"),
    "other seed": (lambda r: retrained(r, "2", seed=OTHER), "experts/2/card.json: made from another seed"),
    "other held-out text": (
        lambda r: changed(r.scores["1"], "scores", "made_from", held_out=OTHER),
        "scores/1.npz: made from another held_out",
    ),
    "distances of other held-out text": (
        lambda r: changed(r.distances, "distances", "made_from", held_out=OTHER),
        "scores/seed.npz: made from another held_out",
    ),
    "other stride": (
        lambda r: changed(r.scores["0"], "scores", "made_with", stride=7),
        "scores/0.npz: made with stride 7. Expected 128",
    ),
    "other cut": (
        lambda r: changed(r.scores["0"], "scores", "made_with", max_document_tokens=9),
        "max_document_tokens 9. Expected 256",
    ),
    "distances of other cut": (
        lambda r: changed(r.distances, "distances", "made_with", max_document_tokens=9),
        "distances.npz: made with max_document_tokens 9. Expected 256",
    ),
    "trained on another cluster": (
        lambda r: retrained(r, "2", tokens=OTHER),
        "experts/2/model.safetensors: trained on other documents than cluster 2 of",
    ),
    "trained on another random cluster": (
        lambda r: retrained(r, "random-1", tokens=OTHER),
        "experts/random-1/model.safetensors: trained on other documents than cluster 1 of",
    ),
    "clusters in another order": (
        regrouped,
        "experts/0/model.safetensors: trained on other documents than cluster 0 of",
    ),
    "fewer clusters": (
        lambda r: change_json(r.manifests["clusters"], k=2),
        "experts/2/model.safetensors: trained on other documents than cluster 2 of",
    ),
    "distances to other centres": (
        lambda r: changed(r.distances, "distances", "made_from", clusterer=OTHER),
        "assignments/manifest.json: made from another clusterer",
    ),
    "clusters of other centres": (
        lambda r: regrouped(r, clusterer=OTHER),
        "assignments/manifest.json: made from another clusterer",
    ),
    "clusters of other held-out text": (
        lambda r: regrouped(r, held_out=OTHER),
        "assignments/manifest.json: made from another held_out",
    ),
    "no clusters": (lambda r: r.manifests.pop("clusters"), "--clusters: no manifest of clusters"),
    "no random clusters": (lambda r: r.manifests.pop("random"), "--clusters: no manifest of random"),
    "shards as clusters": (
        lambda r: r.manifests.update(clusters=r.manifests["corpus"]),
        "shards/manifest.json: shards. Expected assignments",
    ),
    "no scores": (lambda r: r.scores.pop("1"), "scores/1.npz: not given."),
    "no card": (lambda r: r.cards.pop("random-0"), "experts/random-0/card.json: not given."),
    "twice": (lambda r: change_npz(r.scores["1"], "scores", meta={"expert": "0"}), "expert 0 again"),
    "unknown": (
        lambda r: change_npz(r.scores["1"], "scores", meta={"expert": "17"}),
        "scores/1.npz: expert 17. Expected one of seed, 0,",
    ),
    "fewer tokens": (
        lambda r: change_npz(r.scores["1"], "scores", logprob_N=np.zeros(3, np.float32)),
        "scores/1.npz: 3 tokens.",
    ),
    "not a number": (nan, "scores/1.npz: log-probabilities down to nan."),
    "other k": (other_k, "distances.npz: 3 clusters. Expected cluster.k, 2."),
    "distances as scores": (
        lambda r: r.scores.update({"1": r.distances}),
        "distances.npz: distances. Expected scores.",
    ),
    "damaged": (
        lambda r: r.scores["1"].write_bytes(r.scores["1"].read_bytes()[:200]),
        "scores/1.npz: damaged",
    ),
    "gone": (lambda r: r.scores["1"].unlink(), "scores/1.npz: No such file or directory."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused_in_one_line(
    case: str, run: Files, capsys: pytest.CaptureFixture[str]
):
    change, expected = REFUSED[case]
    change(run)
    line = refusal(run, capsys)
    assert expected in line
    assert line.count(". ") >= 2  # found, expected, what to do
    assert line.endswith(".") or ": snakemake --cores 2" in line


@pytest.mark.parametrize("name", ["distances", "scores", "card", "clusters", "random"])
def test_no_flipped_bit_and_no_cut_of_an_input_goes_unnoticed(
    name: str, run: Files, capsys: pytest.CaptureFixture[str]
):
    paths = {"distances": run.distances, "scores": run.scores["dense"], "card": run.cards["random-1"]}
    path = {**paths, **run.manifests}[name]
    for content in damaged.versions(path.read_bytes(), 40):
        with damaged.replaced(path, content):
            assert str(path) in refusal(run, capsys)
