"""Act at a counted event: right before the n-th call of some function. No clock decides when."""

import itertools
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


def at_call(n: int, counts: Callable[[CodeType], bool], act: Callable[[], Any]) -> Callable[[], int]:
    """Call `act` right before the n-th call of functions whose code `counts`, in this thread and in new ones.

    The result tells how many such calls there have been.
    """
    numbers, calls = itertools.count(1), [0]

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and counts(frame.f_code):
            calls[0] = number = next(numbers)  # one step of the interpreter, so threads get different numbers
            if number == n:
                act()

    threading.setprofile(profile)
    sys.setprofile(profile)
    return lambda: calls[0]


def in_training(code: CodeType) -> bool:
    """Any function of the package `training`."""
    return "/cbtm_pipeline/training/" in code.co_filename


def optimizer_step(code: CodeType) -> bool:
    """`step.update`, which runs once in each step."""
    return code.co_name == "update" and code.co_filename.endswith("/cbtm_pipeline/training/step.py")
