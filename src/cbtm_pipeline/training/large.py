"""The large dense model: an expert's model with more layers, trained from scratch for as many FLOPs.

Width, heads and feed-forward stay, and the number of layers is multiplied. So all parameters but those of the
token table and of the last norm are multiplied by the same number. With two, the model has about the
parameters of two active experts. A transformer's shape matters little beside its size (Kaplan et al. 2020,
section 3.1).
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from cbtm_pipeline.plan import LargePlan
from cbtm_pipeline.training import model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Large(NamedTuple):
    """An untrained large model, and the steps of its training."""

    net: "PreTrainedModel"
    n_steps: int


def scratch(plan: LargePlan, vocab_size: int, separator_id: int) -> Large:
    """The untrained model, on the device that torch makes tensors on. Raises what model.scratch raises."""
    about = vocab_size, separator_id, plan.seq_len, plan.rng_seed
    with torch.device("meta"):
        small = model.scratch(plan.scratch, *about)
    n_layers = plan.depth * small.config.get_text_config().num_hidden_layers
    net = model.scratch({**plan.scratch, "num_hidden_layers": n_layers}, *about)
    costs = (model.flops_per_token(one, plan.seq_len) for one in (small, net))
    return Large(net, equal_steps(plan.n_steps, *costs))


def equal_steps(n_steps: int, small: float, large: float) -> int:
    """How many steps of a model cost the FLOPs of `n_steps` of another one, rounded; at least one.

    `small` and `large` are the FLOPs of a token, for the other model and for this one.
    """
    return max(1, round(n_steps * small / large))
