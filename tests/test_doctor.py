"""What the doctor finds without a Slurm, and what it concludes from what Slurm prints. tests/slurm/test_doctor_slurm.py asks a real one."""

import copy
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from snakemake.utils import update_config

from cbtm_pipeline import doctor
from cbtm_pipeline.ops import cost, planned, reach, site
from cbtm_pipeline.ops.planned import Job
from cbtm_pipeline.ops.reach import Line
from cbtm_pipeline.training import model
from made_project import ROOT, make_project, snakemake
from made_run import make_config

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
MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:45 / /home rw,relatime - autofs systemd-1 rw,fd=31
24 23 0:46 / /home rw,relatime - nfs4 nas:/home rw,vers=4.2,local_lock=none
25 22 0:47 / /scratch rw - lustre mds@tcp:/scratch rw,localflock
26 22 0:48 / /my\\040disk rw - fuse.juicefs jfs rw
"""


def job(**changes: Any) -> Job:
    resources = {"slurm_partition": "gpu", "runtime": 60, "mem_mb": 16000, "gpus": 1}
    return Job(
        "train_expert",
        {**resources, **changes.pop("resources", {})},
        changes.pop("threads", 8),
        changes.pop("resumable", True),
    )


def levels(lines: Iterator[Line]) -> list[str]:
    return [level for level, _ in lines]


# ---- what Slurm prints ----


def test_records_keep_values_with_spaces_and_equals_signs() -> None:
    printed = "NodeName=g1 Gres=gpu:a100:4(S:0-1) OS=Linux 6.1 #1 SMP @0  RealMemory=8192 CfgTRES=cpu=4,gres/gpu=2 Reason=no power [root@x]\n\n"
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


# ---- jobs ----


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


# ---- Snakemake ----


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
        ValueError, match=r"(?s)^profile: mine: snakemake says: .*no-such-option.* Mend the profile\.$"
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


# ---- files and models ----


@pytest.mark.parametrize(
    ("path", "point", "shared", "locks_stay_here"),
    [
        ("/etc", "/", False, False),
        ("/homework", "/", False, False),
        ("/home/me/run", "/home", True, False),
        ("/scratch", "/scratch", False, True),
        ("/my disk/x", "/my disk", True, False),
    ],
)
def test_mounts(path: str, point: str, shared: bool, locks_stay_here: bool) -> None:
    mount = reach.find_mount(Path(path), MOUNTS)
    assert (mount.point, mount.locks_stay_here) == (point, locks_stay_here)
    assert mount.shared == shared or mount.type == "lustre"


def test_files_that_compute_nodes_do_not_see() -> None:
    mounts = {
        name: reach.find_mount(Path(path), MOUNTS)
        for name, path in (("outdir", "/home/x"), ("Python", "/usr"), ("this folder", "/opt"))
    }
    ((first, text), (second, _)) = reach.seen_by(["node1", "node2"], mounts)
    assert (first, second) == ("ok", "warn") and "outdir on /home (nfs4)" in text
    assert levels(reach.seen_by([reach.socket.gethostname()], mounts)) == ["ok", "ok"]


def test_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    found = reach.probe(tmp_path / "not/yet/there")
    assert found.locks and found.links and found.write_rate > 1e5
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="/proc"):
        reach.probe(Path("/proc/results"))


def test_promises_of_a_file_system() -> None:
    here, lustre = (reach.find_mount(Path(path), MOUNTS) for path in ("/", "/scratch"))
    good, bad = reach.Probe(True, True, 1e8), reach.Probe(False, False, 1e8)
    assert levels(reach.promises(Path("out"), here, good, True)) == ["ok"]
    assert levels(reach.promises(Path("out"), lustre, good, True)) == ["warn", "ok"]
    assert levels(reach.promises(Path("out"), here, bad, True)) == ["FAIL", "warn"]
    assert levels(reach.promises(Path("out"), here, bad, False)) == ["warn", "warn"]


def test_used_bytes(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_bytes(b"x" * 1000)
    (tmp_path / "d").symlink_to("nowhere")
    assert reach.used_bytes(tmp_path) == 1000 + len("nowhere")
    assert reach.used_bytes(tmp_path / "none") == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with me/tiny in it: a model and what passes for a tokenizer."""
    cache = tmp_path_factory.mktemp("hub")
    snapshot = cache / "models--me--tiny/snapshots/abc"
    (cache / "models--me--tiny/refs").mkdir(parents=True)
    (cache / "models--me--tiny/refs/main").write_text("abc")
    model.scratch(make_config().model.scratch, 300, 0, 256, 0).save_pretrained(snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    return cache


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that has me/other, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path == "/api/models/me/other" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tiny))
        yield huggingface_hub.constants.ENDPOINT
        server.shutdown()


def models(pretrained: str, *submitted: str, tokenizer: str | None = None) -> list[Line]:
    facts = doctor.Facts(
        [], None, make_config(model={"pretrained": pretrained}, tokenizer={"pretrained": tokenizer})
    )
    facts.jobs = [job()._replace(rule=rule) for rule in submitted]
    return list(doctor.check_model(facts))


@pytest.mark.usefixtures("hub")
def test_models_have_to_be_here_where_jobs_may_have_no_network() -> None:
    assert [level for level, _ in models("me/tiny", "tokenizer", "train_expert")] == ["ok", "ok"]
    assert "HF_HUB_OFFLINE" in models("me/tiny", "tokenizer")[0][1]
    assert "HF_HUB_OFFLINE" not in models("me/tiny")[0][1]
    (found,) = models("me/other", "train_expert")
    assert found[0] == "FAIL" and found[1].endswith("Run hf download me/other")
    ((level, text),) = models("me/other")
    assert level == "ok" and "the hub has it" in text
    ((level, text),) = models("me/nobody")
    assert level == "FAIL" and "no public me/nobody" in text
    assert [level for level, _ in models("me/tiny", "tokenizer", tokenizer="me/other")] == [
        "ok",
        "FAIL",
        "ok",
    ]
    assert [level for level, _ in models("me/tiny", "train_expert", tokenizer="me/other")] == [
        "ok",
        "ok",
        "ok",
    ]


def encoders(encoder: str | None, *submitted: str) -> doctor.Facts:
    """Facts of a run with this encoder, whose embeddings go to Slurm where `submitted` says so."""
    jobs = [job()._replace(rule=rule) for rule in submitted]
    return doctor.Facts([], None, make_config(embed={"encoder": encoder, "n_components": 7}), jobs)


@pytest.mark.usefixtures("hub")
def test_an_encoder_has_to_be_here_too(tmp_path: Path) -> None:
    assert list(doctor.check_encoder(encoders(None, "embed"))) == []
    facts = encoders("me/tiny", "embed")
    ((level, text),) = doctor.check_encoder(facts)
    assert level == "ok" and "HF_HUB_OFFLINE" in text
    assert facts.n_dimensions == make_config().model.scratch["hidden_size"]
    ((level, text),) = doctor.check_encoder(encoders("me/other", "embed"))
    assert level == "FAIL" and text.endswith("Run hf download me/other")
    ((level, text),) = doctor.check_encoder(encoders("me/other", "train_expert"))
    assert level == "ok" and "lacks the encoder, but the hub has it" in text
    ((level, text),) = doctor.check_encoder(encoders(str(tmp_path), "embed"))
    assert level == "FAIL" and "lacks config.json" in text and text.endswith("Complete it")


@pytest.mark.usefixtures("hub")
def test_the_disk_holds_vectors_of_the_encoder(tmp_path: Path) -> None:
    def disk(encoder: str | None) -> tuple[float, str]:
        facts = encoders(encoder)
        assert facts.config
        facts.config = facts.config.model_copy(update={"outdir": str(tmp_path)})
        facts.model = cost.Size(1, 6, 300)
        list(doctor.check_encoder(facts))
        ((level, text),) = doctor.check_disk(facts)
        assert level == "ok" and text.startswith("disk: ")
        return float(text.split()[1]), text

    (linear, _), (tiny, known), (other, assumed) = disk(None), disk("me/tiny"), disk("me/other")
    assert tiny - linear == pytest.approx(cost.DEMO_BYTES / cost.DOCUMENT_BYTES * (64 - 7) * 4 / 1e6, abs=0.1)
    assert other - linear == pytest.approx(
        cost.DEMO_BYTES / cost.DOCUMENT_BYTES * (768 - 7) * 4 / 1e6, abs=0.1
    )
    assert "taken to have" not in known and "the encoder's vectors are taken to have 768 numbers" in assumed


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "does not answer" in str(hub.problem("me/other"))


def test_a_folder_that_lacks_something(tiny: Path, tmp_path: Path) -> None:
    whole = next(tiny.glob("*/snapshots/*"))
    assert hub.lacks_weights(whole) == hub.lacks_tokenizer(whole) == []
    assert hub.lacks_weights(tmp_path) == ["config.json", "model.safetensors"] and hub.lacks_tokenizer(
        tmp_path
    )
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (tmp_path / "1.safetensors").touch()
    assert hub.lacks_weights(tmp_path) == ["2.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight')
    assert hub.lacks_weights(tmp_path) == ["a whole model.safetensors.index.json"]
    ((level, text),) = models(str(tmp_path))
    assert level == "FAIL" and text.endswith("Complete it")


# ---- the whole ----


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project on a machine without Slurm."""
    folder = make_project(tmp_path / "project")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(folder)
    return folder


def examine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["cbtm doctor", *args])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    code = end.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().out


def test_without_slurm(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    code, printed = examine(monkeypatch, capsys, "--configfile", "small.yaml")
    assert code == 0
    assert "warn  Slurm: no sbatch in PATH, so local runs only" in printed
    assert "jobs       none on Slurm" in printed and printed.endswith("0 FAIL, 1 warn, 4 ok\n")
    code, printed = examine(monkeypatch, capsys, "--configfile", "small.yaml", "--profile", "slurm")
    assert code == 1 and "FAIL  Slurm: no sbatch in PATH" in printed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cluster: {kk: 2}", "cluster.kk: unknown key"),
        ("cluster: {k: 0}\ntrain: {steps: x}", "train.steps: 'x'"),
        ("corpus: {train: [nothing.jsonl]}", "nothing.jsonl: no such file"),
        ("corpus: {train: [gone.jsonl]}", "gone.jsonl: No such file or directory"),
        ("corpus: [", "mine.yaml: not YAML"),
        ("- 1", "mine.yaml: no sections"),
        ("outdir: /proc/results", "/proc"),
        ("model: {scratch: {hiden_size: 3}}", "model.scratch.hiden_size: unknown key"),
        ("model: {scratch: {hidden_size: 65536, num_hidden_layers: 200, vocab_size: 300}}", "disk: "),
    ],
)
def test_what_would_fail_fails_in_one_line(
    content: str, words: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (project / "mine.yaml").write_text(content)
    (project / "gone.jsonl").symlink_to("nowhere")
    code, printed = examine(monkeypatch, capsys, "--configfile", "small.yaml", "mine.yaml")
    assert code == 1
    (line,) = [line for line in printed.splitlines() if words in line]
    assert line.startswith("FAIL  ") and line.count(". ") >= 2 and line.endswith((".", "?"))


def test_a_missing_config_and_a_broken_check_are_findings(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code, printed = examine(monkeypatch, capsys, "--configfile", "none.yaml")
    assert code == 1 and "FAIL  none.yaml: No such file or directory" in printed

    def check_moon(facts: doctor.Facts) -> Iterator[Line]:
        yield "ok", "the moon: is there"
        raise KeyError("far side")

    monkeypatch.setattr(doctor, "CHECKS", (check_moon, doctor.check_config))
    found = list(doctor.run(doctor.Facts(["small.yaml"], None)))
    assert [level for level, _ in found] == [
        "ok",
        "warn",
        "ok",
    ] and "check_moon: not done (KeyError: 'far side')" in found[1][1]
