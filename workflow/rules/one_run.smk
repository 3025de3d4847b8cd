# The run of a config: RUNS holds it under no name, and OUT is its folder. study.smk has many runs instead.
import sys


include: "environment.smk"


from cbtm_pipeline import config as schema
from cbtm_pipeline.base import cli, read_yaml
from cbtm_pipeline.ops import planned, started

try:
    for path in [DEFAULTS, *workflow.overwrite_configfiles]:
        # a key that stands twice is an error, which Snakemake does not see
        read_yaml.read(path)
    planned.check_given_once(sys.argv)
    GIVEN = planned.merge(config, planned.given(workflow.config_settings.config_args))
    RUNS = {"": started.Run(schema.validate(GIVEN))}
except (ValueError, OSError) as error:
    sys.exit(cli.explain(error))

OUT = RUNS[""].out
WHOLE = {"all"}  # targets that stand for all runs
