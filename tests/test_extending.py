"""docs/extending.md, tried: a toy router and a toy input format, each in a few lines, from the text to the
report.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from made_project import make_project, snakemake_command

pytestmark = pytest.mark.slow

# Python imports a module of this name at every start, so each job and its workers have the entries.
SITECUSTOMIZE = """
import numpy as np

from cbtm_pipeline.corpus import records
from cbtm_pipeline.corpus.formats import FORMATS, Format
from cbtm_pipeline.mixture.routers import ROUTERS, Router


def parse_tsv(lines, fields):
    for line in lines:
        name, tab, text = line.partition(b"\\t")
        yield (text, name, None) if tab else records.Defect("no tab: one column")


def nearest(held_out, setting):
    d2_NK = held_out.d2_NK
    return np.where(d2_NK.argmin(axis=1)[:, None] == np.arange(d2_NK.shape[1]), 0.0, -np.inf)


FORMATS[".tsv"] = Format(records.cut_lines, parse_tsv, compressible=True, unpacked=1)
ROUTERS["nearest"] = Router(nearest, parameters=(), colour="c3")
"""


def test_a_toy_router_and_a_toy_format_run_to_the_table_and_the_report(tmp_path: Path) -> None:
    project = make_project(
        tmp_path / "project",
        corpus={"train": ["corpus.tsv"]},
        train={"controls": []},
        route={"routers": ["paper", "nearest"]},
    )
    rows = [json.loads(line) for line in (project / "corpus.jsonl").read_text().splitlines()]
    (project / "corpus.tsv").write_text("".join(f"{row['id']}\t{row['text']}\n" for row in rows) + "no id\n")
    (project / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        snakemake_command("--cores", "2"),
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    results = project / "results"
    shards = json.loads((results / "shards/manifest.json").read_text())["shards"]
    assert sum(entry["n_documents"] for entry in shards) == len(rows)
    assert "no tab: one column" in (results / "shards/quarantine.jsonl").read_text()
    assert "nearest top-1" in (results / "eval/table.txt").read_text()
    assert "Temperature of the router nearest" in (results / "report.html").read_text()
