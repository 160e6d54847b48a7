"""Which backends exist, whether each is usable here, and if not why."""

import logging
from typing import Literal, NamedTuple

import torch

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


def backend_status(device: torch.device | str) -> list[BackendStatus]:
    """List the backends in the order in which ``"auto"`` prefers them on ``device``.

    Args:
        device: Where the tensors live.

    Returns:
        One `BackendStatus` a backend, the fastest first.
    """
    not_here = "this version has no {} kernels yet"
    fused: list[BackendStatus] = []
    if torch.device(device).type == "cuda":
        fused.append(BackendStatus("cupy", *cuda_status()))
    else:
        fused.append(BackendStatus("numba", False, not_here.format("fused CPU")))
    return [*fused, BackendStatus("torch", True, "plain PyTorch, any device")]


_said: set[str] = set()


def say_once(message: str, level: int = logging.INFO) -> None:
    """Log a message the first time it comes up; a graph under compilation says nothing."""
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        logger.log(level, message)


def resolve_backend(backend: Backend, device: torch.device, op: str) -> Backend:
    """Turn ``backend`` into the name of the one that runs; an explicit name never falls back."""
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    statuses = backend_status(device)
    if backend == "auto":
        chosen = next(status for status in statuses if status.usable)
        refused = [f"{s.name}: {s.reason}" for s in statuses if not s.usable]
        level = logging.WARNING if device.type == "cuda" else logging.INFO  # where a fused kernel is expected
        why = "; ".join(refused) or chosen.reason
        say_once(f'{op}: backend "auto" takes "{chosen.name}" on {device.type} ({why})', level)
        return chosen.name
    for status in statuses:
        if status.name == backend:
            if status.usable:
                return backend
            reason = status.reason
            break
    else:
        reason = f"it does not run on {device.type} tensors"
    raise BackendUnavailableError(f'{op}: backend "{backend}" is not usable: {reason}. Use backend="auto" or "torch".')
