"""The text that people see."""

from cbtm_pipeline import status
from cbtm_pipeline.ops import status_table
from cbtm_pipeline.ops.status_table import Row

HOUR = 3600.0


def test_a_wide_table_stays_within_its_width():
    widest = Row(
        *(
            "expert",
            "random-127",
            "running",
            123456,
            1234567,
            12.3456,
            12345678.9,
            0.9999,
            99 * HOUR,
            99 * HOUR,
        ),
        *("123456789012", "PENDING", "AssocGrpGRESMinutes", "gpu-a100-[1-128].example", 1234, "x" * 200),
    )
    rows = [widest, widest._replace(kind="stage", name="score_expert")] * 20
    lines = status_table.render(
        status.Status("results", "process 1 on " + "h" * 200, rows, ["n" * 300])
    ).splitlines()
    assert max(map(len, lines)) <= status_table.WIDTH


def test_columns_are_aligned_and_empty_ones_left_out():
    rows = [
        Row("expert", "seed", "done", 5, 5, 2.0),
        Row("expert", "random-10", "running", 10, 2000, 3.25, eta_s=75.0),
    ]
    table = status_table.render(status.Status("results", None, rows, [])).splitlines()
    assert table == [
        "results: no snakemake runs",
        "",
        "expert     state                 step   loss    ETA",
        "seed       done     ########      5/5  2.000",
        "random-10  running  ........  10/2000  3.250  1m15s",
        "",
        "2 experts: 1 done, 1 running. ETA: 1m15s",
    ]
    rows.append(Row("expert", "1", "waiting", 0, 2000))
    assert (
        status_table.summary(rows) == "3 experts: 1 done, 1 running, 1 waiting. ETA of those that run: 1m15s"
    )


def test_a_bar_is_full_only_at_the_end():
    bars = [status_table.bar(step, 100) for step in range(101)]
    assert [n.count("#") for n in bars] == sorted(n.count("#") for n in bars)
    assert (bars[0], bars[99], bars[100]) == ("........", "#######.", "########")
    assert status_table.bar(0, 0) == "########"  # a pretrained seed is not trained
    assert status_table.bar(9, 3) == "########"
    assert status_table.bar(3, None) == ""


def run_with(name: str, *states: status_table.State, active: str | None = None) -> status.Status:
    """A run with a stage and models in these states; each model has 10 steps."""
    stage, *experts = states
    n_done = {"done": 10, "running": 5}
    rows = [Row("expert", str(i), s, n_done.get(s, 0), 10) for i, s in enumerate(experts)]
    return status.Status(f"results/study/runs/{name}", active, [Row("stage", "route", stage), *rows], [])


def test_a_study_has_a_row_for_each_run():
    failed = run_with("k=3", "done", "failed", "waiting")
    failed.rows[1] = failed.rows[1]._replace(error="disk full")
    runs = [
        run_with("k=1", "done", "done"),
        run_with("k=2", "done", "done", "running", active="process 1 on a"),
        failed,
        run_with("k=4", "waiting", "done", active="process 1 on a"),
    ]
    assert status_table.render_study("results/study", runs).splitlines() == [
        "results/study: snakemake runs (process 1 on a)",
        "",
        "run  state              models  now",
        "k=1  done     ########     1/1",
        "k=2  running  #####...     1/2  1",
        "k=3  failed   ........     0/2",
        "k=4  waiting  #######.     1/1",
        "",
        "4 runs: 1 done, 1 running, 1 waiting, 1 failed",
        "k=3: failed: expert 0: disk full",
    ]


def test_a_run_has_stopped_if_it_has_begun_and_no_snakemake_runs():
    begun = run_with("k=2", "done", "waiting")
    assert status_table.state_of(begun) == "stopped"
    assert status_table.state_of(begun._replace(active="process 1 on a")) == "waiting"
    assert status_table.state_of(run_with("k=2", "waiting", "waiting")) == "waiting"


def test_a_run_whose_config_cannot_be_read_is_unknown():
    assert status_table.state_of(run_with("k=2", "waiting")) == "unknown"
    assert status_table.state_of(status.Status("results", None, [], [])) == "unknown"
