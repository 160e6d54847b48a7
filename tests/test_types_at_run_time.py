"""The annotated shapes and types hold: beartype checks them while the examples of the docstrings and a model run.

In a process of its own, because the checks would hide the messages that users see, and stop torch.compile.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Not the kernels of `_cpu` and `cpu.py`: numba compiles them, and cannot compile a wrapper around them.
CHECKED = (
    "spikeattn.nn",
    "spikeattn.ops.lif.op",
    "spikeattn.ops.lif.reference",
    "spikeattn.ops.norm_lif.op",
    "spikeattn.ops.norm_lif.reference",
    "spikeattn.ops.spiking_attention.autograd",
    "spikeattn.ops.spiking_attention.call",
    "spikeattn.ops.spiking_attention.op",
    "spikeattn.ops.spiking_attention.reference",
    "spikeattn.ops.spiking_attention.registered",
    "spikeattn.ops.spiking_attention.streaming",
    "spikeattn.ops.surrogate",
    "spikemo_model",
)


def test_annotations_hold_while_the_package_runs():
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            f"--jaxtyping-packages={','.join(CHECKED)},beartype.beartype",
            "spikeattn", "spikemo_model",
            "tests/nn/test_attention.py", "tests/nn/test_attention_family.py", "tests/model/test_model.py",
            "-k", "not bad and not compiles",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
