"""Which backends exist, whether each is usable here, and if not why."""

import logging
import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from spikeattn._compile import constant
from spikeattn._cuda.status import status as cuda_status

logger = logging.getLogger("spikeattn")

Backend = Literal["auto", "torch", "numba", "cupy"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "numba", "cupy")


class SpikeattnError(Exception):
    """Base class of the errors that are particular to this package."""


class BackendUnavailableError(SpikeattnError):
    """A backend was named explicitly and cannot run here; the message says why and what helps."""


class BackendStatus(NamedTuple):
    """One backend on one device: whether it is usable and, if not, why."""

    name: Backend
    usable: bool
    reason: str


@constant
def why_no_numba() -> str:
    """Why numba cannot be used, with the cure; empty if it can."""
    try:
        import numba  # noqa: F401
    except (ImportError, OSError) as error:
        return f'numba cannot be imported ({error}); pip install --force-reinstall "numba>=0.61" mends it'
    return ""


def backend_status(device: torch.device | str) -> list[BackendStatus]:
    """List the backends in the order in which ``"auto"`` prefers them on ``device``.

    Args:
        device: Where the tensors live.

    Returns:
        One `BackendStatus` a backend, the fastest first.
    """
    fused: list[BackendStatus] = []
    kind = torch.device(device).type
    if kind == "cuda":
        fused.append(BackendStatus("cupy", *cuda_status()))
    elif kind == "cpu":
        broken = why_no_numba()
        fused.append(BackendStatus("numba", not broken, broken or "fused CPU kernels"))
    return [*fused, BackendStatus("torch", True, "plain PyTorch, any device")]


IMPORTED_BY = os.getpid()  # a process that was forked from it must not use PyTorch's OpenMP threads

_said: set[str] = set()


def say_once(message: str, level: int = logging.INFO) -> None:
    """Log a message the first time it comes up; a graph under compilation says nothing."""
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        logger.log(level, message)


def resolve_backend(
    backend: Backend, device: torch.device, op: str, takes: Callable[[Backend], tuple[bool, str]] | None = None
) -> Backend:
    """Turn ``backend`` into the name of the one that runs; an explicit name never falls back.

    Args:
        backend: What the caller asked for.
        device: Where the tensors live.
        op: For the messages.
        takes: Whether the kernels of a backend take this call, and if not why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "torch":
        return backend
    statuses = backend_status(device)
    refused: dict[str, str] = {}
    for name, usable, reason in statuses:
        if usable and name != "torch" and takes is not None:
            usable, refusal = takes(name)
            reason = refusal or reason
        if usable and backend == name:
            return name
        if usable and backend == "auto":
            why = "; ".join([f"{other}: {cause}" for other, cause in refused.items()]) or reason
            missing = not all(status.usable for status in statuses)  # a fused kernel is expected on every device
            message = f'{op}: backend "auto" takes "{name}" on {device.type} ({why})'
            say_once(message, logging.WARNING if missing else logging.INFO)
            return name
        refused[name] = reason
    reason = refused.get(backend, f"it does not run on {device.type} tensors")
    raise BackendUnavailableError(f'{op}: backend "{backend}" is not usable: {reason}. Use backend="auto" or "torch".')
