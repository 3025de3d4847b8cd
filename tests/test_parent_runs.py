"""cluster.parents: a run whose experts begin as parents, as its users meet it."""

import json
import shutil
from pathlib import Path

import pytest
from test_workflow import jobs

from cbtm_pipeline import config, eval_ensemble, plan, status
from cbtm_pipeline.base import artifact
from made_project import make_project, snakemake
from made_run import run_rule
from resealed import change_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after a whole run; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("parents") / "project"
    make_project(folder, cluster={"k": 4, "parents": 2, "n_init": 2}, train={"controls": []})
    snakemake(folder, "--cores", "2")
    return folder


def card(project: Path, name: str) -> dict:
    return artifact.read_sealed(project / f"results/experts/{name}/card.json", "expert")


def test_children_begin_as_their_parents_and_all_spend_what_dense_spends(family: Path) -> None:
    seed, dense = card(family, "seed"), card(family, "dense")
    parents, children = (
        [card(family, name) for name in names] for names in (("parent-0", "parent-1"), "0123")
    )
    assert all(one["made_from"]["seed"] == seed["identity"] for one in [*parents, dense])
    for i, child in enumerate(children):
        assert child["made_from"]["seed"] == parents[i // 2]["identity"]
    assert sum(one["n_train_tokens"] for one in [*parents, *children]) == dense["n_train_tokens"]
    metrics = json.loads((family / "results/eval/metrics.json").read_text())
    flops = {row["system"]: row["train_flops"] for row in metrics["systems"]}
    assert flops["uniform"] == flops["dense"] == flops["oracle"]
    assert flops["expert-3"] == sum(one["train_flops"] for one in (seed, parents[1], children[3]))
    assert metrics["flops"]["parents"] + metrics["flops"]["experts"] == metrics["flops"]["dense"]
    assert not {name for name in flops if "parent" in name}, "a parent is no system"
    assert not list((family / "results/scores").glob("parent*"))


def test_a_finished_run_has_nothing_to_do_and_shows_its_parents(family: Path) -> None:
    assert jobs(snakemake(family, "-n")) == set()
    rows = {row.name: row for row in status.gather(family / "results", {}, 0.0).rows}
    assert rows["parent-0"].state == rows["parent-1"].state == "done"
    assert rows["score_expert"].n_steps == 6, "seed, four experts, dense"
    page = (family / "results/report.html").read_text()
    assert "parents, training" in page and "the models of the first stage end" in page
    assert "train_expert parent-1" in page


def test_another_share_trains_parents_and_children_and_nothing_else(family: Path, tmp_path: Path) -> None:
    (tmp_path / "share.yaml").write_text("train: {first_share: 0.3}")
    printed = snakemake(family, "-n", configfiles=["small.yaml", str(tmp_path / "share.yaml")])
    trained = {job.split()[1] for job in jobs(printed) if job.startswith("train_expert")}
    assert trained == {"parent-0", "parent-1", "0", "1", "2", "3"}
    assert not {"fit_kmeans", "assign", "route"} & jobs(printed)


def test_without_parents_they_leave_the_run(family: Path, tmp_path: Path) -> None:
    (tmp_path / "flat.yaml").write_text("cluster: {parents: null}")
    printed = snakemake(family, "-n", configfiles=["small.yaml", str(tmp_path / "flat.yaml")])
    assert "takes 2 trained models out of the run (parent-0, parent-1)" in printed
    assert not {job for job in jobs(printed) if "parent" in job}


def test_a_child_of_another_parent_is_refused(
    family: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The evaluation sees that an expert did not begin as the parent of its clusters."""
    project = tmp_path / "project"
    shutil.copytree(family, project, symlinks=True)
    results = project / "results"
    change_json(results / "experts/parent-0/card.json", identity="0" * 32)
    names = plan.trained(config.read(results / "config.json"))
    line = ["--config", str(results / "config.json"), "--distances", str(results / "route/distances.npz")]
    line += ["--scores", *map(str, sorted((results / "scores").glob("*.npz")))]
    line += ["--experts", *(str(results / f"experts/{name}/card.json") for name in names)]
    line += [
        "--clusters",
        str(results / "assignments/manifest.json"),
        "--out",
        str(tmp_path / "metrics.json"),
    ]
    with pytest.raises(SystemExit):
        run_rule(eval_ensemble.main, line)
    assert "experts/0/card.json: made from another seed" in capfd.readouterr().err
