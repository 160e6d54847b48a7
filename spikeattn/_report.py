"""What is installed, and which backend each operation takes here and why."""

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from spikeattn._backends import Backend, backend_status
from spikeattn.ops.event_linear.op import event_linear_kernels_take
from spikeattn.ops.lif.op import lif_kernels_take
from spikeattn.ops.norm_lif.op import norm_lif_kernels_take
from spikeattn.ops.surrogate import ATan

_PACKAGES = ("spikeattn", "torch", "spikingjelly", "numba", "cupy-cuda12x", "cupy-cuda13x", "numpy")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TAKES: dict[str, Callable[[Backend, Tensor], tuple[bool, str]]] = {
    "lif": lambda name, x: lif_kernels_take(name, x, ATan()),
    "norm_lif": lambda name, x: norm_lif_kernels_take(name, x, ATan()),
    "spiking_attention": lambda name, x: lif_kernels_take(name, x, ATan()),
    "event_linear": event_linear_kernels_take,
}


def backend_report(x: Tensor | None = None) -> str:
    """Say which backend each operation takes here, and why not the others.

    Args:
        x: An input to ask about, [T, *N] or [T, *N, D]; None asks for every device of this machine and every dtype.

    Returns:
        Lines of text: versions, devices and threads, then an operation, device and dtype a line with what ``"auto"``
        takes and, after it, each backend that it passes over with the reason.

    Example:
        >>> print(backend_report(torch.zeros(4, 8, dtype=torch.float64)).splitlines()[2])
        lif, cpu, float64: torch (numba: float64 runs on the plain definition)
    """
    asked = [torch.empty(1, 1, 1, dtype=dtype, device=device) for device in _devices() for dtype in _DTYPES]
    inputs = asked if x is None else [x]
    lines = [
        f"Python {platform.python_version()}, " + ", ".join(f"{name} {found}" for name, found in _versions().items()),
        f"devices: {', '.join(_devices().values())}",
    ]
    lines += [_line(op, own) for op in _TAKES for own in inputs]
    return "\n".join(lines)


def _line(op: str, x: Tensor) -> str:
    """What "auto" takes for ``x``, and why not what it prefers."""
    refused = []
    for name, usable, reason in backend_status(x.device):
        if usable and name != "torch":
            usable, reason = _TAKES[op](name, x)
        if usable:
            taken = name
            break
        refused.append(f"{name}: {reason}")
    why = f" ({'; '.join(refused)})" if refused else ""
    return f"{op}, {x.device.type}, {str(x.dtype).removeprefix('torch.')}: {taken}{why}"


def _devices() -> dict[str, str]:
    """Devices of this machine, in words; with "cuda" the current one."""
    devices = {"cpu": f"CPU, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        devices["cuda"] = f"{', '.join(names)} (CUDA {torch.version.cuda})"
    return devices


def _versions() -> dict[str, str]:
    """Versions of what matters and is installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
