"""Run tasks of lm-evaluation-harness on a folder of transformers, with the harness's stock model `hf`.

No code that comes with a model is run: `import cbtm_pipeline` has registered the class of ensembles. A task
file may have entries that the harness itself does not read, under `metadata.cbtm`:

    limit     the first so many test examples
    seeds     the task is run once for each of these seeds of the choice of shots, and the means are reported
    domain    string for domain-conditional PMI (label_scores.py)
"""

import contextlib
import importlib.util
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cbtm_pipeline import config
from cbtm_pipeline.base import cli
from cbtm_pipeline.base.errors import first_sentence
from cbtm_pipeline.plan_tasks import is_file
from cbtm_pipeline.provenance import stale, task_files
from cbtm_pipeline.provenance.task_files import Function

BATCH_SIZE = 8  # requests in one forward pass
BOOTSTRAP = 1000  # resamples, for metrics that are no means
SEED = 1234  # of the choice of shots, as in the harness
KEYS = {"limit", "seeds", "domain"}  # of metadata.cbtm

Row = dict[str, Any]


def evaluate(folder: Path, tasks: Sequence[str], **model_args: Any) -> list[Row]:
    """Run the tasks on the model in `folder`.

    `tasks` is the list eval.tasks; `model_args` go to from_pretrained. Returns a row for each task and
    metric: `task`, `metric`, `value`, `stderr` (None if there is none), `n_examples`, `n_shots`. Raises
    ValueError if the harness cannot do it.
    """
    with _quiet(), tempfile.TemporaryDirectory() as cache, _explained("eval.tasks", ValueError, OSError):
        return list(_rows(folder, tasks, Path(cache), model_args))


@contextlib.contextmanager
def _explained(where: str, *passed: type[Exception]) -> Iterator[None]:
    """Raise ValueError for whatever the harness raises: tasks are code and data of others."""
    try:
        yield
    except (MemoryError, *passed):
        raise
    except Exception as error:
        raise ValueError(
            f"{where}: {type(error).__name__}: {first_sentence(error)}. Expected tasks that "
            "lm-evaluation-harness can run. Correct or remove the task."
        ) from error


def check_at_start(cfg: config.Config, states: stale.States) -> None:
    """Check the tasks of a run before anything is trained for them, if any of them has to be run."""
    if any(job.rule == "eval_task" and state.runs for job, state in states.items()):
        check(cfg.eval.tasks)


def check(tasks: Sequence[str]) -> None:
    """Raise ValueError for a name that is unknown, and for a file that makes no task. Takes seconds.

    The data of tasks on the hub are not loaded.
    """
    task_files.check(tasks)
    with _quiet(), tempfile.TemporaryDirectory() as cache:
        task_files.check_names(tasks)
        for path in (Path(task) for task in tasks if is_file(task)):
            content = task_files.read(path).content
            own = _own_keys(path, content)
            with _explained(str(path)):
                content = task_files.with_functions(_cached(content, Path(cache)), _load_function)
                _try(content, own)


def _try(content: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Make the task, and the requests of its first example, if its data are here."""
    from lm_eval.api.task import TaskConfig

    if "class" in content:
        return
    if is_local(content):
        _task(content, own.get("domain"), None).build_all_requests(limit=1, rank=0, world_size=1)
    else:
        TaskConfig(**content)


def _cached(content: dict[str, Any], cache: Path) -> dict[str, Any]:
    """The content of a task file whose local data are cached in this folder only."""
    if not is_local(content):
        return content
    return {**content, "dataset_kwargs": {**content["dataset_kwargs"], "cache_dir": str(cache)}}


def _rows(folder: Path, tasks: Sequence[str], cache: Path, model_args: Mapping[str, Any]) -> Iterator[Row]:
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager

    from cbtm_pipeline.base import device  # imports torch, which a start of the workflow does not need

    settings: dict[str, Any] = {"device": str(device.best()), "dtype": "float32", "batch_size": BATCH_SIZE}
    model: Any = huggingface.HFLM  # its decorator hides its parameters
    lm = model(pretrained=str(folder), **settings, **model_args)
    names = [task for task in tasks if not is_file(task)]
    if names:
        yield from _run(lm, list(names), TaskManager(), SEED, None)
    for path in (Path(task) for task in tasks if is_file(task)):
        content = task_files.read(path).content
        own = _own_keys(path, content)
        content = task_files.with_functions(_cached(content, cache), _load_function)
        runs = []
        for seed in own.get("seeds", [SEED]):
            task = _task(content, own.get("domain"), lm)
            manager = TaskManager(include_defaults=False)
            runs.append(_run(lm, [task], manager, seed, own.get("limit")))
            cli.log.info("%s, shots of seed %s: %s", content["task"], seed, summary(runs[-1]))
        yield from mean_of_seeds(runs)


def is_local(content: Mapping[str, Any]) -> bool:
    """Whether a task's data are files that its task file names."""
    return "data_files" in (content.get("dataset_kwargs") or {})


def _own_keys(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """metadata.cbtm of a task file. Raises ValueError for keys that it does not have."""
    own = (content.get("metadata") or {}).get("cbtm") or {}
    if unknown := sorted(set(own) - KEYS):
        raise ValueError(
            f"{path}: metadata.cbtm.{unknown[0]}: unknown key. Expected {', '.join(sorted(KEYS))}. Remove it."
        )
    return own


def _task(content: dict[str, Any], domain: str | None, lm: Any) -> Any:
    """The task of a task file. Labels are scored in more ways than the harness does."""
    from lm_eval.api.task import ConfigurableTask

    from cbtm_pipeline.inference.label_task import LabelTask

    if "class" in content:
        return content["class"](config=content)
    if content.get("output_type") != "multiple_choice":
        return ConfigurableTask(config=content)

    def count_tokens(text: str) -> int:
        return len(lm.tok_encode(text, add_special_tokens=False)) if lm else 1

    return LabelTask(content, domain, count_tokens)


def _load_function(function: Function) -> Any:
    """The function of a task file: from the Python file beside it, else from an installed module."""
    if function.path.exists():
        spec = importlib.util.spec_from_file_location(function.module, function.path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(function.module)
    return getattr(module, function.name)


def _run(lm: Any, tasks: list[Any], manager: Any, seed: int, limit: int | None) -> list[Row]:
    """One call of the harness, as rows."""
    from lm_eval import evaluator

    simple_evaluate: Any = evaluator.simple_evaluate  # its decorator hides its parameters
    found = simple_evaluate(
        model=lm,
        tasks=tasks,
        limit=limit,
        task_manager=manager,
        fewshot_random_seed=seed,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
    )
    return rows_of(found)


def rows_of(found: Mapping[str, Any]) -> list[Row]:
    """The metrics of the harness's result. A metric of a filter is called `metric (filter)`."""
    rows = []
    for task, values in found["results"].items():
        about = {
            "n_examples": (found.get("n-samples", {}).get(task) or {}).get("effective"),
            "n_shots": found.get("n-shot", {}).get(task),
        }
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            name = metric if kind == "none" else f"{metric} ({kind})"
            stderr = _number(values.get(f"{metric}_stderr,{kind}"))
            rows.append({"task": task, "metric": name, "value": _number(value), "stderr": stderr, **about})
    return rows


def _number(value: Any) -> float | None:
    """A finite number, or None for what is none: the harness writes N/A where there is no error."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def mean_of_seeds(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of one task, run with several choices of shots, as their means.

    The squared standard error is the mean squared error over examples, which the runs share, plus the
    variance between the runs over their number.
    """
    rows = []
    for same in zip(*runs, strict=True):
        values = [row["value"] for row in same]
        errors = [row["stderr"] for row in same]
        if len(same) == 1 or None in values:
            rows.append(dict(same[0]))
            continue
        mean = math.fsum(values) / len(values)
        between = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        within = math.fsum(error**2 for error in errors) / len(errors) if None not in errors else None
        stderr = None if within is None else math.sqrt(within + between / len(values))
        rows.append({**same[0], "value": mean, "stderr": stderr})
    return rows


def summary(rows: Sequence[Row]) -> str:
    """The first metric of each task in one line."""
    first = {row["task"]: row for row in reversed(rows)}
    shown = [f"{name} {row['metric']} {_short(row['value'])}" for name, row in reversed(first.items())]
    return ", ".join(shown[:4]) + (f", and {len(shown) - 4} more" if len(shown) > 4 else "")


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log lines, warnings and bars. Our log has kept the stderr that it began with."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
