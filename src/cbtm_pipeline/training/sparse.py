"""What is special about a mixture-of-experts model: experts that a token does not use, a loss of the router.

Here, experts are feed-forwards inside one model. They have nothing to do with the experts of this project.
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the classes of transformers call the number of experts of a layer that read a token.
_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # what they call the weight of the router's loss
_TOLERANCE = 1e-4  # relative: both losses are computed in float32, in another order


def n_idle_parameters(net: "PreTrainedModel") -> int:
    """The number of parameters that a token does not use, because they belong to experts that do not read it.

    It is 0 for a dense model, and for one whose number of active experts has a name that is not known.
    """
    config = net.config.get_text_config()
    active = next((n for name in _ACTIVE if isinstance(n := getattr(config, name, None), int)), None)
    if active is None:
        return 0
    idle = 0
    for module in net.modules():
        if not type(module).__name__.endswith("Experts"):
            continue
        own = list(module.parameters(recurse=False))
        # the experts of a layer are stacked: the first dimension counts them, also in the biases
        n_experts = {p.shape[0] for p in own if p.ndim == 3}
        of_experts = [p for p in own if p.ndim >= 2 and p.shape[0] in n_experts]
        idle += sum(p.numel() - p.numel() * min(active, p.shape[0]) // p.shape[0] for p in of_experts)
    return idle


def router_loss_weight(net: "PreTrainedModel", where: str) -> float:
    """The weight of the router's auxiliary loss in the model's own loss; 0 if its config does not ask for it.

    This is tried out: the model's own loss on a few tokens has to be the sum. Raises ValueError, which names
    `where`, if it is not.
    """
    config = net.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    weight = next((float(w) for name in _COEFFICIENTS if (w := getattr(config, name, None)) is not None), 0.0)
    device = net.device
    if device.type == "meta":
        return weight
    ids_1T = (torch.arange(8, device=device) % config.vocab_size)[None]
    was_training = net.training
    try:
        with torch.inference_mode():
            out: Any = net.eval()(input_ids=ids_1T, labels=ids_1T, use_cache=False)
    finally:
        net.train(was_training)
    plain = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), ids_1T[0, 1:])
    router = router_loss(out)
    expected = plain + (0 if router is None else weight * router)
    if not torch.isclose(out.loss.float(), expected.float(), rtol=_TOLERANCE):
        raise ValueError(
            f"{where}: output_router_logits is true, and its loss {float(out.loss):.4f} has a part that is "
            f"not known. Expected {float(expected):.4f}, with the router's loss. Set output_router_logits to "
            "false in its config."
        )
    return 0.0 if router is None else weight


def router_loss(out: Any) -> torch.Tensor | None:
    """The router's auxiliary loss in a model's output; None for a model that has none."""
    found = getattr(out, "aux_loss", None)
    return found if isinstance(found, torch.Tensor) else None
