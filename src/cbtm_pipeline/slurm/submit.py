"""Submit one job: python -m cbtm_pipeline.slurm.submit < order.json prints its id.

A process of its own, so that the launchers, one per job in the queue, stay small: submitit and what it loads is gone again at once.
"""

import json
import sys
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from cbtm_pipeline.slurm.task import Task


def main() -> None:
    order = json.load(sys.stdin)
    Path(order["folder"]).mkdir(parents=True, exist_ok=True)
    executor = submitit.SlurmExecutor(
        folder=order["folder"], max_num_timeout=10**6
    )  # the guard against endless chains is our own
    executor.update_parameters(**order["sbatch"])
    try:
        print(executor.submit(Task(order)).job_id)
    except FailedJobError:  # submitit has printed what sbatch said
        sys.exit(1)
    except FailedSubmissionError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
