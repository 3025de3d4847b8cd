"""The terminal during a run: few lines for each job, all warnings and errors; the logs have every line."""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from snakemake.logging import LoggerManager
from snakemake.settings.enums import Quietness
from snakemake.settings.types import OutputSettings
from snakemake_interface_logger_plugins.common import LogEvent

from cbtm_pipeline.base import cli
from cbtm_pipeline.ops import terminal
from made_project import done, make_project, snakemake

Say = Callable[..., None]
SHARDS = "results/shards/manifest.json"
WARNING, RESULT = "12:00:00 W expert 0     odd", "12:00:01 I expert 0     8 steps, loss 4.2"
LOG = f"12:00:00 I expert 0     step 1/8\n{WARNING}\n{RESULT}\n"


@pytest.fixture
def start(capsys: pytest.CaptureFixture[str]) -> Callable[..., Say]:
    """Start Snakemake's own logging with these settings, and make it brief."""

    def starter(environment: dict[str, str] | None = None, **settings: Any) -> Say:
        logger = logging.Logger("snakemake of a test")
        output_settings = OutputSettings(**settings)
        LoggerManager(logger, output_settings)
        terminal.be_brief(logger, output_settings, {} if environment is None else environment)

        def say(message: str | None, level: int = logging.INFO, **values: Any) -> None:
            logger.log(level, message, extra=values)

        return say

    return starter


def start_job(say: Say, jobid: int, rule: str, log: Path | None = None, **resources: Any) -> None:
    """What Snakemake says when a job starts."""
    values = dict.fromkeys(("rule_msg", "benchmark", "reason", "priority", "shellcmd"), "")
    values |= {"rule_name": rule, "input": ["in.json"], "output": ["out.json"], "local": True}
    values |= {"wildcards": {"expert": "0"} if "expert" in rule else {}, "threads": 1, "indent": False}
    values |= {"log": [str(log)] if log else [], "resources": {"tmpdir": "/tmp", **resources}}
    say("Select jobs to execute...")
    say("Execute 1 jobs...", event=LogEvent.JOB_STARTED, jobs=[jobid])
    say(f" Rule: {rule}", event=LogEvent.JOB_INFO, jobid=jobid, is_checkpoint=False, **values)
    say("Shell command: exec ...", event=LogEvent.SHELLCMD, shellcmd="exec ...")


def finish_job(say: Say, jobid: int) -> None:
    """What Snakemake says when a job has ended well."""
    say(f"Finished jobid: {jobid}", event=LogEvent.JOB_FINISHED, job_id=jobid)
    say(None, event=LogEvent.PROGRESS, done=1, total=3)


def fail_job(say: Say, jobid: int, log: Path) -> None:
    """What Snakemake says when a job has failed."""
    values = dict.fromkeys(("rule_msg", "conda_env", "container_img"), None)
    values |= {"input": [], "output": ["out.json"], "log": [str(log)], "aux": {}, "indent": False}
    values |= {"rule_name": "train_expert", "shellcmd": "exec python", "jobid": jobid}
    say("Error in rule train_expert", logging.ERROR, event=LogEvent.JOB_ERROR, **values)


def plan(say: Say) -> None:
    """What Snakemake says before the first job."""
    say("Building DAG of jobs...")
    say("Provided cores: 2", event=LogEvent.RESOURCES_INFO, cores=2)
    stats = {"shard": 1, "train_expert": 2, "all": 1, "total": 4}
    say("Job stats: ...", event=LogEvent.RUN_INFO, stats=stats)


def without_time(text: str) -> list[str]:
    """The lines without their times of day, and with every duration as 0s."""
    text = re.sub(r"^\d\d:\d\d:\d\d ", "", text, flags=re.M)
    return re.sub(r"in \S+ \(", "in 0s (", text).splitlines()


def test_a_job_has_a_line_for_its_start_and_one_with_its_result(start, capsys, tmp_path: Path) -> None:
    say, log = start(), tmp_path / "0.log"
    plan(say)
    start_job(say, 7, "train_expert", log)
    start_job(say, 8, "shard")
    log.write_text(LOG)
    finish_job(say, 7)
    finish_job(say, 8)
    start_job(say, 0, "all")
    finish_job(say, 0)
    assert without_time(capsys.readouterr().err) == [
        "I snakemake                jobs: 3 (shard, 2 train_expert)",
        "I train_expert 0           started",
        "I shard                    started",
        "I train_expert 0           done in 0s (1 of 3 jobs done): 8 steps, loss 4.2",
        "I shard                    done in 0s (2 of 3 jobs done)",
    ]


def test_an_old_or_a_missing_log_is_no_result(start, capsys, tmp_path: Path) -> None:
    say, log = start(), tmp_path / "0.log"
    log.write_text(LOG)
    os.utime(log, (0, 0))
    start_job(say, 1, "train_expert", log)
    start_job(say, 2, "train_expert", tmp_path / "none.log")
    finish_job(say, 1)
    finish_job(say, 2)
    assert capsys.readouterr().err.count("jobs done)\n") == 2


def test_errors_and_warnings_are_shown_in_full(start, capsys, tmp_path: Path) -> None:
    say, log = start(show_failed_logs=True), tmp_path / "0.log"
    plan(say)
    start_job(say, 1, "train_expert", log)
    log.write_text(LOG)
    say("a file is missing", logging.WARNING)
    say("Removing output files of failed job")
    fail_job(say, 1, log)
    start_job(say, 2, "shard")
    finish_job(say, 2)
    say("Exiting because a job execution failed.", logging.ERROR)
    printed = capsys.readouterr().err
    assert "a file is missing\nRemoving output files of failed job\n" in printed
    assert "Error in rule train_expert:\n" in printed and LOG in printed
    lines = without_time(printed)
    assert "E train_expert 0           failed in 0s (0 of 3 jobs done, 1 failed)" in lines
    assert "I shard                    done in 0s (1 of 3 jobs done, 1 failed)" in lines
    assert lines[-1] == "Exiting because a job execution failed."


def test_of_a_job_on_slurm_the_warnings_come_from_its_log(start, capsys, tmp_path: Path) -> None:
    say, log = start(), tmp_path / "0.log"
    start_job(say, 1, "train_expert", log, slurm_partition="gpu")
    assert capsys.readouterr().err == "", "its launcher says that it was submitted"
    log.write_text(LOG)
    finish_job(say, 1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == WARNING and second.endswith(": 8 steps, loss 4.2")


@pytest.mark.parametrize(
    ("quiet", "n_lines"),
    [(set(), 3), ({Quietness.RULES}, 2), ({Quietness.PROGRESS}, 1), ({Quietness.ALL}, 0)],
)
def test_snakemakes_own_option_asks_for_even_less(start, capsys, quiet: set, n_lines: int) -> None:
    say = start(quiet=quiet)
    plan(say)
    start_job(say, 1, "shard")
    finish_job(say, 1)
    assert len(capsys.readouterr().err.splitlines()) == n_lines


@pytest.mark.parametrize("settings", [{"dryrun": True, "stdout": True}, {"verbose": True}])
def test_a_dry_run_and_a_verbose_run_show_everything(start, capsys, settings: dict[str, bool]) -> None:
    environment = {cli.BRIEF: "1"}
    say = start(environment, **settings)
    plan(say)
    start_job(say, 1, "train_expert")
    printed = "".join(capsys.readouterr())
    assert "Building DAG of jobs" in printed and "Job stats: ..." in printed
    assert "rule train_expert:\n    input: in.json\n" in printed and "    wildcards: expert=0\n" in printed
    assert environment == {}, "jobs show all their lines"


def test_jobs_are_told_to_be_brief(start) -> None:
    environment: dict[str, str] = {}
    start(environment)
    assert environment == {cli.BRIEF: "1"}


# --- real runs ---


@pytest.mark.slow
def test_a_run_prints_two_lines_for_each_job_and_its_logs_have_every_line(finished: Path) -> None:
    printed = (finished / "printed.txt").read_text()
    jobs = done(printed)
    assert len(jobs) == len(set(jobs)) == 24
    assert set(re.findall(r"^\S+ I (\S+(?: \S+)?) +started$", printed, re.M)) == set(jobs)
    n_done = re.findall(r"done in .*\((\d+) of 24 jobs done\): \S", printed)
    assert n_done == [str(i + 1) for i in range(24)], "each with its result"
    assert not re.search(r"^(local)?rule |^    \w+: |^Execute |of \d+ steps", printed, re.M), "no blocks"
    table = (finished / "results/eval/table.txt").read_text()
    assert table in printed
    # A job may show a further line a minute.
    assert len(printed.splitlines()) <= 3 * len(jobs) + len(table.splitlines()) + 10

    log = (finished / "results/logs/train_expert/1.log").read_text()
    assert re.findall(r"step (\d)/4  loss", log) == ["1", "2", "3", "4"]
    result = log.splitlines()[-1].split("expert 1     ")[1]
    assert re.fullmatch(r"4 steps, 256 tokens, loss \d\.\d{4}, validation \d\.\d{4}", result)
    (line,) = re.findall(r"train_expert 1 +done in .*", printed)
    assert line.endswith(f"jobs done): {result}")
    snakemakes, *_ = sorted(finished.glob(".snakemake/log/*.log"))  # other tests may have looked at the run
    assert "rule train_expert:\n    input: " in snakemakes.read_text()


def spoil(project: Path, n_rows: int) -> None:
    """Add rows to the corpus that are no documents."""
    with (project / "corpus.jsonl").open("a") as file:
        file.writelines(f"{json.dumps({'no': i})}\n" for i in range(n_rows))


@pytest.mark.slow
def test_a_real_warning_and_a_real_error_are_shown_in_full(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    spoil(project, 2)
    printed = snakemake(project, SHARDS, "--cores", "2")
    assert done(printed) == ["tokenizer", "shard"]
    assert re.search(r"^\S+ W shard .*2 of 92 rows", printed, re.M)
    assert "gigatoken encoded" not in printed
    spoil(project, 20)
    printed = snakemake(project, SHARDS, "--cores", "2", ok=False)
    assert re.search(r"^\S+ E shard .*22 of 112 rows", printed, re.M)
    assert "Error in rule shard:\n" in printed and "Logfile results/logs/shard.log:\n" in printed
    assert re.search(r"^\S+ E shard +failed in .*1 of 2 jobs done, 1 failed\)$", printed, re.M)
    assert "gigatoken encoded" in printed, "a failed job's log is shown whole"


@pytest.mark.slow
def test_verbose_shows_every_line(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    printed = snakemake(project, SHARDS, "--cores", "2", "--verbose")
    assert "rule shard:\n    input: " in printed and "2 of 2 steps (100%) done" in printed
    assert (project / "results/logs/shard.log").read_text() in printed
    assert done(printed) == []
