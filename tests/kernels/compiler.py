"""Compile programs by NVRTC, which needs no device."""

import re
from typing import NamedTuple

from spikeattn._cuda.source import OPTIONS, Program, assemble


class Report(NamedTuple):
    """What ptxas says of one entry point."""

    registers: int
    spilled: int  # bytes of stores and loads
    stack: int  # bytes


def compile_program(program: Program, architecture: str) -> dict[str, Report]:
    """Reports by entry point; an error of the compiler is the message of the assertion."""
    from cupy.cuda import nvrtc

    handle = nvrtc.createProgram(assemble(program), "program.cu", (), ())
    # -ftz=true as CuPy adds it.
    options = (*OPTIONS, f"-arch={architecture}", "-ftz=true", "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(handle, options)
    except nvrtc.NVRTCError:
        raise AssertionError(nvrtc.getProgramLog(handle)) from None
    log = nvrtc.getProgramLog(handle)
    assert nvrtc.getCUBIN(handle)
    nvrtc.destroyProgram(handle)
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, log, flags=re.DOTALL)
    assert found, log
    return {name: Report(int(used), int(out) + int(back), int(stack)) for name, stack, out, back, used in found}
