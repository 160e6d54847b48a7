"""Assemble one translation unit from the shared device code, an op's kernels and what is known at compile time."""

from functools import cache
from importlib.resources import files
from typing import NamedTuple

# Never contract a * b + c, nor relax a division: the definition of an op promises bits.
OPTIONS = ("--std=c++17", "--fmad=false")


class Program(NamedTuple):
    """What one compiled module is made from.

    Compile-time constants instead of arguments, because 16-bit kernels have about 20 instructions for each neuron and
    step before arithmetic costs more than memory; one text instead of templates, because the emulator of the tests
    sets the same names at run time and so covers every combination with one build.
    """

    op: str  # folder below spikeattn/ops
    direction: str  # "forward" or "backward", or another part of an op that is compiled alone
    storage: str  # "f32", "f16" or "bf16"
    constants: tuple[tuple[str, int], ...]
    derivative: str | None = None  # of a custom surrogate: a C expression of `float x`


@cache
def assemble(program: Program) -> str:
    """Return the whole source: CuPy's cache on disk covers text and options, but no included file."""
    package = files("spikeattn")
    lines = [f"#define SPK_STORAGE {program.storage}", f"#define SPK_{program.direction.upper()}"]
    lines += [f"#define SPK_CUSTOM_DERIVATIVE ({program.derivative or '0.0f'})"]
    lines += [f"constexpr int {name} = {value};" for name, value in program.constants]
    folder = f"ops/{program.op}"
    others = sorted(file.name for file in package.joinpath(folder).iterdir() if file.name.endswith(".cu"))
    others.remove("kernels.cu")  # comes first: it holds what the others share
    for path in ("_cuda/spikeattn.cuh", f"{folder}/kernels.cu", *(f"{folder}/{name}" for name in others)):
        code = package.joinpath(path).read_text(encoding="utf-8").replace("#pragma once\n", "\n")
        lines += [f'#line 1 "spikeattn/{path}"', code]
    return "\n".join(lines)
