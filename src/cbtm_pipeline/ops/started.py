"""What a start of the workflow knows of each of its runs: one, or all those of a study."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from cbtm_pipeline import config, plan
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.inference import harness
from cbtm_pipeline.provenance import chosen, lent, records, stale
from cbtm_pipeline.provenance.stale import Asked, Job, Start

MANIFESTS = {
    "corpus": "shards/manifest.json",
    "clusters": "assignments/manifest.json",
    "parents": "assignments/manifest.json",
    "first": "assignments/manifest.json",
    "random": "random/manifest.json",
}


class Run:
    """A run with its config, the files of its corpus and the state of its jobs.

    `lenders` are the runs of a study that lend outputs to this one, by job. Raises ValueError or OSError
    for what the user has to mend.
    """

    def __init__(self, cfg: config.Config):
        self.config = cfg
        self.out = str(Path(cfg.outdir))  # Snakemake warns of double slashes in names
        self.corpus_files = corpus_files.find(cfg.corpus.train, cfg.corpus.eval, cfg.outdir)
        self.states = stale.look(cfg)
        harness.check_at_start(cfg, self.states)
        self.task_models = stale.task_models(cfg)
        self.producers = {output: job for job in self.states for output in job.outputs}
        self.lenders: Mapping[Job, Run] = {}
        self._start: Start | None = None

    @cached_property
    def experts(self) -> list[str]:
        """Ids of the models that are scored and compared."""
        return plan.evaluated(self.config)

    @cached_property
    def trained(self) -> list[str]:
        """Ids of all models: those that are compared, and those that experts begin as."""
        return plan.trained(self.config)

    @cached_property
    def trainings(self) -> list[str]:
        """Ids of the jobs of rule train_expert. Experts whose rate is searched are there as candidates."""
        return list(plan.trainings(self.config))

    @cached_property
    def searched(self) -> dict[str, list[str]]:
        """The kinds of models whose rate is searched, with their models."""
        return plan.searched(self.config)

    @property
    def adopted(self) -> list[str]:
        """The experts that a chosen candidate becomes."""
        return [name for names in self.searched.values() for name in names]

    @property
    def folders(self) -> list[str]:
        """The folders below experts/."""
        return plan.folders(self.config)

    @property
    def reads_demo(self) -> bool:
        return corpus_files.DEMO in self.corpus_files

    @property
    def unspoken(self) -> list[str]:
        """Files of the corpus that Snakemake does not hear of: it replaces {x} and <x> in names of inputs."""
        return [path for path in self.corpus_files if set(path) & set("{}<>")]

    @property
    def spoken(self) -> list[str]:
        """The other files of the corpus."""
        return [path for path in self.corpus_files if path not in self.unspoken]

    @property
    def clusterings(self) -> list[str]:
        """The manifests that the evaluation reads."""
        random = [self.manifest("random")] if plan.random_experts(self.config) else []
        return [self.manifest("clusters"), *random]

    @property
    def clusters(self) -> dict[str, str]:
        """The manifest of the clusters, their clusterer and their terms, below the outdir."""
        if self.config.cluster.second_round:
            names = records.PLACES["second_round"].outputs
        else:
            names = (MANIFESTS["clusters"], *records.PLACES["fit_kmeans"].outputs)
        return dict(zip(("assignments", "clusterer", "top_terms"), names, strict=True))

    def manifest(self, data: plan.Data) -> str:
        """The manifest of the documents that a training reads, below the outdir."""
        return self.clusters["assignments"] if data == "clusters" else MANIFESTS[data]

    def path(self, name: str) -> str:
        """A file of the run, by its path below the outdir."""
        return f"{self.out}/{name}"

    def begin(self, asked: Asked) -> Start:
        """Decide which jobs the start runs. Later calls change nothing."""
        self._start = self._start or stale.start(self.config, self.states, asked)
        return self._start

    @property
    def start(self) -> Start:
        assert self._start is not None, "Snakemake has not asked for the corpus yet"
        return self._start

    def runs(self, job: Job) -> bool:
        """Whether this start runs a job."""
        return job in self.start.run

    def produces(self, name: str) -> bool:
        """Whether this start makes an output."""
        return self.runs(self.producers[name])

    def outdated(self) -> list[str]:
        """The outputs that are there and are made again."""
        outputs = (self.path(output) for job in self.start.run for output in job.outputs)
        return [output for output in outputs if Path(output).exists()]

    def lender(self, rule: str, expert: str | None = None) -> "Run | None":
        """The run whose outputs a job of this start takes, if they fit."""
        job = Job(rule, expert)
        if rule == lent.DEMO_RULE:
            return self.lenders.get(job)
        if chosen.is_adopted(self.config, rule, expert):  # nothing is saved: it is a link
            return None
        return self.lenders.get(job) if self.runs(job) and job not in self.start.anew else None
