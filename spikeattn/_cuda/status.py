"""Whether CuPy can compile and launch here and, if not, why and what helps."""

from functools import cache
from importlib.util import find_spec

import torch

from spikeattn._compile import constant


@constant
def status() -> tuple[bool, str]:
    """Return ``(usable, reason)``; found out once a process."""
    return _status()


@cache
def _status() -> tuple[bool, str]:
    major = (torch.version.cuda or "12").partition(".")[0]
    cure = f'(pip install "spikeattn[cuda{major}]")'
    if find_spec("cupy") is None:
        return False, f"cupy is not installed {cure}"
    try:
        import cupy
        from cuda.pathfinder import find_nvidia_header_directory
    except (ImportError, OSError) as error:
        return False, f"cupy is installed and does not import: {_first_line(error)} {cure}"
    if not torch.cuda.is_available():
        return False, "PyTorch finds no CUDA device"
    try:
        version = cupy.cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:  # the library is looked for at its first call
        return False, f"cupy finds no NVRTC: {_first_line(error)} {cure}"
    if cupy.cuda.get_cuda_path() is None and find_nvidia_header_directory("cudart") is None:
        return False, f"cupy finds no CUDA headers and compiles nothing without them {cure}"
    return True, f"CuPy {cupy.__version__}, NVRTC {'.'.join(map(str, version))}"


def _first_line(error: Exception) -> str:
    """What went wrong, without CuPy's page of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =\n")]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
