"""How kernels are compiled and called, and when a compiled kernel on disk is still the right one.

A kernel is a C function of one pointer, so that no thread needs the interpreter. What it points to is a `Frame`.
"""

import ctypes
import hashlib
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spikeattn._backends import say_once

# "numpy": a float division never raises, so it vectorises. No fastmath: it would change bits.
_OPTIONS = {"nogil": True, "error_model": "numpy"}

_WORD, _BYTES, _LINE = ir.IntType(64), ir.IntType(8).as_pointer(), 64

# For a function that belongs into the loop of its caller, where constant flags then fold away.
inline = partial(numba.njit, forceinline=True, **_OPTIONS)
helper = partial(numba.njit, **_OPTIONS)


def sources() -> list[Path]:
    """The files that kernels are made of: this folder, and the ``cpu*.py`` of the operations."""
    package = Path(__file__).parent.parent
    return sorted([*package.glob("_cpu/*.py"), *package.glob("ops/*/cpu*.py")])


def _digest() -> str:
    """Digest of the `sources`, of which every kernel holds a part.

    numba compares the file of the kernel itself only, so a change to a helper would go unnoticed. A kernel holds the
    digest in its closure, which is part of the key under which numba keeps it.
    """
    digest = hashlib.sha256()
    for file in sources():
        digest.update(file.read_bytes())
    return digest.hexdigest()


SOURCES = int(_digest()[:15], 16)  # an integer, since compiled code holds it


class Frame:
    """The arguments of a kernel in memory, by name: ``integers`` (and addresses), then ``floats`` in double."""

    _HEAD = ("next_piece", "finished_pieces", "pieces", "blocks")

    def __init__(self, integers: str, floats: str = "") -> None:
        self.names = (*integers.split(), *floats.split())
        self._struct = struct.Struct(f"{len(self._HEAD) + len(integers.split())}q{len(floats.split())}d")
        fields = [(name, np.int64) for name in (*self._HEAD, *integers.split())]
        self.record = np.dtype(fields + [(name, np.float64) for name in floats.split()])

    def pack(self, pieces: int, blocks: int, arguments: dict[str, float]) -> ctypes.Array:
        """The memory that a kernel gets."""
        frame = ctypes.create_string_buffer(self._struct.size)
        self._struct.pack_into(frame, 0, 0, 0, pieces, blocks, *[arguments[name] for name in self.names])
        return frame

    def finished(self, frame: ctypes.Array) -> int:
        """How many pieces are done."""
        return self._struct.unpack_from(frame)[1]


class Kernel:
    """A compiled kernel. It takes piece after piece of the blocks until none is left, on any number of threads at once.

    Args:
        function: Of a pointer to a frame; asks `next_blocks` for what to do.
        frame: What the pointer points to.
        keep: Whether to keep the result on disk (``NUMBA_CACHE_DIR`` says where).
    """

    def __init__(self, function: Callable[..., None], frame: Frame, keep: bool = True) -> None:
        self.function, self.frame = function, frame
        compile_with = partial(numba.cfunc, types.void(types.voidptr), error_model="numpy")
        try:
            compiled = compile_with(cache=keep)(function)
        except RuntimeError as error:  # numba found no folder that it may write to
            say_once(f"compiled kernels are not kept on disk ({error}); set NUMBA_CACHE_DIR to a folder to keep them")
            compiled = compile_with()(function)
        self.address, self.call = compiled.address, compiled.ctypes

    def with_derivative(self, derivative_row: Any) -> "Kernel":
        """The same with another `derivative_row`; only in memory, since it holds a user's function."""
        own = self.function
        names = {**own.__globals__, "derivative_row": derivative_row}
        return Kernel(FunctionType(own.__code__, names, own.__name__, None, own.__closure__), self.frame, keep=False)


def as_pointer(builder: Any, address: Any, kind: Any) -> Any:
    """An int64 as a pointer, wherever it is inlined.

    Numba compiles a function to machine code before another inlines it, and on that way LLVM writes an address as an
    offset from null. Unless null may be valid, it then takes a read or write there for impossible, and drops it.
    """
    set.add(builder.function.attributes, "null_pointer_is_valid")  # llvmlite does not know it, LLVM does
    return builder.inttoptr(address, kind)


@intrinsic
def _fetch_add(context, pointer, index, number):
    """Add ``number`` to the int64 at ``pointer[index]`` and return what was there: atomic."""

    def codegen(context, builder, signature, args):
        first = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", builder.gep(first, [args[1]]), args[2], "seq_cst")

    return types.int64(types.voidptr, types.int64, types.int64), codegen


@intrinsic
def _pointer(context, address):
    """An int64 as a pointer."""

    def codegen(context, builder, signature, args):
        return as_pointer(builder, args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@inline
def memory(address, size, dtype):
    """``size`` elements from ``address`` on."""
    return numba.carray(_pointer(address), size, dtype)


@intrinsic
def _malloc(context, nbytes):
    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(_BYTES, [_WORD])
        block = builder.call(cgutils.get_or_insert_function(builder.module, kind, "malloc"), args)
        return builder.ptrtoint(block, _WORD)

    return types.int64(types.int64), codegen


@intrinsic
def _free(context, address):
    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_BYTES])
        block = as_pointer(builder, args[0], _BYTES)
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "free"), [block])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@inline
def _allocate(nbytes):
    """The address of ``nbytes`` from the start of a cache line on; in front of it stands where their block begins."""
    block = _malloc(nbytes + 2 * _LINE)
    if block == 0:
        raise MemoryError
    first = (block + 2 * _LINE - 1) // _LINE * _LINE
    memory(first - 8, 1, np.int64)[0] = block
    return first


@inline
def allocate(rows, columns):
    """float32 memory of [rows, columns], from the start of a cache line on, until it is given to `release`.

    An array of numba's own counts its references, and so do its slices: atomic steps, which took longer than arithmetic
    on short rows.
    """
    return numba.carray(_pointer(_allocate(4 * rows * columns)), (rows, columns), np.float32)


@inline
def allocate_words(rows, columns):
    """The same of unsigned 64-bit words."""
    return numba.carray(_pointer(_allocate(8 * rows * columns)), (rows, columns), np.uint64)


@inline
def release(array):
    """Free what `allocate` returned."""
    _free(memory(array.ctypes.data - 8, 1, np.int64)[0])


@inline
def next_blocks(frame, pieces, blocks, finished):
    """The next blocks to work on, ``(first, last)``, empty at the end; ``finished`` pieces are counted as done."""
    _fetch_add(frame, 1, finished)
    piece = _fetch_add(frame, 0, 1)
    if piece >= pieces:
        return 0, 0
    return blocks * piece // pieces, blocks * (piece + 1) // pieces
