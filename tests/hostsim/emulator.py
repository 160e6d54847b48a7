"""Build the emulator, and launch plans on it where `spikeattn._cuda.launch.launch` would use a device."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import torch

import spikeattn
from spikeattn._cuda.launch import Argument, LaunchPlan, check_limits, typed
from spikeattn._cuda.source import Program

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-g", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# The derivative of ATan at alpha 2, as a user would spell it for a kernel.
CUSTOM = "1.0f / (1.0f + (3.14159274f * x) * (3.14159274f * x))"
STORAGES = ("f32", "f16", "bf16")


def in_memory(args: list[Argument]) -> list[ctypes.Array]:
    """Arguments as CuPy hands them over: 8 bytes of an int, 4 of a float32."""
    values = [value if isinstance(value, np.float32) else np.int64(value) for value in typed(args)]
    return [ctypes.create_string_buffer(value.tobytes()) for value in values]


class Emulator:
    """Kernels compiled for the CPU, one library for each storage type."""

    def __init__(self, folder: Path, *, flags: tuple[str, ...] = ("-O1",), stack: int = 64 * 1024):
        package = Path(spikeattn.__file__).parent
        self.libraries = {}
        self.reversed = False
        builds = []
        for storage in STORAGES:
            library = folder / f"{storage}.so"
            command = ["g++", *FLAGS, *flags, f"-I{package}", f"-DSPK_STORAGE={storage}", f"-DHOSTSIM_STACK={stack}"]
            command += [f"-DSPK_CUSTOM_DERIVATIVE=({CUSTOM})", str(HERE / "exports.cpp"), "-o", str(library)]
            builds.append((storage, library, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        for storage, library, build in builds:
            _, messages = build.communicate()
            assert build.returncode == 0, messages
            self.libraries[storage] = ctypes.CDLL(str(library))

    def launch(self, plan: LaunchPlan, program: Program, args: list[Argument], device: torch.device) -> None:
        """Take the place of `spikeattn._cuda.launch.launch`."""
        check_limits(plan)
        assert all(arg.is_contiguous() for arg in args if isinstance(arg, torch.Tensor))
        assert program.derivative in (None, CUSTOM)
        library = self.libraries[program.storage]
        for name, value in program.constants:
            assert library.hostsim_set(name.encode(), value), f"exports.cpp does not declare {name}"
        held = in_memory(args)
        params = (ctypes.c_void_p * len(held))(*[ctypes.addressof(value) for value in held])
        entry = getattr(library, f"hostsim_{plan.kernel}")
        entry.restype = ctypes.c_char_p
        sizes = [(ctypes.c_uint * 3)(*size) for size in (plan.grid, plan.block)]
        problem = entry(*sizes, plan.shared_bytes, params, len(held), int(self.reversed))
        assert problem is None, f"{plan.kernel}: {problem.decode()}"
