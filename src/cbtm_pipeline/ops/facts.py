"""What the checks of `cbtm doctor` have found so far. Each check leaves here what later ones need."""

from dataclasses import dataclass, field
from typing import NamedTuple

from cbtm_pipeline.config import Config
from cbtm_pipeline.ops import cost, site
from cbtm_pipeline.ops.planned import PlannedJob
from cbtm_pipeline.slurm import commands

TIMEOUT_S = 10.0  # of a Slurm command


class Tokens(NamedTuple):
    """What a model has to know of a tokenizer: its size, the separator, and rows that the embedding needs."""

    vocab_size: int
    separator_id: int
    n_ids: int


@dataclass
class Facts:
    """The command line's `configfiles` and `profile`, and what follows from them.

    None or empty: not known (yet).
    """

    configfiles: list[str]
    profile: str | None
    config: Config | None = None
    jobs: list[PlannedJob] = field(default_factory=list)  # that go to Slurm
    slurm: dict[str, str] = field(default_factory=dict)  # Slurm's configuration
    partitions: dict[str, dict[str, str]] = field(default_factory=dict)
    nodes: list[site.Nodes] = field(default_factory=list)
    machine: cost.Machine | None = None  # of a training
    tokens: Tokens | None = None  # of a pretrained tokenizer
    model: cost.Size | None = None
    n_dimensions: int | None = None  # of the vectors of an encoder
    write_rate: float = 0.0  # bytes/s under outdir


def ask(*command: str) -> str:
    """The output of a Slurm command. Raises what commands.ask raises."""
    return commands.ask(*command, timeout_s=TIMEOUT_S)
