"""The checks of `cbtm doctor` that need no Slurm: the config, the pretrained models, the files, the disk."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cbtm_pipeline.base import hub, trust
from cbtm_pipeline.config import Config, validate
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.ops import cost, facts, file_systems, planned
from cbtm_pipeline.ops.facts import Facts
from cbtm_pipeline.ops.finding import Line

ASSUMED_DIMENSIONS = 768  # of an encoder that is not here yet


class Pretrained(NamedTuple):
    """A model by its local folder or its name on the hub, at a revision (None: the main branch)."""

    name: str
    revision: str | None

    @property
    def local(self) -> bool:
        return Path(self.name).is_dir()

    @property
    def folder(self) -> Path | None:
        return hub.local_folder(self.name, self.revision)


def check_config(f: Facts) -> Iterator[Line]:
    """Whether the config is valid and its corpus is there."""
    paths = planned.config_files(f.configfiles)
    config = validate(planned.read_config(paths))
    files = corpus_files.find(config.corpus.train, config.corpus.eval, config.outdir)
    corpus_files.n_bytes(corpus_files.name([Path(file) for file in files if file != corpus_files.DEMO]))
    f.config = config
    corpus = f"{len(files)} corpus files" if len(files) > 1 else files[0]
    text = cost.units(sum(cost.corpus(config)), "B")
    yield "ok", f"config: {' + '.join(paths)}; {corpus}, about {text} of text"


def pretrained(config: Config) -> tuple[Pretrained | None, Pretrained | None, Pretrained | None]:
    """The seed model, the tokenizer and the encoder, where these are pretrained."""
    m, t, e = config.model, config.tokenizer, config.embed
    model = Pretrained(m.pretrained, m.revision) if m.pretrained else None
    tokenizer = Pretrained(t.pretrained, t.revision) if t.pretrained else model
    return model, tokenizer, Pretrained(e.encoder, e.revision) if e.encoder else None


def check_model(f: Facts) -> Iterator[Line]:
    """Whether the rules that fetch the tokenizer and the seed model will have them.

    Also finds the model's size.
    """
    if f.config is None:
        return
    model, tokenizer, _ = pretrained(f.config)
    for source in dict.fromkeys(source for source in (model, tokenizer) if source):
        needs = {"train_expert": hub.lacks_weights} if source == model else {}
        needs |= {"tokenizer": hub.lacks_tokenizer} if source == tokenizer else {}
        yield _can_be_had(f, source, needs)
    folder = model.folder if model else None
    if not (model and hub.lacks_weights(folder)):
        f.model = cost.size(f.config, folder, f.tokens.vocab_size if f.tokens else None)
        yield "ok", f"model: {cost.units(f.model.n_parameters)} parameters"


def check_tasks(f: Facts) -> Iterator[Line]:
    """Whether the tasks of eval.tasks are known, and those that are files make tasks."""
    if f.config is None or not f.config.eval.tasks:
        return
    from cbtm_pipeline.inference import harness  # only here: few runs have tasks

    harness.check(f.config.eval.tasks)
    yield "ok", f"tasks: {', '.join(f.config.eval.tasks)}"


def check_folder(f: Facts) -> Iterator[Line]:
    """Whether others may write to the outdir, from which Slurm's jobs run code."""
    if f.config is None:
        return
    outdir = Path(f.config.outdir)
    if f.profile is not None:
        trust.refuse_open(outdir)
    line = trust.warning(outdir) if f.profile is not None else trust.local_warning(outdir)
    if line is not None:
        yield "warn", line


def check_encoder(f: Facts) -> Iterator[Line]:
    """Whether the rules `embed` and `route` will have the encoder. Also finds the size of its vectors."""
    encoder = pretrained(f.config)[2] if f.config else None
    if encoder is None:
        return
    from cbtm_pipeline.embedding import encoder_files  # imports torch

    f.n_dimensions = encoder_files.hidden_size(encoder.folder)
    yield _can_be_had(f, encoder, {"embed": encoder_files.lacks})


def _can_be_had(f: Facts, source: Pretrained, needs: dict[str, Callable[[Path | None], list[str]]]) -> Line:
    """Whether the rules that load a model find it.

    `needs`: for each rule, what lists the files that are missing.
    """
    name, folder, submitted = source.name, source.folder, {job.rule for job in f.jobs}
    lacks = {rule: missing for rule, missing_from in needs.items() if (missing := missing_from(folder))}
    if not lacks:
        hint = "; HF_HUB_OFFLINE=1 saves jobs without a network minutes of retries"
        fits = needs.keys() & submitted and not source.local and not os.environ.get("HF_HUB_OFFLINE")
        return "ok", f"{name}: in {folder}{hint if fits else ''}"
    files = [file for missing in lacks.values() for file in missing][:3]
    found = f"{name}: {folder or 'the cache'} lacks {', '.join(files)}"
    if source.local:
        return "FAIL", f"{found}. Expected a folder that transformers can load. Complete it"
    download = hub.advice(name, source.revision)
    if lacks.keys() & submitted:
        other = " again, or choose a model that has it" if folder else ""
        expected = "it there, as compute nodes may have no network"
        return "FAIL", f"{found}. Expected {expected}. Run {download}{other}"
    if problem := hub.problem(name, source.revision):
        return "FAIL", f"{found}, and {problem}. Expected one of the two. Correct the name, or run {download}"
    return "ok", f"{found}, but the hub has it; the run will fetch it"


def check_files(f: Facts) -> Iterator[Line]:
    """Whether compute nodes see what the jobs read and write, and what the file system of outdir can do."""
    if f.config is None:
        return
    outdir = Path(f.config.outdir)
    paths = {"outdir": outdir, "this folder": Path(), "Python": Path(sys.prefix)}
    names = corpus_files.find(f.config.corpus.train, f.config.corpus.eval, f.config.outdir)
    files = [Path(file).absolute() for file in names if file != corpus_files.DEMO]
    paths |= {"the corpus": Path(os.path.commonpath(files))} if files else {}
    on_the_hub = any(source and not source.local for source in pretrained(f.config))
    paths |= {"the hub's cache": hub.cache()} if on_the_hub else {}
    mounts = {name: file_systems.mount_of(path) for name, path in paths.items()}
    if f.jobs:
        hosts = facts.ask("sinfo", "--all", "--Node", "--noheader", "--format=%n").split() if f.slurm else []
        yield from file_systems.seen_by(hosts, mounts)
    probe = file_systems.probe(outdir)
    f.write_rate = probe.write_rate
    yield from file_systems.promises(outdir, mounts["outdir"], probe, bool(f.jobs))


def check_disk(f: Facts) -> Iterator[Line]:
    """Whether the disk under outdir has room for the run."""
    if f.config is None or f.model is None:
        return
    n_running = len(cost.n_tokens(f.config)) - 1 if f.jobs else 1  # all but the seed, which is trained first
    assumed = bool(f.config.embed.encoder) and not f.n_dimensions
    n_dimensions = f.n_dimensions or ASSUMED_DIMENSIONS
    if not f.config.embed.encoder:
        n_dimensions = f.config.embed.n_components
    parts = cost.disk(f.config, f.model, cost.corpus(f.config), n_dimensions, n_running)
    largest = max(parts, key=lambda name: parts[name])
    outdir, needed = Path(f.config.outdir), sum(parts.values())
    used, free = file_systems.used_bytes(outdir), shutil.disk_usage(file_systems.existing(outdir)).free
    mostly = f"mostly {largest} ({cost.units(parts[largest], 'B')})"
    what = f"disk: {cost.units(needed, 'B')}, {mostly}; {cost.units(free, 'B')} are free"
    if needed > free + used:
        todo = "Make room, change outdir, or lower slurm_jobs, which bounds the states"
        yield "FAIL", f"{what}. Expected room for all. {todo}"
    else:
        note = f", the encoder's vectors are taken to have {n_dimensions} numbers" if assumed else ""
        yield "ok", f"{what} (a quota is not seen{note})"
