"""What several test files of `lif` share."""

import os
import subprocess
import sys

import torch

from spikeattn import lif


def results(x, v0, backend, *, tau=2.0, seed=0, **options):
    """Everything that a call gives, and every gradient, under random weights."""
    x, v0 = x.clone().requires_grad_(), v0.clone().requires_grad_()
    tau = torch.tensor(tau).requires_grad_() if options.pop("learned", False) else tau
    outputs = [out for out in lif(x, v0, tau=tau, backend=backend, **options) if out is not None]
    generator = torch.Generator().manual_seed(seed)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs)
    inputs = [x, v0, *([tau] if isinstance(tau, torch.Tensor) else [])]
    return [out.detach() for out in outputs], torch.autograd.grad(loss, inputs)


def run_python(code, **environment):
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout
