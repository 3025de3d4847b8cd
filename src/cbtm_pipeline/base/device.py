"""The device that models compute on."""

import torch


def best() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def move(net: torch.nn.Module) -> torch.device:
    """Move a model to the best device, and return that device."""
    device = best()
    torch.nn.Module.to(net, device)
    return device
