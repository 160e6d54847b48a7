"""How kernels are compiled, and when a compiled kernel on disk is still the right one."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numba

from spikeattn._backends import say_once

# "numpy": a float division never raises, so it vectorises. No fastmath: it would change bits.
_OPTIONS = {"nogil": True, "error_model": "numpy"}

# For a function that belongs into the loop of its caller, where constant flags then fold away.
inline = partial(numba.njit, forceinline=True, **_OPTIONS)


def _sources() -> str:
    """Digest of this folder, of which every kernel holds a part.

    numba compares the file of the kernel itself only, so a change to a helper would go unnoticed. A kernel holds the
    digest in its closure, which is part of the key under which numba keeps it.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


SOURCES = int(_sources()[:15], 16)  # an integer, since compiled code holds it


def kernel(function: Callable[..., None]) -> Any:
    """Compile ``function`` at its first call, and keep the result on disk (``NUMBA_CACHE_DIR`` says where)."""
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError as error:  # numba found no folder that it may write to
        say_once(f"compiled kernels are not kept on disk ({error}); set NUMBA_CACHE_DIR to a folder to keep them")
        return numba.njit(**_OPTIONS)(function)


def with_derivative(compiled: Any, derivative_row: Any) -> Any:
    """The kernel ``compiled`` with another `derivative_row`; only in memory, since it holds a user's function."""
    own = compiled.py_func
    names = {**own.__globals__, "derivative_row": derivative_row}
    return numba.njit(**_OPTIONS)(FunctionType(own.__code__, names, own.__name__, None, own.__closure__))
