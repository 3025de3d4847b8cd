"""Serve an ensemble over HTTP, as OpenAI's API does: completions, chats, and a page that shows its experts.

    cbtm serve

Needs the packages of the extra `serve`. Only this machine can reach the server, unless --host says otherwise;
then it needs a key. SIGTERM and Ctrl-C finish what runs; a second one stops it. docs/serve.md has the API.
It is also `python -m cbtm_pipeline.serve`.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
from pathlib import Path
from typing import Any

from cbtm_pipeline.base import cli
from cbtm_pipeline.inference import keys, loaded, where

KEY = "CBTM_API_KEY"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")  # what the extra installs
NUMBERS = {  # options: smallest and largest value, type
    "--port": (0, 65535, int),
    "--max-tokens": (1, 10**6, int),
    "--max-prompt-tokens": (1, 10**7, int),
    "--timeout-s": (0.1, 10**6, float),
    "--concurrency": (1, 1000, int),
    "--queue": (0, 10**5, int),
    "--max-body-kib": (1, 10**6, int),
}
GRACE_S = 10  # beyond the time limit, until connections are cut at the end


def check_extra() -> None:
    """Raise ValueError if a package of the extra is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        found = f"cbtm serve: {', '.join(missing)} not installed"
        raise ValueError(f"{found}. Expected the extra serve. Run pip install 'cbtm-pipeline[serve]'.")


def read_key(given: str | None, host: str) -> str | None:
    """The key of the option or the environment, where an empty one counts as none on this machine alone.

    Raises ValueError if it is needed and not there.
    """
    key = os.environ.get(KEY) if given is None else given
    if key == "" and given is None and keys.is_loopback(host):
        key = None
    if key is None and not keys.is_loopback(host):
        todo = f"Set {KEY}, or leave --host out"
        raise ValueError(f"--host: {host} without a key. Expected a key where others can reach it. {todo}.")
    if key is not None and (not key.isascii() or not key.isprintable() or not key.strip() or " " in key):
        raise ValueError(
            f"{KEY}: empty, or with other characters. Expected visible ASCII characters. Change it."
        )
    return key


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, but does not listen yet. Raises ValueError if it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        todo = "Choose another --host or --port"
        raise ValueError(
            f"{host} port {port}: {why}. Expected a free address of this machine. {todo}."
        ) from error
    return sock


async def run(server: Any, worker: Any, sock: socket.socket) -> None:
    """Run the server until a signal: the first lets running generations end, the second stops them."""

    def stop() -> None:
        when = "at once" if server.should_exit else "when what runs is done"
        cli.log.info("stopping %s", when, extra=cli.NEWS)
        worker.close(hurry=server.should_exit)
        server.should_exit = True

    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop)
    server.capture_signals = contextlib.nullcontext  # uvicorn's own handlers end the process by the signal
    await server.serve([sock])


def start(args: argparse.Namespace) -> None:
    """Load the ensemble and serve it until a signal."""
    folder = where.named(args)
    key = read_key(args.api_key, args.host)
    loaded.check(folder)
    sock = bind(args.host, args.port)
    import uvicorn  # these take seconds, and what could be wrong before has been looked at

    from cbtm_pipeline.inference.metrics import Metrics
    from cbtm_pipeline.inference.requests import Limits
    from cbtm_pipeline.inference.server import Service, create_app
    from cbtm_pipeline.inference.worker import Worker

    limits = Limits(
        args.max_tokens,
        args.max_prompt_tokens,
        args.timeout_s,
        args.concurrency,
        args.queue,
        args.max_body_kib * 1024,
    )
    ensemble = loaded.load(folder, args.name or folder.resolve().name, **where.without(args))
    metrics = Metrics()
    worker = Worker(ensemble, limits, metrics)
    app = create_app(Service(ensemble, worker, limits), metrics, key)
    config = uvicorn.Config(
        app,
        http="h11",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(limits.timeout_s) + GRACE_S,
    )
    host, port = sock.getsockname()[:2]
    n_experts, shown = len(ensemble.model.names), f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    cli.log.info("serving %s (%d experts) at %s", ensemble.name, n_experts, url, extra=cli.NEWS)
    asyncio.run(run(uvicorn.Server(config), worker, sock))
    cli.log.info("stopped", extra=cli.NEWS)


def number(option: str, text: str, least: float, most: float, kind: type) -> Any:
    """The value of an option. Raises ValueError if it is no number from `least` to `most`."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        expected = f"Expected a {'whole ' if kind is int else ''}number from {least} to {most}"
        raise ValueError(f"{option}: {text!r}. {expected}. Change it.")
    return value


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where.add_options(p)
    where.add_exclude(p)
    p.add_argument("--name", help="the model's name for clients; default: the name of its folder")
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; all but this machine need a key"
    )
    p.add_argument("--port", metavar="N", default="8000", help="port; 0 takes a free one (8000)")
    p.add_argument(
        "--api-key", metavar="KEY", help=f"key of clients; better set {KEY}, which no list of processes shows"
    )
    p.add_argument("--max-tokens", metavar="N", default="2048", help="tokens of an answer at most (2048)")
    p.add_argument(
        "--max-prompt-tokens", metavar="N", default="8192", help="tokens of a prompt at most (8192)"
    )
    p.add_argument(
        "--timeout-s", metavar="N", default="300", help="seconds in the queue, and again to compute (300)"
    )
    p.add_argument("--concurrency", metavar="N", default="4", help="requests that take turns (4)")
    p.add_argument(
        "--queue", metavar="N", default="64", help="further requests that wait; others get 429 (64)"
    )
    p.add_argument("--max-body-kib", metavar="N", default="1024", help="KiB of a request at most (1024)")
    p.add_argument("--log", type=Path, help="also write the log lines to this file")
    args = p.parse_args()
    for option, bounds in NUMBERS.items():
        name = option.strip("-").replace("-", "_")
        setattr(args, name, number(option, getattr(args, name), *bounds))
    check_extra()
    cli.start_logging("serve", args.log)
    start(args)


if __name__ == "__main__":
    cli.run(main)
