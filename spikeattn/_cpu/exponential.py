"""The exponential of the surrogates."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spikeattn._cpu.compiler import inline

F = np.float32
_SHIFT = F(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, which the lowest bits then hold
_ONE = np.int32(127 << 23)  # the bits of 1.0, or the exponent of 0 in its place


@intrinsic
def multiply_add(context, a, b, c):
    """``a * b + c`` in float32, rounded once where the processor has an instruction for it."""

    def codegen(context, builder, signature, args):
        number = ir.FloatType()
        kind = ir.FunctionType(number, [number] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.f32"), args)

    return types.float32(*[types.float32] * 3), codegen


@inline
def exp2(t):
    """2^t of t <= 0, within 1 ulp; 0 below -125, so that no slope is subnormal, which takes a hundred times longer.

    2^t = 2^n 2^f with n the nearest integer; the polynomial of 2^f errs least, relatively, among those that are 1 at 0.
    """
    shifted = t + _SHIFT
    f = t - (shifted - _SHIFT)
    p = F(0.00015353309)
    p = multiply_add(p, f, F(0.0013398939))
    p = multiply_add(p, f, F(0.009618438))
    p = multiply_add(p, f, F(0.055503324))
    p = multiply_add(p, f, F(0.24022648))
    p = multiply_add(p, f, F(0.69314718))
    p = multiply_add(p, f, F(1.0))
    power = np.int32((F(shifted).view(np.int32) << np.int32(23)) + _ONE).view(F)
    return F(0.0) if t < F(-125.0) else p * power
