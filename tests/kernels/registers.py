"""Every kernel that is compiled in the tests, and what it was recorded to need.

python tests/kernels/registers.py     records again, after a change that is worth its registers
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import spikeattn.ops.lif.cuda as lif
import spikeattn.ops.norm_lif.cuda as norm_lif
import spikeattn.ops.spiking_attention.cuda as attention
from spikeattn._cuda.source import Program
from spikeattn.ops.spiking_attention.call import Inputs, Settings

RECORDED = Path(__file__).with_name("registers.json")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NEURON = (10.0, True, 1.0, 0.0)  # divides by tau, decays its input, resets hard: the longest arithmetic
GRADIENT = (False, "atan", 2.0)


def programs() -> Iterator[tuple[str, str, str, Program]]:
    """``(what, architecture, entry point, program)``: each entry point on each architecture at the sizes of SpikEmo,
    each storage and each size of a tile on sm_90; a program once."""
    seen = set()
    for case in _programs():
        if case[1:] not in seen:
            seen.add(case[1:])
            yield case


def _programs() -> Iterator[tuple[str, str, str, Program]]:
    for arch in ("sm_80", "sm_90", "sm_100"):
        for dtype in DTYPES:
            yield from _lif(arch, dtype, 8)
            yield from _lif(arch, dtype, 32, forward=False)
            yield from _norm_lif(arch, dtype, 256)
            yield from _norm_lif(arch, dtype, 4096)
            if arch == "sm_90" or dtype == torch.bfloat16:  # compiling them takes minutes
                yield from _attention(arch, dtype, 32, "output", "map_first", causal=True)
                yield from _attention(arch, dtype, 32, "map", "auto")
    for dtype in (torch.float32, torch.bfloat16):
        for T in (4, 16, 64, 128):
            yield from _lif("sm_90", dtype, T, forward=False)
        for D in (64, 512, 1024, 2048):
            yield from _norm_lif("sm_90", dtype, D)
    for E, causal in itertools.product((32, 64, 128), (False, True)):
        yield from _attention("sm_90", torch.float32, E, "output", "state_first", causal=causal)
    for E in (64, 128):
        yield from _attention("sm_90", torch.float32, E, "output", "map_first")
        yield from _attention("sm_90", torch.bfloat16, E, "output", "state_first", causal=True)
    for S in (512, 513):
        yield from _attention("sm_90", torch.float32, 128, "map", "auto", S=S)
    for T in (8, 16, 32, 64):
        yield from _lif("sm_90", torch.float32, T, forward=False, tensor_tau=True)


def _lif(arch: str, dtype: torch.dtype, T: int, forward: bool = True, tensor_tau: bool = False):
    x, v0 = _empty(T, 2**20, dtype=dtype), _empty(2**20)
    r_tau = _empty(()) if tensor_tau else None
    grad_v_seq = _empty(T, 2**20) if tensor_tau else None
    what = f"T={T}" + (" tensor tau, v_seq" if tensor_tau else "")
    if forward:
        yield from _captured(lif, what, arch, lif.lif_forward_cuda, x, v0, r_tau, T, *NEURON, False)
        yield from _captured(lif, "packed", arch, lif.lif_forward_cuda, x, v0, r_tau, T, *NEURON, False, True)
    yield from _captured(lif, what, arch, lif.lif_backward_cuda, x, v0, grad_v_seq, x, v0, r_tau, T, *NEURON, *GRADIENT)


def _norm_lif(arch: str, dtype: torch.dtype, D: int):
    R = 12_288
    x, v0, weight, mask = _empty(32, R, D, dtype=dtype), _empty(R, D), _empty(D), _empty(R, dtype=torch.bool)
    mean, inputs = _empty(32, R, 1), (x, weight, weight, mask, v0)
    forward, backward = norm_lif.norm_lif_forward_cuda, norm_lif.norm_lif_backward_cuda
    yield from _captured(norm_lif, f"D={D}", arch, forward, *inputs, 32, 1e-5, *NEURON)
    yield from _captured(norm_lif, f"D={D}", arch, backward, x, v0, *inputs, mean, mean, 32, *NEURON, *GRADIENT)


def _attention(arch: str, dtype: torch.dtype, E: int, fire: str, order: str, S: int = 110, causal: bool = False):
    """Both directions; programs are the same for many calls."""
    q, k = _empty(32, 64, 8, 110, E, dtype=dtype), _empty(32, 64, 8, S, E, dtype=dtype)
    what = f"E={E} S={S}" + (" causal" if causal else "") + (" state first" if order == "state_first" else "")
    masks = _empty(64, 110, dtype=torch.bool), _empty(64, S, dtype=torch.bool)
    tau, _, *potentials = NEURON
    call = (
        Inputs(q, k, k, _empty(1, 1, 1, 1, 1), *masks),
        Settings(fire, order, causal, tau, *potentials, *GRADIENT, "cupy"),
    )
    calls = [_captured(attention, what, arch, attention.attention_forward_cuda, *call)]
    calls.append(_captured(attention, what, arch, attention.attention_gradients_cuda, q, *call))
    for name, *rest in dict.fromkeys(case for call in calls for case in call):
        of_keys = ("kOfKeys", 1) in rest[-1].constants  # the other program of the same kernel
        yield name + (" of keys" if of_keys else ""), *rest


def _captured(module, what: str, arch: str, call, *args) -> Iterator[tuple[str, str, str, Program]]:
    """The program that a call would launch; the tensors have no memory."""
    launched = []
    launch, module.launch = module.launch, lambda plan, program, args, device: launched.append((plan, program))
    try:
        call(*args)
    finally:
        module.launch = launch
    for plan, program in launched:
        yield what, arch, plan.kernel, program


def _empty(*shape, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


if __name__ == "__main__":
    from compiler import compile_program
    from cupy.cuda import nvrtc

    table: dict[str, Any] = {"NVRTC": nvrtc.getVersion()}
    for what, arch, kernel, program in programs():
        (report,) = compile_program(program, arch).values()
        table.setdefault(f"{kernel} {what}", {})[arch] = report.registers
        print(kernel, what, arch, report)
    RECORDED.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
