"""What the processes of a group exchange, and how they end together."""

import json
import signal
from collections.abc import Iterator

import pytest

from cbtm_pipeline.training import distributed
from made_driver import Ranks, output


@pytest.fixture(scope="module")
def driver() -> Iterator[Ranks]:
    found = Ranks("ranks_driver.py")
    yield found
    found.end()


def test_sums(tmp_path, driver):
    assert driver.run("gradients", tmp_path / "log") == [0, 0, 0]
    for rank in range(3):
        gradients, sums = json.loads(output(tmp_path / "log", rank))
        assert gradients == [[6, 6], [1], None, [30, 30], None]  # all, one, none, all of them; not trained
        assert sums == [3, 1, 1.5]


def test_what_process_0_has_and_does(tmp_path, driver):
    assert driver.run("share", tmp_path / "log") == [0, 0, 0]
    tensors = {
        "a": ["torch.int64", [[0, 1, 2], [3, 4, 5]]],
        "b": ["torch.float32", 0.5],
        "c": ["torch.bool", [True, False]],
        "d": ["torch.float32", []],
    }
    for rank in range(3):
        assert json.loads(output(tmp_path / "log", rank)) == [7, 0, tensors, True, rank == 0]


def test_micro_batches_are_chosen_for_each_process(tmp_path, driver):
    """With little memory, a process takes its three sequences at once, or one if it recomputes activations.

    The losses are the same.
    """
    assert driver.run("small_devices", tmp_path / "log", world_size=2) == [0, 0]
    answers = [json.loads(output(tmp_path / "log", rank)) for rank in range(2)]
    assert answers[0] == answers[1]
    (kept, whole), (recomputed, sharded) = answers[0]
    assert kept == [3, False]
    assert recomputed == [1, True]
    assert whole == pytest.approx(sharded, abs=1e-5)


@pytest.mark.parametrize(("which", "how"), [(0, "error"), (1, "error"), (1, "asked"), (0, "killed")])
def test_no_process_waits_for_one_that_failed(tmp_path, driver, which, how):
    statuses = driver.run("one_fails", tmp_path / "log", [str(which), how], world_size=2)
    assert statuses[1 - which] == 1
    assert statuses[which] == (-signal.SIGKILL if how == "killed" else 1)
    why = "process 0 is gone" if how == "killed" else f"process {which}: the disk is full"
    assert f"ended, as another one has failed ({why})" in output(tmp_path / "log", 1 - which)


def test_environment():
    full = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    group = distributed.from_environment(full)
    assert (group.rank, group.world_size, group.local_rank) == (3, 4, 1)
    for alone in ({}, {"RANK": "0"}, full | {"WORLD_SIZE": "1", "RANK": "0"}):
        assert distributed.from_environment(alone).world_size == 1
    wrong = [
        full | {"RANK": "4"},
        full | {"RANK": "x"},
        full | {"WORLD_SIZE": ""},
        full | {"MASTER_PORT": ""},
    ]
    for environ in [
        *wrong,
        *({k: v for k, v in full.items() if k != name} for name in full if name != "WORLD_SIZE"),
    ]:
        with pytest.raises(
            ValueError, match=r"RANK=.*MASTER_PORT=.*Expected all of them as torchrun sets them"
        ):
            distributed.from_environment(environ)
