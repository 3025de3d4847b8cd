"""The jobs, the profile and the config that the doctor sees are those of Snakemake."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from snakemake.utils import update_config

from cbtm_pipeline.ops import cost, planned
from made_project import ROOT, make_project, snakemake
from made_run import make_config


def test_what_would_be_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_project(tmp_path / "project"))
    content = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    content["set-resources"]["route"] = {"slurm_partition": ""}
    content["set-resources"]["train_expert"] |= {"runtime": "1h", "gpu_model": "a100"}
    Path("mine").mkdir()
    Path("mine/config.yaml").write_text(yaml.safe_dump(content))
    jobs = {job.rule: job for job in planned.submitted(planned.dry_run("mine", ["small.yaml"]))}
    assert set(jobs) == set(cost.n_jobs(make_config(corpus={"train": ["corpus.jsonl"]}))) - {"route"}
    train = jobs["train_expert"]
    assert (train.threads, train.n_gpus, train.n_nodes, train.resumable, train.partitions) == (
        8,
        1,
        1,
        True,
        ["gpu"],
    )
    assert (train.sbatch["time"], train.sbatch["gpus_per_node"]) == (60, "a100:1")
    assert not jobs["score_expert"].resumable
    groups = [{job.rule for job in group} for group in planned.alike(list(jobs.values()))]
    assert {"assign", "assign_random", "tokenizer"} in groups and {"embed", "fit_kmeans"} in groups
    with pytest.raises(
        ValueError, match=r"(?s)^profile: mine: snakemake says: .*no-such-option.* Correct the profile\.$"
    ):
        Path("mine/config.yaml").write_text(yaml.safe_dump({**content, "no-such-option": 1}))
        planned.dry_run("mine", ["small.yaml"])


def test_profiles_are_found_where_snakemake_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_project(tmp_path / "project"))
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    assert planned.profile_file("slurm") is None
    (home / "snakemake/slurm").mkdir(parents=True)
    (home / "snakemake/slurm/config.v8+.yaml").write_text("cores: 2\n")
    assert planned.profile_file("slurm") == home / "snakemake/slurm/config.v8+.yaml"
    Path("slurm").symlink_to("profiles/slurm")
    assert (
        planned.profile_file("slurm")
        == planned.profile_file("slurm/config.yaml")
        == Path("slurm/config.yaml")
    )
    assert "train_expert" in snakemake(Path(), "-n", "--profile", "slurm")


trees = st.recursive(
    st.integers() | st.none(),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), trees), st.dictionaries(st.sampled_from("abc"), trees))
def test_configs_are_merged_as_snakemake_merges_them(base: dict, over: dict) -> None:
    expected = copy.deepcopy(base)
    update_config(expected, over)
    assert planned.merge(base, over) == expected
