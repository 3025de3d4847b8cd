"""The corpus path writes the same bytes for any number of cores and workers: real runs on the demo corpus."""

from pathlib import Path

import pytest
import yaml

from cbtm_pipeline.base import artifact
from made_project import make_project, snakemake

RULES = ("tokenizer", "shard", "embed", "fit_kmeans", "assign", "assign_random")
FOLDERS = ("tokenizer", "shards", "embed", "cluster", "assignments", "random")
# Many shards, so that workers have something to share, and many clusters, which change with the last bits.
CONFIG = {"corpus": {"train": ["builtin:demo"], "shard_bytes": 1 << 20}, "cluster": {"k": 16}}


def written(folder: Path, n_cores: int) -> dict[str, str]:
    """Run the workflow up to the clusters with n cores for each job. Returns the identity of each file."""
    project = make_project(folder)
    (project / "demo.yaml").write_text(yaml.safe_dump(CONFIG))
    threads = [f"{rule}={n_cores}" for rule in RULES]
    targets = [f"results/{name}/manifest.json" for name in ("assignments", "random")]
    snakemake(
        project, *targets, "--cores", str(n_cores), "--set-threads", *threads, configfiles=["demo.yaml"]
    )
    paths = [path for name in FOLDERS for path in (project / "results" / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(project)): artifact.identity(path) for path in paths}


@pytest.mark.slow
def test_another_number_of_cores_writes_the_same_bytes(tmp_path: Path) -> None:
    one, two, four = (written(tmp_path / str(n), n) for n in (1, 2, 4))
    assert len([path for path in one if path.startswith("results/assignments/train-")]) >= 6
    assert {path for path in one if not one[path] == two.get(path) == four.get(path)} == set()
    assert one.keys() == two.keys() == four.keys()
