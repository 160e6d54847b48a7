"""No access out of bounds and nothing undefined, at the sizes where a kernel's edges are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import skip_without

pytestmark = pytest.mark.kernel
HERE = Path(__file__).parent


def test_kernels_are_clean_under_the_sanitizers(tmp_path):
    if shutil.which("g++") is None:
        skip_without("hostsim", "there is no g++")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):  # g++ echoes a name that it does not know
        skip_without("hostsim", "g++ has no sanitizers")
    # Python and PyTorch hold memory until the process ends; fibres have stacks that the leak checker does not know.
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), str(HERE.parent.parent)]),
    }
    command = [sys.executable, str(HERE / "sanitized.py"), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "clean"
