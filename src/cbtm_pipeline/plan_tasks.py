"""The plan of rule `eval_task`: which tasks of lm-evaluation-harness each model is given."""

from dataclasses import dataclass
from pathlib import PurePath

from cbtm_pipeline.config import Config
from cbtm_pipeline.plan_base import Plan

ENDS = (".yaml", ".yml")  # of a task that is a file


@dataclass(frozen=True)
class TasksPlan(Plan):
    """`tasks`: names of lm-evaluation-harness, and names of files without their folders.

    The content of a file is an input (provenance/task_files.py).
    """

    tasks: tuple[str, ...]


def eval_task(c: Config) -> TasksPlan:
    return TasksPlan(tuple(PurePath(name).name if is_file(name) else name for name in c.eval.tasks))


def is_file(task: str) -> bool:
    """Whether an entry of eval.tasks is a file of the user's, and no name of lm-evaluation-harness."""
    return task.endswith(ENDS)
