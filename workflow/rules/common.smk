# What all rules share: the validated config, the experts, the environment of the jobs.
import os
import sys
from pathlib import Path

SOURCES = f"{workflow.basedir}/../src"
sys.path.insert(0, SOURCES)

from cbtm_pipeline import config as schema
from cbtm_pipeline import plan
from cbtm_pipeline.base import lock
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.ops import terminal
from cbtm_pipeline.slurm import request


# Jobs run `python -m cbtm_pipeline.<rule>` with the sources of this checkout. Their Python is the one that runs Snakemake;
# with --sdm conda it is the Python of the conda environment.
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
EXPERTS = plan.trained(CONFIG)
MANIFESTS = {
    "corpus": f"{OUT}/shards/manifest.json",
    "clusters": f"{OUT}/assignments/manifest.json",
    "random": f"{OUT}/random/manifest.json",
}


def parameters(rule, expert=None):
    """A rule's plan as JSON text. Snakemake compares it with the plan of the last run."""
    return plan.depends_on(CONFIG, rule, expert)


def expert_inputs(wildcards):
    """The data, the tokenizer and the seed model of an expert. The seed itself has no seed model."""
    inputs = {
        "data": MANIFESTS[plan.data_of(wildcards.expert)[0]],
        "tokenizer": f"{OUT}/tokenizer/tokenizer.json",
    }
    if wildcards.expert != "seed":
        inputs["seed_model"] = f"{OUT}/experts/seed/model.safetensors"
    return inputs


def state_folder(wildcards):
    """The folder in which a training keeps its resumable state."""
    return f"{OUT}/work/{wildcards.expert}"


def beside(paths, name):
    """For each path, the file called `name` in the same folder."""
    return [str(Path(path).with_name(name)) for path in paths]


def launch(rule, name=None, state_folder=None):
    """What a rule's command begins with: a launcher if the profile names a Slurm partition for the rule, else nothing.

    Because it depends on threads and resources, Snakemake does not compare it with the last run. So a profile never reruns anything.
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
