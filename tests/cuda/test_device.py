"""The CUDA kernels on a device: the cases of the emulator, and what only a device has."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import DYNAMICS, RATIONAL, SURROGATES, currents, ids
from kernel_cases import DTYPES, STEPS, WIDTHS, Neuron, assert_equal, check_attention, check_lif, check_norm_lif

from spikeattn import ATan, backend_status, lif, spiking_attention
from spikeattn._cuda.launch import launches
from spikeattn._cuda.module import _kernels
from spikeattn._cuda.source import OPTIONS, assemble
from spikeattn.ops.lif.cuda import lif_backward_cuda, lif_forward_cuda

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _kernels_ran():
    """A test of this file that launches nothing proves nothing."""
    usable, reason = backend_status("cuda")[0][1:]
    assert usable, reason
    before = launches.total()
    yield
    torch.cuda.synchronize()
    assert launches.total() > before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", STEPS)
def test_every_length_and_width_has_the_bits_of_the_definition(T, dtype):
    for N in (*WIDTHS, 2**18):
        check_lif(T, N, dtype=dtype, device="cuda", v_seq=N % 2 == 0, scalar_v0=N % 3 == 0)


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=ids)
def test_every_neuron_has_the_bits_of_the_definition(dynamics):
    neuron = Neuron(*dynamics)
    for surrogate in RATIONAL:
        check_lif(9, 33, neuron=neuron, surrogate=surrogate, device="cuda")
    check_lif(9, 33, neuron=neuron, v_seq=False, from_rest=True, device="cuda")
    check_norm_lif(9, 4, 40, neuron=neuron, from_rest=True, device="cuda")
    for static in (False, True):
        check_lif(9, 33, neuron=neuron, tensor_tau=True, static=static, device="cuda")
        check_norm_lif(9, 4, 40, neuron=neuron, static=static, device="cuda")


@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
def test_every_surrogate_is_as_near_to_float64_as_the_definition(surrogate):
    check_lif(7, 130, surrogate=surrogate, exact=surrogate in RATIONAL, device="cuda")
    check_norm_lif(6, 3, 70, surrogate=surrogate, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (32, 528, 256), (7, 40, 33), (26, 9, 513), (5, 3, 4096)], ids=ids)
def test_every_row_has_the_bits_of_the_definition(size, dtype):
    check_norm_lif(*size, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(32, 2048, 256), (69, 1100, 250), (5, 1500, 384), (6, 1030, 520)], ids=ids)
def test_many_rows_have_the_bits_of_the_definition(size, dtype):
    """As many as 8 elements a thread on the way back take."""
    check_norm_lif(*size, dtype=dtype, device="cuda")


QUOTIENTS = """
extern "C" __global__ void count(unsigned* wrong)
{
    const long long first = 0x00800000, infinity = 0x7F800000, large = 0x7E800000;  // 2^-126, and 2^126
    for (long long i = first + blockIdx.x * blockDim.x + threadIdx.x; i <= infinity; i += gridDim.x * blockDim.x) {
        const float x = __uint_as_float((unsigned)i), y = reciprocal<false>(x);
        if (i < large ? y != reciprocal<true>(x) : !(y >= 0.0f && y <= 1.17549435e-38f)) atomicAdd(wrong, 1u);
        const float divisors[] = {10.0f, 1.5f, 3.0f, 1.9999999f, 1e9f};
        for (float b : divisors) {
            const float z = __fdiv_rn(x, b);  // of which below 1e-30 a unit of the last place is allowed
            if (z > 1e-30f && (quotient(x, b) != z || quotient(-x, b) != -z)) atomicAdd(wrong, 1u);
        }
    }
    const float nan = __uint_as_float(0x7FC00000u);
    if (!isnan(reciprocal<false>(nan)) || !isnan(quotient(nan, 10.0f))) atomicAdd(wrong, 1u);
}
"""


def test_every_reciprocal_and_quotient_without_a_branch_is_rounded_as_a_division():
    import cupy

    check_lif(2, 3, device="cuda")
    code = assemble(next(program for program, _, _ in _kernels if program.op == "lif")) + QUOTIENTS
    wrong = cupy.zeros(1, dtype=cupy.uint32)
    cupy.RawModule(code=code, options=OPTIONS).get_function("count")((1056,), (256,), (wrong,))
    assert int(wrong[0]) == 0


ATTENTION_SIZES = [(1, 1, 1, 1, 1, 1), (32, 8, 8, 110, 110, 32), (7, 3, 2, 23, 33, 65), (4, 2, 1, 200, 500, 128)]
WAYS = [("output", "map_first"), (None, "map_first"), ("output", "state_first"), (None, "state_first"), ("map", "auto")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=ids)
@pytest.mark.parametrize("size", ATTENTION_SIZES, ids=ids)
def test_every_attention_has_the_bits_of_the_definition(size, way, dtype):
    fire, order = way
    check_attention(*size, fire=fire, order=order, masked=True, dtype=dtype, device="cuda")
    if size[3] == size[4]:
        check_attention(*size, fire=fire, order=order, causal=True, dtype=dtype, device="cuda")


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_have_the_bits_of_the_definition(causal):
    """Sums of parts, and counts of three bytes: of 70 000 keys almost all spike."""
    check_attention(2, 1, 2, 2100, 2100, 64, order="state_first", causal=causal, device="cuda")
    if not causal:
        check_attention(1, 1, 1, 3, 70_000, 2, order="state_first", rate=0.999, device="cuda")
    check_attention(3, 1, 2, 600, 600, 40, fire="map", causal=causal, device="cuda")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=ids)
def test_numbers_that_are_no_spikes_are_multiplied(way, causal):
    for odd in range(3):
        check_attention(
            3, 2, 1, 6, 6, 40, fire=way[0], order=way[1], causal=causal, masked=True, odd=odd, device="cuda"
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fire", ["output", "map", None])
def test_attention_has_the_gradients_of_the_definition(fire, causal):
    qkv = [(torch.rand(8, 2, 4, 40, 32) < 0.3).float() for _ in range(3)]
    weight, results = torch.randn(8, 2, 4, 40, 32), {}
    for backend, device in (("torch", "cpu"), ("cupy", "cuda"), ("auto", "cuda")):
        own = [x.to(device).requires_grad_() for x in qkv]
        out = spiking_attention(*own, fire=fire, is_causal=causal, backend=backend)
        grads = torch.autograd.grad((out * weight.to(device)).sum(), own)
        results[backend] = (out.detach().cpu(), [grad.cpu() for grad in grads])
    for backend in ("cupy", "auto"):
        assert torch.equal(results[backend][0], results["torch"][0])
        for got, wanted in zip(results[backend][1], results["torch"][1], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_attention_is_as_near_to_float64_as_autograd_of_two_products(causal):
    spikes = [(torch.rand(6, 2, 4, 40, 32) < 0.3).bfloat16() for _ in range(3)]
    weight, grads = torch.randn(6, 2, 4, 40, 32).bfloat16(), {}

    def two_products(q, k, v):
        counts = q @ k.transpose(-1, -2)
        current = (counts.tril() if causal else counts) @ v * 0.125
        settings = {"tau": 2.0, "v_threshold": 0.5, "surrogate": ATan(), "detach_reset": True}
        return lif(current, **settings, backend="torch").spikes

    for name, device, dtype, call in (
        ("truth", "cpu", torch.float64, two_products),
        ("autograd", "cuda", torch.bfloat16, two_products),
        ("ours", "cuda", torch.bfloat16, lambda *qkv: spiking_attention(*qkv, is_causal=causal, backend="cupy")),
    ):
        own = [x.to(device, dtype).requires_grad_() for x in spikes]
        grads[name] = torch.autograd.grad(call(*own), own, weight.to(device, dtype))
    for ours, autograd, truth in zip(grads["ours"], grads["autograd"], grads["truth"], strict=True):
        assert ours.dtype == torch.bfloat16
        error, theirs = ((got.cpu().double() - truth).abs() for got in (ours, autograd))
        assert error.mean() <= 1.5 * theirs.mean()
        assert error.max() <= 0.02 * truth.abs().max()


def test_attention_passes_opcheck_and_compiles_to_one_graph():
    q, k, v = ((torch.rand(4, 2, 2, 9, 16, device="cuda") < 0.4).float().requires_grad_() for _ in range(3))
    inputs = (q, k, v, torch.full((1, 1, 1, 1, 1), 0.125, device="cuda"), None, None)
    settings = ("output", "auto", False, 2.0, 0.5, 0.0, True, "atan", 2.0, "cupy")
    torch.library.opcheck(torch.ops.spikeattn.spiking_attention_forward.default, (*inputs, *settings))
    compiled = torch.compile(lambda q, k, v: spiking_attention(q, k, v, tau=3.0), fullgraph=True)
    assert torch.equal(compiled(q, k, v), spiking_attention(q, k, v, tau=3.0))


def test_packed_spikes_hold_one_bit_a_neuron():
    x, v0 = currents(6, 1000).cuda(), torch.zeros(1000, device="cuda")
    spikes, _, _ = lif_forward_cuda(x, v0, None, 6, *Neuron().forward(), False)
    packed, _, _ = lif_forward_cuda(x, v0, None, 6, *Neuron().forward(), False, packed=True)
    bits = packed.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device="cuda") & 1
    assert torch.equal(bits.flatten(1)[:, :1000].float(), spikes)


def gradients(x: torch.Tensor, backend: str = "cupy") -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes of `lif`, and the gradient of a weighted sum of them."""
    x = x.detach().requires_grad_()
    spikes = lif(x, tau=10.0, surrogate=ATan(), backend=backend).spikes
    weight = torch.linspace(-1, 1, x.numel()).view_as(x).to(x)
    return spikes, torch.autograd.grad(spikes, x, weight)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_public_function_takes_the_kernels(dtype):
    x = currents(16, 3, 50, dtype=dtype)
    assert_equal(gradients(x.cuda()), gradients(x, "torch"))
    assert_equal(gradients(x.cuda(), "auto"), gradients(x, "torch"))


def test_registered_ops_pass_opcheck():
    x, v0 = currents(5, 6).cuda().requires_grad_(), torch.zeros(6, device="cuda", requires_grad=True)
    settings = (5, 2.0, True, 1.0, 0.0, False, "atan", 2.0)
    torch.library.opcheck(torch.ops.spikeattn.lif_forward.default, (x, v0, None, *settings, True, "cupy"))


def test_compiles_to_one_graph_with_the_same_result():
    x = currents(6, 10).cuda()
    compiled = torch.compile(lambda x: lif(x, tau=3.0).spikes, fullgraph=True)
    assert torch.equal(compiled(x), lif(x, tau=3.0).spikes)


def test_launches_follow_the_current_stream():
    x = torch.zeros(32, 2**20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read zeros
        x.fill_(2.0)
        spikes = lif(x, tau=2.0, backend="cupy").spikes
    stream.synchronize()
    assert spikes.all()


def test_a_graph_replays_forward_and_backward():
    T, N = 8, 1000
    x, grad_s = currents(T, N).cuda(), torch.randn(T, N).cuda()
    v0, grad_v = torch.randn(2, N).cuda()

    def step():
        forward = lif_forward_cuda(x, v0, None, T, *Neuron().forward(), False)
        return (*forward, *lif_backward_cuda(grad_s, grad_v, None, x, v0, None, T, *Neuron().settings(), "atan", 2.0))

    step()  # compiles: a capture may not load a module
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(currents(T, N))
    graph.replay()
    assert_equal(captured, step())


def test_a_second_call_compiles_nothing(monkeypatch):
    import cupy

    x = currents(4, 100).cuda()
    first = gradients(x)
    monkeypatch.setattr(cupy, "RawModule", None)
    assert_equal(gradients(x), first)


def test_calls_from_several_threads_agree():
    x, results = currents(12, 500).cuda(), []
    threads = [threading.Thread(target=lambda: results.append(gradients(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results[1:]:
        assert_equal(result, results[0])


def test_a_second_device_gets_its_own_kernels():
    x = currents(4, 100)
    wanted = gradients(x.cuda(0))
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    assert_equal(gradients(x.cuda(1)), wanted)
    assert torch.cuda.current_device() == 0


def test_more_elements_than_32_bits_count():
    T, N = 2, 2**30 + 32
    x = torch.zeros(1, device="cuda")
    lif(x.expand(1, 1), backend="cupy")
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    x = torch.zeros(T, N, dtype=torch.bfloat16, device="cuda")
    x[:, -33:] = 4.0
    spikes = lif_forward_cuda(x, torch.zeros((), device="cuda").expand(N), None, T, *Neuron(tau=2.0).forward(), False)[
        0
    ]
    assert spikes[:, -33:].all()
    assert not spikes[:, :-33].any()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_kernels_are_clean_under_compute_sanitizer(tool):
    check_lif(2, 3, device="cuda")
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on PATH")
    code = (
        "from kernel_cases import check_attention, check_lif, check_norm_lif\n"
        "for T in (1, 7, 33, 161):\n"
        "    check_lif(T, 264, tensor_tau=True, device='cuda')\n"
        "    check_norm_lif(T, 3, 33, device='cuda'); check_norm_lif(T, 2, 520, device='cuda')\n"
        "    check_norm_lif(T, 1100, 256, device='cuda')\n"
        "for order in ('map_first', 'state_first'):\n"
        "    check_attention(5, 2, 2, 9, 40, 33, order=order, masked=True, device='cuda')\n"
        "check_attention(5, 2, 2, 9, 40, 33, fire='map', device='cuda')\n"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stdout[-4000:]
