"""The cluster in a box is a cluster: jobs run, GPUs are dealt out, preemption and accounting are real."""

from .box import NODES, Box


def test_one_task_on_every_node(box: Box) -> None:
    assert sorted(box.run("srun", "--nodes=4", "printenv", "SLURMD_NODENAME").split()) == list(NODES)
