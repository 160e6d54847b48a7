"""Compiled kernels, one for each program, entry point and device."""

import threading
from typing import Any

from spikeattn._cuda.source import OPTIONS, Program, assemble

_lock = threading.Lock()
_kernels: dict[tuple[Program, str, int], Any] = {}


def get_kernel(program: Program, name: str, device: int) -> Any:
    """Return the entry point ``name`` of ``program`` on the current device, number ``device``.

    The first use in a process compiles, or reads what an earlier process compiled from CuPy's cache on disk.
    """
    key = (program, name, device)
    kernel = _kernels.get(key)
    if kernel is None:
        import cupy

        with _lock:  # two threads that meet here would compile the same module twice
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = cupy.RawModule(code=assemble(program), options=OPTIONS).get_function(name).kernel
                _kernels[key] = kernel
    return kernel
