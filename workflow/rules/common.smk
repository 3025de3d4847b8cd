# What all steps share: the validated config, the experts, the environment of the jobs.
import os
import sys
from pathlib import Path

SOURCES = f"{workflow.basedir}/../src"
sys.path.insert(0, SOURCES)

from cbtm_pipeline import config as schema
from cbtm_pipeline import plan
from cbtm_pipeline.base import lock
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.slurm import request


# Jobs run `python -m cbtm_pipeline.<rule>` with the Python that runs Snakemake (in a conda environment, --sdm conda, with the environment's)
# and with the sources beside this file.
def before(first, name):
    return os.pathsep.join(filter(None, [str(first), os.environ.get(name)]))


os.environ.update(
    PATH=before(Path(sys.executable).parent, "PATH"),
    PYTHONPATH=before(SOURCES, "PYTHONPATH"),
)

try:
    CONFIG = schema.validate(config)
    CORPUS_FILES = corpus_files.find(CONFIG.corpus.train, CONFIG.corpus.eval)
except (ValueError, OSError) as error:
    sys.exit(f"{error}")

OUT = CONFIG.outdir.rstrip("/")
RUN_CONFIG = f"{OUT}/config.json"
CONDA = f"{workflow.basedir}/../envs/cbtm.yaml"
EXPERTS = ["seed", *plan.experts(CONFIG)]
MANIFESTS = {
    "corpus": f"{OUT}/shards/manifest.json",
    "clusters": f"{OUT}/assignments/manifest.json",
    "random": f"{OUT}/random/manifest.json",
}


def parameters(rule, expert=None):
    """A rule's plan as JSON text. Snakemake compares it with that of the last run."""
    return plan.depends_on(CONFIG, rule, expert)


def expert_inputs(wildcards):
    """The data and the seed model of an expert; the seed itself starts from nothing."""
    inputs = {
        "data": MANIFESTS[plan.data_of(wildcards.expert)[0]],
        "tokenizer": f"{OUT}/tokenizer/tokenizer.json",
    }
    if wildcards.expert != "seed":
        inputs["seed_model"] = f"{OUT}/experts/seed/model.safetensors"
    return inputs


def state_folder(wildcards):
    """Where a training keeps its resumable state."""
    return f"{OUT}/work/{wildcards.expert}"


def beside(paths, name):
    """The files of this name in the folders of `paths`."""
    return [str(Path(path).with_name(name)) for path in paths]


def launch(rule, name=None, state_folder=None):
    """What a rule's command begins with: nothing here, a launcher where the profile names a Slurm partition for the rule.

    As it depends on threads and resources, Snakemake leaves it out when it compares parameters: a profile never reruns anything.
    """

    def prefix(wildcards, input, output, threads, resources):
        expert = wildcards.get("expert")
        return request.command_line(
            name=f"{name}-{expert}" if name else rule,
            folder=f"{OUT}/slurm",
            resources=dict(resources.items()),
            threads=threads,
            depends_on=parameters(rule, expert),
            inputs=input,
            outputs=output,
            work=state_folder(wildcards) if state_folder else None,
        )

    return prefix
