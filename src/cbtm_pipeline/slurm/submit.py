"""Submit one job: python -m cbtm_pipeline.slurm.submit < order.json prints its id.

It is a process of its own, so that launchers, one per job in the queue, stay small: submitit and all that it
loads live only as long as a submission.
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
    # submitit's limit on requeues is switched off: task.py stops a job that makes no progress
    executor = submitit.SlurmExecutor(folder=order["folder"], max_num_timeout=10**6)
    executor.update_parameters(**order["sbatch"])
    try:
        print(executor.submit(Task(order)).job_id)
    except FailedJobError:  # submitit has printed the message of sbatch
        sys.exit(1)
    except FailedSubmissionError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
