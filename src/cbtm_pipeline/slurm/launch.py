"""Run one rule's module as a Slurm job and wait for its result.

    python -m cbtm_pipeline.slurm.launch --name expert-3 --folder results/slurm \\
        --resources '{"slurm_partition": "gpu", ...}' --threads 8 --made-from 4f1c... \\
        --outputs results/experts/3/model.safetensors --work results/work/3 \\
        -- python -m cbtm_pipeline.train_expert --config results/config.json --expert 3 ...

The folder results/slurm/expert-3 remembers the job from before its submission until its result was taken.
Started again, this process finds the job there and waits for it, or takes the result that it left meanwhile.
It submits a new job only if Slurm says that the old one is gone. Ctrl-C cancels the job. Any other end of
this process, or of the process that started it, leaves the job alone.

A job may end without a result (preempted and not requeued, node lost, time limit). Then it is submitted again
if that can help, at most events.MAX_TRIES times without a new saved step. Standard library only, as one such
process waits on the login node for every job.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from cbtm_pipeline.base import cli, trust
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.base.publish import open_file
from cbtm_pipeline.slurm import request
from cbtm_pipeline.slurm.launcher import Launcher, Order
from cbtm_pipeline.slurm.watch import Detached


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", required=True, help="name of the job")
    p.add_argument("--folder", required=True, type=Path, help="folder that has a folder for every job")
    p.add_argument(
        "--resources", required=True, type=json.loads, help="the resources of the profile, a JSON object"
    )
    p.add_argument("--threads", type=int, default=1, help="CPUs of each task")
    p.add_argument(
        "--made-from",
        default="",
        help="identity of all inputs of the work; a job of other work is replaced",
    )
    p.add_argument("--outputs", nargs="*", default=[], help="the files that the job makes")
    p.add_argument(
        "--work",
        help="a training's folder with its saved state: the training goes on after a time limit, "
        "and has one task per GPU",
    )
    p.add_argument("command", nargs="+", help="after --: the command to run")
    return p.parse_args()


def make_order(args: argparse.Namespace, folder: Path) -> Order:
    """The order for task.py and submit.py, plain data. Raises ValueError that names a wrong resource."""
    work = json.dumps([args.made_from, args.command]).encode()
    return {
        "name": args.name,
        "folder": str(folder.resolve()),
        "command": args.command,
        "work": args.work,
        "outputs": args.outputs,
        "gpus": int(args.resources.get("gpus", 0)),
        "fingerprint": hashlib.blake2b(work, digest_size=16).hexdigest(),
        "sbatch": request.sbatch_parameters(
            args.name, args.resources, args.threads, "", args.work is not None
        ),
    }


def detach(number: int, frame: object) -> NoReturn:
    """Handle a signal that ends this process and not its job."""
    raise Detached(signal.Signals(number).name)


def main() -> None:
    parent = os.getppid()
    args = parse()
    folder = args.folder / args.name
    trust.refuse_open(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cli.start_logging(args.name, folder / "launch.log")
    trust.warn_once(folder, args.folder / ".warned")
    order = make_order(args, folder)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, detach)
    lock_fd = open_file(folder / ".lock", os.O_RDWR)
    launcher = Launcher(folder, order, lock_fd, parent)
    try:
        launcher.lock()
        launcher.run()
    except Detached as reason:
        log.info("left alone (%s): the job goes on, start again to wait for it", reason, extra=cli.NEWS)
        sys.exit(143)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        launcher.cancel()
        sys.exit(130)


if __name__ == "__main__":
    cli.run(main)
