"""What follows from the output of Slurm's commands. tests/slurm/test_doctor_slurm.py asks a real Slurm."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from cbtm_pipeline.ops import site
from cbtm_pipeline.ops.finding import Line
from cbtm_pipeline.ops.planned import PlannedJob

PARTITIONS = {
    "gpu": {
        "PartitionName": "gpu",
        "State": "UP",
        "MaxTime": "1-00:00:00",
        "AllowAccounts": "ALL",
        "MaxNodes": "UNLIMITED",
    },
    "lab": {
        "PartitionName": "lab",
        "State": "DOWN",
        "MaxTime": "UNLIMITED",
        "AllowAccounts": "lab,own",
        "MaxNodes": "1",
    },
}
SINFO = """\
gpu|3|64|512000|gpu:a100:4(S:0-1)|mixed
gpu|1|64|512000|gpu:a100:4(S:0-1)|idle*
gpu|2|8|64000|gpu:v100:2,mps:400|idle
cpu|1|128|256000|(null)|drained
cpu|9|128|256000|(null)|idle~
lab|2|8|64000|gpu:2|idle
"""
NODES = site.nodes(SINFO)


def job(**changes: Any) -> PlannedJob:
    resources = {"slurm_partition": "gpu", "runtime": 60, "mem_mb": 16000, "gpus": 1}
    return PlannedJob(
        "train_expert",
        {**resources, **changes.pop("resources", {})},
        changes.pop("threads", 8),
        changes.pop("resumable", True),
    )


def levels(lines: Iterator[Line]) -> list[str]:
    return [level for level, _ in lines]


# --- what Slurm prints ---


def test_records_keep_values_with_spaces_and_equals_signs() -> None:
    printed = (
        "NodeName=g1 Gres=gpu:a100:4(S:0-1) OS=Linux 6.1 #1 SMP @0  RealMemory=8192 "
        "CfgTRES=cpu=4,gres/gpu=2 Reason=no power [root@x]\n\n"
    )
    (record,) = site.records(printed)
    assert (record["OS"], record["RealMemory"], record["CfgTRES"]) == (
        "Linux 6.1 #1 SMP @0",
        "8192",
        "cpu=4,gres/gpu=2",
    )
    assert site.settings("Configuration data as of today\nKillWait                = 30 sec\nX = a=b\n") == {
        "KillWait": "30 sec",
        "X": "a=b",
    }


def test_nodes_and_their_gpus() -> None:
    assert [row.up for row in NODES] == [True, False, True, False, True, True]
    assert [row.gpus for row in NODES] == [{"a100": 4}, {"a100": 4}, {"v100": 2}, {}, {}, {"": 2}]
    assert site.gpus("gres/gpu:3,shard:8,gpu:a100_3g.20gb:2") == {"a100_3g.20gb": 2}


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("1-01:00:30", 1500.5),
        ("00:01:00", 1),
        ("100:00:00", 6000),
        ("UNLIMITED", float("inf")),
        ("NONE", float("inf")),
    ],
)
def test_minutes(limit: str, minutes: float) -> None:
    assert site.minutes(limit) == minutes
    assert (site.seconds("30 sec"), site.seconds("0"), site.seconds("(null)")) == (30, 0, 0)


# --- jobs ---


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, None, ""),
        ({"resources": {"gpus": 4, "gpu_model": "a100"}}, None, ""),
        ({"resources": {"gpus": 4, "gpu_model": "a100", "nodes": 3}}, None, ""),
        ({"resources": {"runtime": 1441}}, "FAIL", "runtime: 1441 minutes. Expected 1440 or less"),
        (
            {"resources": {"slurm_partition": "gpus"}},
            "FAIL",
            "slurm_partition: gpus. Expected one of gpu, lab",
        ),
        ({"resources": {"gpus": 5}}, "FAIL", "gpus: 5. Expected 4 or less"),
        (
            {"resources": {"gpus": 4, "gpu_model": "v100"}, "threads": 2},
            "FAIL",
            "gpus: 4. Expected 2 or less",
        ),
        ({"resources": {"gpu_model": "A100"}}, "FAIL", "gpu_model: A100. Expected a100 or v100"),
        (
            {"resources": {"gpus": 4}, "threads": 17},
            "FAIL",
            "threads: 68 (17 for each of 4 tasks). Expected 64 or less",
        ),
        ({"resources": {"gpus": 4}, "threads": 17, "resumable": False}, None, ""),
        ({"resources": {"mem_mb": 512001}}, "FAIL", "mem_mb: 512001. Expected 512000 or less"),
        (
            {"resources": {"gpu_model": "v100", "mem_mb": 64001}},
            "FAIL",
            "gpus, threads, mem_mb: 1, 8, 64001. Expected a node of gpu with all",
        ),
        ({"resources": {"nodes": 5, "gpus": 3}}, "FAIL", "nodes: 5. Expected 4 or less"),
        (
            {"resources": {"nodes": 4, "gpus": 3}},
            "warn",
            "slurm_partition: the nodes of gpu that fit are down. Expected 4 up",
        ),
    ],
)
def test_a_job_and_its_partition(changes: dict, level: str | None, words: str) -> None:
    found = list(
        site.unfit(
            job(**copy.deepcopy(changes)), str(job(**changes).resources["slurm_partition"]), PARTITIONS, NODES
        )
    )
    assert [lev for lev, _ in found] == ([level] if level else [])
    assert words in " ".join(text for _, text in found)


def test_a_partition_for_others_only() -> None:
    found = dict(
        site.unfit(
            job(resources={"slurm_partition": "lab", "slurm_account": "me", "nodes": 2}),
            "lab",
            PARTITIONS,
            NODES,
        )
    )
    assert list(found) == ["FAIL"]
    texts = [
        text
        for _, text in site.unfit(
            job(resources={"slurm_account": "me", "nodes": 2}), "lab", PARTITIONS, NODES
        )
    ]
    assert [text.partition(":")[0] for text in texts] == ["slurm_partition", "slurm_account", "nodes"]
    assert "Expected one of lab,own" in texts[1]
    cpu = {"cpu": {**PARTITIONS["gpu"], "DenyAccounts": "me"}}
    texts = [text for _, text in site.unfit(job(resources={"slurm_account": "me"}), "cpu", cpu, NODES)]
    assert [text.partition(":")[0] for text in texts] == ["slurm_account", "gpus"]
    assert "Expected none of me" in texts[0]


@pytest.mark.parametrize(
    ("resources", "enforced", "expected"),
    [
        ({}, "none", []),
        ({"slurm_account": "lab"}, "associations,limits", []),
        ({"slurm_account": "lab", "qos": "long"}, "safe", []),
        ({"slurm_account": "nope"}, "associations", ["FAIL"]),
        ({"slurm_account": "nope"}, "none", ["warn"]),
        ({"slurm_account": "lab", "qos": "nope"}, "qos", ["FAIL"]),
        ({"slurm_account": "other"}, "all", ["FAIL"]),  # mine on another partition only
        ({"slurm_account": "other", "slurm_partition": "cpu,gpu"}, "all", []),
    ],
)
def test_accounts(resources: dict, enforced: str, expected: list[str]) -> None:
    associations = [("lab", "", "normal,long"), ("other", "cpu", "normal")]
    assert levels(site.wrong_account(job(resources=resources), enforced.split(","), associations)) == expected


def test_nobody_known_to_accounting_needs_an_account_where_it_is_enforced() -> None:
    assert levels(site.wrong_account(job(), ["associations"], [])) == ["FAIL"]
    assert levels(site.wrong_account(job(), ["none"], [])) == []


@pytest.mark.parametrize(
    ("kind", "mode", "with_gpus", "level"),
    [
        ("preempt/partition_prio", "REQUEUE", True, "ok"),
        ("preempt/partition_prio", "OFF", True, "ok"),
        ("preempt/partition_prio", "CANCEL", True, "warn"),
        ("preempt/partition_prio", "GANG,SUSPEND", True, "FAIL"),
        ("preempt/partition_prio", "GANG,SUSPEND", False, "warn"),
        ("preempt/none", "SUSPEND", True, "ok"),
        ("preempt/none", "GANG", True, "FAIL"),
        ("preempt/qos", "REQUEUE", True, "warn"),  # the cluster's mode counts
    ],
)
def test_preemption(kind: str, mode: str, with_gpus: bool, level: str) -> None:
    modes = site.preempt_modes({"PreemptType": kind, "PreemptMode": "CANCEL"}, {"PreemptMode": mode})
    assert site.preemption("gpu", modes, with_gpus)[0] == level
    assert bool(modes) == (mode != "OFF" and (kind, mode) != ("preempt/none", "SUSPEND"))
