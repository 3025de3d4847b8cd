# Jobs run `python -m cbtm_pipeline.<rule>` with the sources of this checkout. Their Python is the one that runs Snakemake;
# with --sdm conda it is the Python of the conda environment.
import os
import sys
from pathlib import Path

SOURCES = f"{workflow.basedir}/../src"
sys.path.insert(0, SOURCES)


def before(first, name):
    return os.pathsep.join(filter(None, [str(first), os.environ.get(name)]))


os.environ.update(
    PATH=before(Path(sys.executable).parent, "PATH"),
    PYTHONPATH=before(SOURCES, "PYTHONPATH"),
)
