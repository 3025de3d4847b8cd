"""A study: a grid of settings, each a run of its own, and what these runs share.

study.yaml has four keys:

    base     config files that all runs begin with, laid over config.yaml
    outdir   the folder of the study; run NAME has its ordinary results in <outdir>/runs/NAME
    grid     for each config key the values to try, such as {cluster.k: [1, 2], train.steps: [200, 800]}
    runs     further runs by name, each with the keys in which it differs from the base

Two runs share a job's outputs if the job has the same plan in both, and so have all jobs that it reads from.
The plan knows every parameter of a job, so `keys` follows from it alone. One run, the lender, makes the
outputs; the others take them from its folder (provenance/lent.py).

Snakemake's Paramspace makes names and wildcards of settings, too. Its columns have to be identifiers, which
`cluster.k` is not, and each run needs a value in every column, which `runs` do not have.
"""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline import config, plan
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.mixture import comparison_table
from cbtm_pipeline.ops import planned
from cbtm_pipeline.ops.started import Run
from cbtm_pipeline.ops.which_run import RUNS
from cbtm_pipeline.provenance import stale
from cbtm_pipeline.provenance.lent import DEMO_RULE, LENT
from cbtm_pipeline.provenance.stale import Job, States

KEYS = ("base", "outdir", "grid", "runs")
NAME = r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,99}"  # of a run: a name of a folder
NAMES = "at most 100 letters, digits and . _ = , + -, a letter or a digit first"
Setting = dict[str, Any]  # values by config key, such as `cluster.k`


class Study(NamedTuple):
    """A study as its file gives it, with the setting of each run."""

    outdir: str
    base: list[str]
    settings: dict[str, Setting]  # by name of the run

    def folder(self, name: str) -> str:
        """The outdir of a run."""
        return f"{self.outdir}/{RUNS}/{name}"


def read(content: Any) -> Study:
    """The study that a file describes. Raises ValueError for a wrong key or value."""
    if not isinstance(content, Mapping):
        raise ValueError(f"study: {_show(content)}. Expected the keys {', '.join(KEYS)}. Correct the file.")
    for key in content:
        if key not in KEYS:
            raise ValueError(
                f"{key}: unknown key of a study. Expected {', '.join(KEYS)}. Put keys of config.yaml into a "
                "file that base names, or into grid."
            )
    base, outdir = content.get("base") or [], content.get("outdir")
    if not isinstance(outdir, str) or not outdir.strip():
        raise ValueError(f"outdir: {_show(outdir)}. Expected a folder for the study. Name one.")
    base = [base] if isinstance(base, str) else base
    if not isinstance(base, list) or not all(isinstance(path, str) for path in base):
        raise ValueError(f"base: {_show(base)}. Expected a list of config files. Correct the file.")
    of_grid, of_runs = _of_grid(content.get("grid") or {}), _of_runs(content.get("runs") or {})
    if both := of_grid.keys() & of_runs.keys():
        raise ValueError(
            f"runs.{min(both)}: also the name of a run of the grid. Expected a name of its own. Rename it."
        )
    if not of_grid and not of_runs:
        raise ValueError("grid: nothing to try. Expected keys with their values. Add grid or runs.")
    return Study(str(Path(outdir)), base, {**of_grid, **of_runs})


def _of_grid(grid: Any) -> dict[str, Setting]:
    """Every combination of the values, by its name. The last key changes fastest."""
    if not isinstance(grid, Mapping):
        raise ValueError(f"grid: {_show(grid)}. Expected values by config key. Correct the file.")
    for key, values in grid.items():
        _check_key(f"grid.{key}", key)
        _check_values(f"grid.{key}", key, values)
    short, found = comparison_table.short_keys(list(grid)), {}
    for values in itertools.product(*grid.values()) if grid else ():
        name = ",".join(f"{key}={slug(value)}" for key, value in zip(short, values, strict=True))
        if name in found or not re.fullmatch(NAME, name):
            fault = "the name of two runs" if name in found else "no name of a folder"
            raise ValueError(
                f"grid: {name}: {fault}. Expected one name for each combination, of {NAMES}. Name these runs "
                "yourself, under runs."
            )
        found[name] = _flat("grid", dict(zip(grid, values, strict=True)))
    return found


def _check_values(where: str, key: str, values: Any) -> None:
    """Refuse what is no list of values to try."""
    if isinstance(values, Mapping):
        todo = f"Write {key}.{next(iter(values), 'KEY')}: [...] for each key"
    elif isinstance(values, list):
        todo = "List one, or remove the key"
    else:
        todo = f"Write [{_show(values)}]" if isinstance(values, int | float) else "List them in brackets"
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: {_show(values)}. Expected a list of the values to try. {todo}.")
    for i, value in enumerate(values):
        if any(value == other and type(value) is type(other) for other in values[:i]):
            raise ValueError(f"{where}: {_show(value)}: twice. Expected each value once. Remove one.")


def _flat(where: str, setting: Mapping[Any, Any]) -> Setting:
    """The values of a setting by dotted key. A section and a dotted key must not give the same one."""
    found: Setting = {}
    for given, value in setting.items():
        values = planned.flat({given: value}) if isinstance(given, str) else {given: value}
        for key, one in values.items():
            _check_key(f"{where}.{key}", key)
            within = [
                other for other in found if f"{other}.".startswith(f"{key}.") or key.startswith(f"{other}.")
            ]
            if within:
                raise ValueError(
                    f"{where}.{key}: also given by {within[0]}. Expected each key once. Remove one."
                )
            found[key] = one
    return found


def _of_runs(runs: Any) -> dict[str, Setting]:
    """The runs that have names of their own. A setting may be written in sections, as in config.yaml."""
    if not isinstance(runs, Mapping):
        raise ValueError(f"runs: {_show(runs)}. Expected keys by name of the run. Correct the file.")
    found = {}
    for name, setting in runs.items():
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise ValueError(f"runs: {_show(name)}. Expected a name of {NAMES}. Rename it.")
        if not isinstance(setting, Mapping | None):
            raise ValueError(f"runs.{name}: {_show(setting)}. Expected config keys. Correct the file.")
        found[name] = _flat(f"runs.{name}", setting or {})
    return found


def _check_key(where: str, key: Any) -> None:
    """Refuse what is no key of the config, and the outdir, which the study sets."""
    if not isinstance(key, str) or key == "outdir" or not re.fullmatch(r"[^.]+(\.[^.]+)*", key):
        raise ValueError(
            f"{where}: not for a run. Expected a key of config.yaml, such as cluster.k. Remove it."
        )


def slug(value: Any) -> str:
    """A value as a part of a name: `2`, `0.008`, `dense-steps+random`."""
    if isinstance(value, list):
        return "+".join(map(slug, value)) or "none"
    if isinstance(value, int | float):
        return json.dumps(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.") or "none"


def configs(study: Study) -> dict[str, config.Config]:
    """The config of each run. Raises ValueError for a wrong key or value, with the name of the run."""
    base = planned.read_config(planned.config_files(study.base))
    found = {}
    for name, setting in study.settings.items():
        content = planned.merge(base, planned.nested(setting)) | {"outdir": study.folder(name)}
        try:
            found[name] = config.validate(content)
        except ValueError as error:
            of_base, files = _faults(base), ", ".join(study.base) or planned.DEFAULT
            faults = str(error).splitlines()
            lines = [f"{files if fault in of_base else f'run {name}'}: {fault}" for fault in faults]
            raise ValueError("\n".join(lines)) from None
    _check_differ(found)
    _check_held_out(found)
    return found


def _faults(content: Any) -> list[str]:
    """What is wrong with a config."""
    try:
        config.validate(content)
    except ValueError as error:
        return str(error).splitlines()
    return []


def _check_differ(found: Mapping[str, config.Config]) -> None:
    """Refuse two runs with the same settings: a value may be written in two ways."""
    seen: list[tuple[str, config.Config]] = []
    for name, cfg in found.items():
        same = cfg.model_copy(update={"outdir": ""})
        if other := next((other for other, of_other in seen if of_other == same), None):
            raise ValueError(
                f"run {name}: the settings of run {other}. Expected different settings. Remove one of them."
            )
        seen.append((name, same))


def _check_held_out(found: Mapping[str, config.Config]) -> None:
    """Refuse runs that would report on other text than the first, before anything is trained for them."""
    (first_name, first), *others = found.items()
    for name, cfg in others:
        about, of_first = _held_out(cfg), _held_out(first)
        if key := next((key for key in about if about[key] != of_first[key]), None):
            raise ValueError(
                f"run {name}: another {key} changes the held-out text. Expected the same for all runs, as "
                "others cannot be compared. Make a study of its own for each."
            )
        if not _have_different_tokenizers(first, cfg):
            continue
        what = f"run {name}: another tokenizer than that of {first_name}"
        if (most := cfg.eval.max_document_tokens) is not None:
            raise ValueError(
                f"{what}, so the first {most} tokens of a document are another text. Expected whole "
                "documents. Set eval.max_document_tokens to null for all runs."
            )
        if cfg.corpus.shard_bytes != first.corpus.shard_bytes:
            raise ValueError(
                f"{what}, and another corpus.shard_bytes. Expected the same shards, whose hashes show that "
                "the held-out text is the same. Give all runs one corpus.shard_bytes."
            )


def _have_different_tokenizers(a: config.Config, b: config.Config) -> bool:
    """Whether two runs have different tokenizers. Two that are not trained here may be the same."""
    first, second = plan.tokenizer(a), plan.tokenizer(b)
    if first.source and second.source:
        return False
    corpora = [[cfg.corpus.train, cfg.corpus.eval] for cfg in (a, b)]
    return first.content() != second.content() or corpora[0] != corpora[1]


def _held_out(cfg: config.Config) -> dict[str, Any]:
    """The config values that decide which text is held out, and which part of it is scored."""
    c = cfg.corpus
    named: dict[str, Any] = {
        f"corpus.{key}": getattr(c, key) for key in ("eval", "text_field", "txt_documents")
    }
    if c.eval is None:
        named |= {"corpus.train": c.train, "corpus.eval_fraction": c.eval_fraction}
    return {**named, "eval.max_document_tokens": cfg.eval.max_document_tokens}


def runs(study: Study) -> dict[str, Run]:
    """The runs of a study. Raises ValueError as `configs` does."""
    return {name: Run(cfg) for name, cfg in configs(study).items()}


def lend(runs: Mapping[str, Run]) -> None:
    """Tell each run which others lend it outputs, as soon as all know what this start runs."""
    if len(runs) == 1:
        return
    by_run = {name: keys(run.config) for name, run in runs.items()}
    states = {name: run.states for name, run in runs.items()}
    lent = lenders(by_run, states, {name: set(run.start.run) for name, run in runs.items()})
    for name, run in runs.items():
        run.lenders = {job: runs[other] for job, other in lent[name].items()}


def keys(cfg: config.Config) -> dict[Job, str]:
    """What each job of a run depends on, as a hash: its plan, and those of all that it reads from."""
    uses_demo = corpus_files.DEMO in [*cfg.corpus.train, *(cfg.corpus.eval or [])]
    found = {Job(DEMO_RULE): ""} if uses_demo else {}
    for job, inputs in stale.jobs(cfg).items():
        # the plan leaves out paths, as the content behind them counts; that is not read here
        corpus = [cfg.corpus.train, cfg.corpus.eval] if job.rule in stale.OF_CORPUS else []
        found[job] = artifact.fingerprint(
            [str(job), plan.content(cfg, *job), corpus, [found[read] for read in inputs]]
        )
    return found


def lenders(
    keys: Mapping[str, Mapping[Job, str]], states: Mapping[str, States], started: Mapping[str, set[Job]]
) -> dict[str, dict[Job, str]]:
    """For each run, the run that lends it a job's outputs, by job; nothing where it makes them itself.

    The lender is the first run in whose folder the outputs are up to date, else the first that makes them in
    this start. `started` has the jobs of the start: a run that no target needs makes nothing for others.
    """
    owner: dict[str, str] = {}
    for is_made in (True, False):
        for name, by_job in keys.items():
            for job, key in by_job.items():
                state = states[name].get(job)
                is_there = bool(state and not state.runs)
                is_made_now = job in started[name] or (job.rule == DEMO_RULE and bool(started[name]))
                if job.rule in LENT and (is_there if is_made else is_made_now):
                    owner.setdefault(key, name)
    return {
        name: {job: owner[key] for job, key in by_job.items() if owner.get(key, name) != name}
        for name, by_job in keys.items()
    }


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
