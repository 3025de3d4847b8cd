# What the workflows of commands share: the request and the config that the command has left in its folder, and how a rule starts.
include: "rules/environment.smk"


from cbtm_pipeline import config as schema
from cbtm_pipeline.base import artifact, cli, lock
from cbtm_pipeline.corpus import content
from cbtm_pipeline.ops import snakemake_run, terminal
from cbtm_pipeline.slurm import request

try:
    CONFIG = schema.validate(config)
    ASKED = artifact.read_sealed(
        f"{CONFIG.outdir}/{snakemake_run.REQUEST}", snakemake_run.KIND
    )
except (ValueError, OSError) as error:
    sys.exit(cli.explain(error))

OUT = CONFIG.outdir
NAME = Path(OUT).name
RUN_CONFIG = f"{OUT}/config.json"
CONDA = f"{workflow.basedir}/../envs/cbtm.yaml"
# The request holds the identities of all that is read. Times of files decide nothing.
REQUEST = ancient(f"{OUT}/{snakemake_run.REQUEST}")

terminal.be_brief(logger, workflow.output_settings)


def launch(rule, name=None, state_folder=None):
    """The Slurm launcher that a rule's command begins with, if the profile names a partition for the rule."""

    def prefix(wildcards, input, output, threads, resources):
        expert = wildcards.get("expert")
        return request.command_line(
            name=f"{name}-{expert}" if name else f"{rule}-{NAME}",
            folder=f"{OUT}/slurm",
            resources=dict(resources.items()),
            threads=threads,
            depends_on=artifact.fingerprint(ASKED),
            inputs=input,
            outputs=output,
            work=state_folder,
        )

    return prefix


onstart:
    try:
        lock.hold(OUT)
    except ValueError as error:
        sys.exit(cli.explain(error))
