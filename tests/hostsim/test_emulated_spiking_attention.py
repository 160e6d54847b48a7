"""The CUDA kernels of `spiking_attention`, run on the CPU from the same source, against the definition."""

import itertools
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from cases import SURROGATES, ids
from emulator import CUSTOM
from kernel_cases import DTYPES, Neuron, assert_equal, attention_inputs, check_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from spikeattn import ATan, CustomSurrogate
from spikeattn.ops.spiking_attention import call, cuda, cuda_plans, layout, registered
from spikeattn.ops.spiking_attention.autograd import attention as attend
from spikeattn.ops.spiking_attention.call import Inputs, Settings
from spikeattn.ops.spiking_attention.registered import spiking_attention_backward, spiking_attention_forward

pytestmark = pytest.mark.kernel

# (T, B, H, L, S, E): one of each, groups of 32 keys that do and do not fill, one to four words a token, tiles of 16
# queries that do and do not fill.
SIZES = [(1, 1, 1, 1, 1, 1), (3, 2, 1, 5, 33, 8), (4, 1, 2, 9, 64, 32), (2, 2, 2, 17, 7, 33), (3, 1, 1, 3, 70, 65)]
SIZES += [(2, 1, 1, 6, 40, 128)]
WAYS = [("output", "map_first"), (None, "map_first"), ("output", "state_first"), (None, "state_first"), ("map", "auto")]
SETTINGS = Settings("output", "auto", False, 2.0, 1.0, 0.0, True, "atan", 2.0, "cupy")


@pytest.fixture(autouse=True)
def _wide_tiles(monkeypatch):
    """Several queries a warp, although so few keep no device busy."""
    monkeypatch.setattr(cuda_plans, "BUSY_WARPS", 1)


@pytest.mark.parametrize("way", WAYS, ids=ids)
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_every_size_has_the_bits_of_the_definition(emulated, size, way):
    fire, order = way
    check_attention(*size, fire=fire, order=order, masked=size[1] > 1)


@pytest.mark.parametrize("busy", [5, 12, 2**12])
def test_narrower_tiles_give_the_same_bits(emulated, busy, monkeypatch):
    monkeypatch.setattr(cuda_plans, "BUSY_WARPS", busy)
    for fire, order in WAYS:
        check_attention(2, 1, 2, 9, 33, 33, fire=fire, order=order)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("E", [9, 70])
def test_long_sequences_are_summed_in_parts(emulated, E, causal, monkeypatch):
    monkeypatch.setattr(cuda_plans, "BUSY_WARPS", 2**12)
    plans = [cuda_plans.plan_states(2, 290, E, "f32", causal), *cuda_plans.plan_gather(2, 290, E, "f32", causal)]
    assert dict(plans[0].constants)["kSplit"] == (2 if causal else 4)
    assert plans[2] == (5 if causal else 2)
    check_attention(2, 1, 1, 290, 290, E, order="state_first", causal=causal, masked=True)


@pytest.mark.parametrize("S", [255, 256, 300])
def test_counts_of_more_than_a_byte_are_exact(emulated, S, monkeypatch):
    """Three bytes at 300, too, as from 2**16 keys on, which take minutes here and a moment in tests/cuda."""
    assert [dict(cuda_plans.plan_states(1, n, 2, "f32", False).constants)["kPieces"] for n in (S, 2**16)] == [
        1 + (S > 255),
        3,
    ]
    if S == 300:
        monkeypatch.setattr(cuda_plans, "pieces_of", lambda S: 3)
        monkeypatch.setattr(cuda, "pieces_of", lambda S: 3)
        cuda_plans.plan_states.cache_clear()
    for fire in ("output", None):
        check_attention(1, 1, 1, 3, S, 2, fire=fire, order="state_first", rate=0.999)


@pytest.mark.parametrize("way", WAYS, ids=ids)
@pytest.mark.parametrize("size", [(2, 2, 1, 35, 9), (2, 1, 2, 150, 40), (3, 1, 1, 1, 4), (1, 1, 1, 128, 8)], ids=ids)
def test_causal_tokens_see_what_the_definition_lets_them_see(emulated, size, way):
    T, B, H, L, E = size
    check_attention(T, B, H, L, L, E, fire=way[0], order=way[1], causal=True, masked=B > 1)


@pytest.mark.parametrize("causal", [False, True])
def test_maps_of_many_keys_go_by_tiles(emulated, causal, monkeypatch):
    monkeypatch.setattr(cuda, "MAX_MAP_KEYS", 30)
    for dtype in DTYPES:
        check_attention(5, 2, 1, 70, 70, 40, fire="map", causal=causal, masked=True, dtype=dtype)
    check_attention(2, 1, 2, 3, 33, 8, fire="map")
    check_attention(2, 1, 1, 34, 34, 33, fire="map", causal=causal, masked=True, odd=2)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=ids)
def test_16_bit_spikes_have_the_bits_of_the_definition(emulated, way, dtype):
    fire, order = way
    check_attention(4, 2, 1, 5, 33, 24, fire=fire, order=order, dtype=dtype)


@pytest.mark.parametrize("way", WAYS, ids=ids)
def test_hundreds_of_steps_pass(emulated, way):
    check_attention(130, 1, 1, 2, 3, 5, fire=way[0], order=way[1], rate=0.6)


@pytest.mark.parametrize("v_reset", [0.0, 0.25, None])
@pytest.mark.parametrize("fire", ["output", "map"])
def test_every_neuron_has_the_bits_of_the_definition(emulated, fire, v_reset):
    for detach_reset, tau in itertools.product((True, False), (2.0, 10.0)):
        check_attention(6, 1, 1, 3, 5, 9, fire=fire, neuron=Neuron(v_reset, detach_reset, True, tau))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=ids)
def test_every_surrogate_is_as_near_to_float64_as_the_definition(emulated, surrogate):
    check_attention(5, 1, 1, 3, 5, 9, surrogate=surrogate, exact=False)


@pytest.mark.parametrize("rate", [0.0, 0.02, 1.0])
def test_silence_and_saturation(emulated, rate):
    for fire, order in WAYS:
        check_attention(3, 1, 1, 4, 35, 33, fire=fire, order=order, rate=rate)


def test_more_tiles_than_the_grid_has_are_reached_by_striding(emulated, monkeypatch):
    monkeypatch.setattr(cuda_plans, "MAX_BLOCKS", 1)
    for fire, order in WAYS:
        check_attention(2, 2, 2, 9, 5, 8, fire=fire, order=order, masked=True)


@pytest.mark.parametrize("way", WAYS, ids=ids)
def test_strides_reach_the_kernels_by_value(emulated, way):
    """Slices of larger tensors and any order of axes, the channels of one in the middle of its memory."""
    fire, order = way
    inputs = attention_inputs(3, 2, 2, 5, 5, 8, rate=0.5, dtype=torch.float32, fire=fire, masked=True)
    settings = SETTINGS._replace(fire=fire, order=order)
    wanted = cuda.attention_forward_cuda(inputs, settings)
    q, k, v, scale, query_mask, key_mask = inputs
    q = torch.cat([q, 1 - q], 3).permute(3, 0, 2, 1, 4).contiguous().permute(1, 3, 2, 0, 4)[..., :5, :]
    k = torch.cat([1 - k, k], -1)[..., 8:]
    v = v.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    scale = scale.expand(3, 2, 2, 5, 1)
    query_mask = torch.stack([query_mask, ~query_mask], -1)[..., 0]
    got = cuda.attention_forward_cuda(Inputs(q, k, v, scale, query_mask, key_mask), settings)
    assert torch.equal(got, wanted)
    assert got.any()


def test_channels_with_gaps_are_brought_together_once_each_way(emulated, monkeypatch):
    """Not again to attend to what was packed: a copy is as large as what it is of."""
    copied = Counter()

    def rows(x):
        copied[x.stride(-1)] += 1
        return layout.rows_in_one_piece(x)

    monkeypatch.setattr(call, "rows_in_one_piece", rows)
    q, k, v, *rest = attention_inputs(3, 1, 2, 5, 5, 8, rate=0.5, dtype=torch.float32, fire="output", masked=True)
    leaves = [torch.stack([x, x], -1)[..., 0].requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, *rest, *SETTINGS)
    assert copied[2] == 3
    torch.autograd.grad(out.sum(), leaves)
    assert copied[2] == 6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=ids)
def test_numbers_that_are_no_spikes_are_multiplied(emulated, way, causal):
    """Multiples of 1/2, whose sums are exact, so that bits can be compared."""
    for odd in range(3):
        check_attention(3, 2, 1, 6, 6, 40, fire=way[0], order=way[1], causal=causal, masked=True, odd=odd)


@pytest.mark.parametrize("way", WAYS, ids=ids)
def test_padding_may_hold_any_number(emulated, way):
    fire, order = way
    inputs = attention_inputs(2, 1, 1, 5, 5, 8, rate=0.5, dtype=torch.float32, fire=fire, masked=False)
    for x in inputs[:3]:
        x[:, :, :, 3] = float("nan")
    mask = torch.arange(5).unsqueeze(0) == 3
    inputs = inputs._replace(query_padding_mask=mask, key_padding_mask=mask)
    assert cuda.attention_forward_cuda(inputs, SETTINGS._replace(fire=fire, order=order)).isfinite().all()


def test_a_scale_may_depend_on_the_step(emulated):
    inputs = attention_inputs(4, 1, 2, 3, 5, 8, rate=0.5, dtype=torch.float32, fire=None, masked=False)
    inputs = inputs._replace(scale=2.0 ** torch.arange(4).view(4, 1, 1, 1, 1) * inputs.scale)
    q, k, v, scale, *_ = inputs
    out = cuda.attention_forward_cuda(inputs, SETTINGS._replace(fire=None, order="map_first"))
    assert torch.equal(out, (q @ k.mT @ v) * scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fire", ["output", "map", None])
def test_the_registered_operations_take_the_kernels_and_give_the_gradients(emulated, fire, causal, monkeypatch):
    launched = Counter()

    def launch(plan, program, args, device):
        launched[plan.kernel] += 1
        emulated.launch(plan, program, args, device)

    monkeypatch.setattr(cuda, "launch", launch)
    size = (4, 2, 2, 6, 6, 16)
    inputs = attention_inputs(*size, rate=0.4, dtype=torch.float32, fire=fire, masked=True)
    grad, results = torch.randn(4, 2, 2, 6, 16), {}
    for backend in ("torch", "cupy"):
        settings = SETTINGS._replace(fire=fire, order="map_first", is_causal=causal, backend=backend)
        out = spiking_attention_forward(*inputs, *settings)
        results[backend] = (out, *spiking_attention_backward(grad, *inputs, *settings))
    assert torch.equal(results["cupy"][0], results["torch"][0])
    for wanted, got in zip(results["torch"], results["cupy"], strict=True):
        assert got.stride() == wanted.stride()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    kernels = {"map": {"map"}, None: {"forward"}, "output": {"forward", "backward"}}[fire] | {"pack"}
    if fire == "map":
        kernels.add("map_back")
    else:
        kernels |= {"states_back", "gather", "gradients"} | ({"scan"} if causal else set())
    assert set(launched) == {f"spk_attention_{name}_f32" for name in kernels}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fire", ["output", "map", None])
def test_training_packs_once_and_gives_the_same_bits(emulated, fire, causal, monkeypatch):
    launched = Counter()

    def launch(plan, program, args, device):
        launched[plan.kernel] += 1
        emulated.launch(plan, program, args, device)

    monkeypatch.setattr(cuda, "launch", launch)
    q, k, v, *rest = attention_inputs(4, 2, 2, 6, 6, 16, rate=0.4, dtype=torch.float32, fire=fire, masked=True)
    order = "map_first" if fire == "map" else "state_first"
    settings = SETTINGS._replace(fire=fire, order=order, is_causal=causal)
    grad = torch.randn_like(q)
    wanted = spiking_attention_backward(grad, q, k, v, *rest, *settings)
    assert launched.pop("spk_attention_pack_f32") == 1
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, *rest, *settings)
    got = torch.autograd.grad(out, leaves, grad)
    assert launched["spk_attention_pack_f32"] == 1
    assert torch.equal(out, spiking_attention_forward(q, k, v, *rest, *settings))
    assert_equal([x.contiguous() for x in got], [x.contiguous() for x in wanted])


def test_a_surrogate_of_ones_own_reaches_the_backward(emulated):
    inputs = attention_inputs(4, 1, 1, 3, 5, 8, rate=0.5, dtype=torch.float32, fire="output", masked=False)
    grad, own = torch.randn(4, 1, 1, 3, 8), CustomSurrogate(torch.sigmoid, ATan(2.0).derivative, cuda=CUSTOM)
    got = cuda.attention_gradients_cuda(grad, inputs, SETTINGS._replace(surrogate=own.name, alpha=own.alpha))
    assert_equal(got, cuda.attention_gradients_cuda(grad, inputs, SETTINGS))


@pytest.mark.parametrize("fire", ["output", "map", None])
def test_what_is_kept_does_not_depend_on_who_watches(emulated, fire):
    q, k, v, *rest = attention_inputs(4, 2, 2, 6, 6, 16, rate=0.4, dtype=torch.float32, fire=fire, masked=True)
    order, grad, results = "map_first" if fire == "map" else "state_first", torch.randn_like(q), []
    for forward_mode, backward_mode in itertools.product((nullcontext, FlopCounterMode), repeat=2):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def call(*qkv):
            return attend(*qkv, *rest, *SETTINGS._replace(fire=fire, order=order))

        with forward_mode(*[] if forward_mode is nullcontext else [None, 2, False]):
            out = checkpoint(call, *leaves, use_reentrant=False)
        with backward_mode(*[] if backward_mode is nullcontext else [None, 2, False]):
            results.append(torch.autograd.grad(out, leaves, grad))
    for result in results[1:]:
        assert_equal([x.contiguous() for x in result], [x.contiguous() for x in results[0]])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_few_steps_at_a_time_are_the_same(emulated, causal, monkeypatch):
    inputs = attention_inputs(5, 2, 2, 40, 40, 24, rate=0.4, dtype=torch.float32, fire="output", masked=True)
    settings = SETTINGS._replace(is_causal=causal)
    grad = torch.randn(5, 2, 40, 2, 24).transpose(2, 3)
    whole = cuda.attention_gradients_cuda(grad, inputs, settings)
    for steps in (1, 2):
        monkeypatch.setattr(cuda, "SCRATCH_BYTES", steps * 4 * 1024 * (2 + 8))
        assert len(cuda._slices(5, 4, 40, 40, 24, "f32", causal)) == -(-5 // steps)
        sliced = cuda.attention_gradients_cuda(grad, inputs, settings)
        assert_equal([x.contiguous() for x in sliced], [x.contiguous() for x in whole])


def test_devices_without_tensor_cores_take_products(emulated, monkeypatch):
    launched = Counter()
    monkeypatch.setattr(cuda, "launch", lambda plan, *args: launched.update([plan.kernel]))
    monkeypatch.setattr(registered, "_has_tensor_cores", lambda device: False)
    q, k, v, *rest = attention_inputs(4, 2, 2, 6, 6, 16, rate=0.4, dtype=torch.float32, fire=None, masked=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = [attend(*leaves, *rest, *SETTINGS._replace(fire=None, backend=backend)) for backend in ("cupy", "torch")]
    assert torch.equal(*results)
    got, wanted = (torch.autograd.grad(out.sum(), leaves) for out in results)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not launched
    for capability, has in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        registered._has_tensor_cores.cache_clear()
        assert registered._has_tensor_cores(torch.device("cuda:0")) == has
    registered._has_tensor_cores.cache_clear()


def test_what_the_kernels_leave_to_products():
    assert cuda_plans.takes((4, 1, 8, 10**6, 128), 10**6)
    assert not cuda_plans.takes((1, 1, 1, 1, 129), 1)
    assert not cuda_plans.takes((1, 1, 1, 2**24, 1), 1)
    assert not cuda_plans.takes((1, 1, 1, 1, 1), 2**24)
    assert not cuda_plans.takes((2**13, 2**13, 1, 1, 1), 1)
