"""Every kernel compiles by NVRTC without a GPU, spills nothing and needs no more registers than recorded."""

import json
from importlib.util import find_spec

import pytest
from compiler import compile_program
from registers import RECORDED, programs
from tiers import skip_without

from spikeattn._cuda.source import OPTIONS, Program, assemble

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", autouse=True)
def _nvrtc():
    """The compiler of the wheels; a toolkit that happens to be on a machine is not relied on."""
    if find_spec("cupy") is None:
        skip_without("nvrtc", "cupy is not installed")
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        skip_without("nvrtc", f"NVRTC does not load: {error}")


@pytest.mark.parametrize(
    ("what", "arch", "kernel", "program"),
    [pytest.param(*case, id=f"{case[2]}-{case[0]}-{case[1]}".replace(" ", "-")) for case in programs()],
)
def test_every_kernel_compiles_without_spills_in_the_recorded_registers(what, arch, kernel, program):
    from cupy.cuda import nvrtc

    if int(arch.removeprefix("sm_")) not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not know {arch}")
    reports = compile_program(program, arch)
    assert list(reports) == [kernel]
    assert reports[kernel].spilled == 0
    assert reports[kernel].stack == 0
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    if recorded["NVRTC"] == list(nvrtc.getVersion()):  # another compiler allots registers as it likes
        assert reports[kernel].registers <= recorded[f"{kernel} {what}"][arch], (
            "worth it? python tests/kernels/registers.py"
        )


def test_nothing_is_recorded_of_kernels_that_are_gone():
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert set(recorded) == {"NVRTC", *(f"{kernel} {what}" for what, _, kernel, _ in programs())}


def test_no_product_is_contracted_into_a_sum():
    """What the definition rounds twice stays two operations; the one fma of ours is the hard reset."""
    from cupy.cuda import nvrtc

    program = next(case for case in programs() if case[2] == "spk_lif_backward_f32")[3]
    soft = tuple((name, 0 if name == "kHardReset" else value) for name, value in program.constants)
    handle = nvrtc.createProgram(assemble(program._replace(constants=soft)), "program.cu", (), ())
    nvrtc.compileProgram(handle, (*OPTIONS, "-arch=compute_80", "-ftz=true"))
    ptx = nvrtc.getPTX(handle).decode()
    assert "mul.rn.ftz.f32" in ptx
    assert "div.rn.ftz.f32" in ptx
    assert "fma.rn" not in ptx
    assert ".approx" not in ptx


def test_an_error_names_the_file_and_line_of_ours():
    program = Program("lif", "forward", "f32", (("kVector", 1),))
    with pytest.raises(AssertionError, match=r"spikeattn/ops/lif/kernels\.cu\(\d+\): error"):
        compile_program(program, "sm_90")


def test_a_surrogate_of_ones_own_compiles():
    program = next(case for case in programs() if case[2] == "spk_lif_backward_f32")[3]
    constants = tuple((name, 8 if name == "kSurrogate" else value) for name, value in program.constants)
    own = program._replace(constants=constants, derivative="1.0f / (1.0f + x * x)")
    assert "return (1.0f / (1.0f + x * x));" not in assemble(program)
    assert "#define SPK_CUSTOM_DERIVATIVE (1.0f / (1.0f + x * x))" in assemble(own)
    assert compile_program(own, "sm_90")
