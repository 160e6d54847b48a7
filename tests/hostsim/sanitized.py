"""The kernels under the address and undefined-behaviour sanitizers, on a small table; run by test_sanitized.py."""

import sys
from pathlib import Path

import torch
from emulator import Emulator
from kernel_cases import DTYPES, Neuron, check_attention, check_lif, check_norm_lif

import spikeattn.ops.lif.cuda as lif
import spikeattn.ops.norm_lif.cuda as norm_lif
import spikeattn.ops.spiking_attention.cuda as attention
import spikeattn.ops.spiking_attention.cuda_plans as attention_plans

FLAGS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")

if __name__ == "__main__":
    emulator = Emulator(Path(sys.argv[1]), flags=FLAGS, stack=256 * 1024)
    lif.launch = norm_lif.launch = attention.launch = emulator.launch
    lif.BUSY_THREADS = 1  # so that few neurons, too, are loaded 16 bytes each
    attention_plans.BUSY_WARPS = norm_lif.BUSY_WARPS = 1
    for dtype in DTYPES:
        for T in (1, 7, 33, 161):
            for N in (1, 33, 40):
                check_lif(T, N, dtype=dtype, tensor_tau=N == 33, static=T == 7)
        lif.lif_forward_cuda(torch.randn(3, 33).to(dtype), torch.zeros(33), None, 3, *Neuron().forward(), True, True)
        for size in ((1, 1, 1), (5, 3, 33), (60, 2, 300), (69, 2, 256), (4, 2, 520), (3, 1, 1030)):
            check_norm_lif(*size, dtype=dtype, static=size[0] == 5)
        for fire, order in (("output", "map_first"), ("output", "state_first"), ("map", "auto")):
            check_attention(2, 2, 1, 5, 33, 33, fire=fire, order=order, dtype=dtype, masked=True)
    for fire, order in (("output", "map_first"), ("output", "state_first"), ("map", "auto")):
        check_attention(1, 1, 1, 1, 1, 1, fire=fire, order=order)
        check_attention(2, 1, 1, 3, 7, 128, fire=fire, order=order)
        check_attention(1, 1, 1, 70, 70, 9, fire=fire, order=order, causal=True)
        check_attention(2, 1, 1, 3, 7, 33, fire=fire, order=order, masked=True, odd=1)
    print("clean")
