"""The tasks of eval.tasks: what a user's task file holds, what it consists of, and whether it can be run.

A task file is a YAML file of lm-evaluation-harness. Its identity covers the file, the files that it includes,
the Python files of its `!function` entries, and the local data files that it names, all by content. Relative
paths in it are relative to the file itself.
"""

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cbtm_pipeline.base import artifact, read_yaml
from cbtm_pipeline.corpus import patterns as globs
from cbtm_pipeline.plan_tasks import is_file

PACKAGE = "lm_eval"


class Function(NamedTuple):
    """A function that a task file names as `!function module.name`. `path`: the file beside it, if any."""

    path: Path
    module: str
    name: str


class TaskFile(NamedTuple):
    """The content of a task file, data files by absolute path, and all local files that it consists of."""

    content: dict[str, Any]
    files: list[Path]


def check(tasks: Sequence[str]) -> None:
    """Raise ValueError if tasks are asked for and cannot be run here. Names are not looked up."""
    if not tasks:
        return
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(
            "eval.tasks: lm-evaluation-harness is not installed. Expected it for tasks. "
            "Run pip install 'cbtm-pipeline[tasks]'."
        )
    names = [Path(task).name if is_file(task) else task for task in tasks]
    names += [read(Path(task)).content["task"] for task in tasks if is_file(task)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"eval.tasks: {twice} twice. Expected each task once. Rename or remove one.")


def check_names(tasks: Iterable[str]) -> None:
    """Raise ValueError for a name that lm-evaluation-harness does not have. Takes seconds."""
    names = [task for task in tasks if not is_file(task)]
    if not names:
        return
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise ValueError(
                f"eval.tasks: {name}. Expected a task of lm-evaluation-harness, or a .yaml file. "
                f"Did you mean {near}?"
            )


def identities(tasks: Iterable[str]) -> dict[str, str]:
    """The identity of each task that is a file, as an input of rule `eval_task`."""
    return {f"task-{Path(task).name}": _identity(Path(task)) for task in tasks if is_file(task)}


def _identity(path: Path) -> str:
    return artifact.fingerprint([artifact.identity(file) for file in read(path).files])


def read(path: Path) -> TaskFile:
    """Read a task file. Raises ValueError if it is none, or if a file that it names is missing."""
    content, files = _read(path, ())
    if not isinstance(content.get("task"), str):
        raise ValueError(
            f"{path}: no key task. Expected a task of lm-evaluation-harness with its name. Add it."
        )
    arguments = content.get("dataset_kwargs") or {}
    if "data_files" in arguments:
        data: list[Path] = []
        found = _data_files(arguments["data_files"], path, data)
        content = {**content, "dataset_kwargs": {**arguments, "data_files": found}}
        files += data
    return TaskFile(content, files)


def _read(path: Path, including: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """The content of a task file over that of the files which it includes, and the files."""
    try:
        content = read_yaml.read(path, _loader(path.parent), "a task file")
    except FileNotFoundError:
        raise ValueError(
            f"eval.tasks: {path}: no such file. Expected a task file. Correct the path."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: no keys. Expected a task of lm-evaluation-harness. Mend the file.")
    merged: dict[str, Any] = {}
    files = [path, *(f.path for f in _functions(content) if f.path.exists())]
    included = content.pop("include", [])
    for name in included if isinstance(included, list) else [included]:
        other = (path.parent / str(name)).resolve()
        if other in including:
            raise ValueError(f"{path}: includes itself by {name}. Expected another file. Mend the file.")
        base, more = _read(other, (*including, other))
        merged |= base
        files += more
    return {**merged, **content}, files


def _loader(folder: Path) -> type[read_yaml.Loader]:
    """A loader of YAML that knows `!function`."""

    class Loader(read_yaml.Loader):
        pass

    def function(loader: yaml.SafeLoader, node: Any) -> Function:
        module, _, name = str(loader.construct_scalar(node)).rpartition(".")
        return Function(folder / f"{module.replace('.', '/')}.py", module, name)

    Loader.add_constructor("!function", function)
    return Loader


def _functions(value: Any) -> list[Function]:
    """All functions in a content, in order."""
    if isinstance(value, Function):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [function for v in values for function in _functions(v)]


def _data_files(value: Any, path: Path, found: list[Path]) -> Any:
    """The same data files by absolute path; those on this machine are added to `found`."""
    if isinstance(value, dict):
        return {name: _data_files(v, path, found) for name, v in value.items()}
    if isinstance(value, list):
        return [_data_files(v, path, found) for v in value]
    if "://" in str(value):
        return value
    exact = (path.parent / str(value)).resolve()
    files = [str(exact)] if exact.is_file() else list(map(str, globs.match(exact)))
    if not files:
        raise ValueError(
            f"{path}: {value}: no such file. Expected a data file, relative to the task file. "
            "Correct dataset_kwargs.data_files."
        )
    found += map(Path, files)
    return files[0] if len(files) == 1 else files


def with_functions(value: Any, load: Callable[[Function], Any]) -> Any:
    """A content with what `load` makes of its functions."""
    if isinstance(value, Function):
        return load(value)
    if isinstance(value, dict):
        return {name: with_functions(v, load) for name, v in value.items()}
    return [with_functions(v, load) for v in value] if isinstance(value, list) else value
