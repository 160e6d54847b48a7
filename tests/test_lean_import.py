"""Importing the packages loads nothing heavy that they do not need."""

import subprocess
import sys


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that are loaded after a statement in a fresh interpreter."""
    code = f"import sys; {statement}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_spikeattn_loads_no_other_framework():
    heavy = {"cupy", "numba", "lightning", "torchmetrics", "sklearn", "transformers", "matplotlib", "torchvision"}
    assert not heavy & loaded_after("import spikeattn")


def test_importing_spikeattn_loads_no_compiler():
    code = "import sys, spikeattn; print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_importing_the_model_loads_no_trainer():
    heavy = {"lightning", "torchmetrics", "sklearn", "transformers", "matplotlib", "torchvision"}
    assert not heavy & loaded_after("import spikemo_model, spikemo_model.published")


def test_importing_touches_no_gpu():
    run = subprocess.run(
        [sys.executable, "-c", "import torch, spikeattn, spikemo_model; print(torch.cuda.is_initialized())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == "False"


def test_help_loads_no_trainer():
    heavy = {"lightning", "torchmetrics", "sklearn", "scipy", "transformers", "matplotlib", "joblib", "cv2", "av"}
    listed = "import contextlib, io, spikemo_model.cli as c; sink = io.StringIO()\n"
    listed += "with contextlib.redirect_stdout(sink), contextlib.suppress(SystemExit): c.main(['--help'])\n"
    code = f"import sys; {listed}assert 'finetune-text' in sink.getvalue(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "torch" in loaded
    assert not heavy & loaded
