"""What `torch.compile` is told about functions of ours."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant(function: F) -> F:
    """Mark what returns the same every time, so that a graph under compilation holds its result.

    As ``torch.compiler.assume_constant_result``, which imports the whole compiler to set this attribute: seconds, for
    everyone who imports the package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
