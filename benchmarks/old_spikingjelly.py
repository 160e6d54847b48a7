"""SpikingJelly 0.0.0.0.14 as a peer, in a process of its own: one process cannot import two versions of a package.

The other process is this module, run with the old package's folder first on its path. It times its own runs by the
same clocks and answers with the seconds, so that the pipe between the two costs nothing; who runs when is decided here.
"""

import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import clock_of, contender
from benchmarks.registry import CannotRun, Contender

ROOT = Path(__file__).parent.parent
VERSION = "0.0.0.0.14"
NAME = f"SpikingJelly {VERSION}"
VARIABLE = "OLD_SPIKINGJELLY"
Norm = tuple[Tensor, Tensor]  # a LayerNorm's weight and bias


def old_contender(name: str, x: Tensor, **model: Any) -> Contender:
    """A model of its neurons on ``x``, as of `Model`; raises `CannotRun` with the reason."""
    peer = Model(x, **model)
    return Contender(name, *(partial(peer.ask, what) for what in ("forward", "training")), times_itself=True)


class Model:
    """Its LIF, alone, after a LayerNorm or in a transformer block, in the other process, which ends with this object.

    Args:
        x: Input, ``[T, ...]``.
        tau: In time steps; of the LIF alone.
        norm: Of the LayerNorm before it.
        block: `benchmarks.peer_block.Parts`, for the block that is made of them.
    """

    def __init__(self, x: Tensor, tau: float = 2.0, norm: Norm | None = None, block: Any = None) -> None:
        folder = os.environ.get(VARIABLE)
        if not folder:
            command = f"`pip install --no-deps --target FOLDER spikingjelly=={VERSION}`"
            raise CannotRun(f"needs a folder of its own, made by {command}, and {VARIABLE}=FOLDER")
        path = [str(Path(folder).resolve()), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.old_spikingjelly"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        weakref.finalize(self, self._process.communicate)  # the end of the questions is its end
        plain = tuple(p.cpu() for p in norm) if norm else None
        question = {"x": x.cpu(), "device": x.device, "tau": tau, "norm": plain, "block": block}
        self.ask({**question, "threads": torch.get_num_threads()})

    def ask(self, question: object) -> Any:
        """Seconds of a run, "forward" or "training"; or what it gives, "spikes"."""
        try:
            pickle.dump(question, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise CannotRun(f"its process ended with status {self._process.wait()}") from None
        if isinstance(answer, str):
            raise CannotRun(answer)
        return answer


def _serve() -> None:
    """Answer questions until there are no more, first a model's arguments, then what to do; text is an error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the package prints is no answer
    respond = None
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer = None
        try:
            if respond is None:
                respond = _responder(**question)
            else:
                answer = respond(question)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}".split("\n")[0]
        pickle.dump(answer, answers)
        answers.flush()


def _responder(
    x: Tensor, device: torch.device, tau: float, norm: Norm | None, block: Any, threads: int
) -> Callable[[str], float | Tensor]:
    """What runs the model and answers; a first training step shows that it can, and is the first that is told."""
    if (found := version("spikingjelly")) != VERSION:
        raise ImportError(f"{VARIABLE} holds spikingjelly {found}")
    torch.set_num_threads(threads)
    # CuPy's kernels know no bfloat16.
    backend = "cupy" if device.type == "cuda" and x.dtype == torch.float32 else "torch"
    model = _block(block, backend).to(device) if block else _lif(device, x.dtype, tau, norm, backend)
    own = contender(NAME, model, x.to(device))
    clock = clock_of(device.type)
    first = [clock(own.training)]

    def respond(question: str) -> float | Tensor:
        if question == "spikes":
            return own.forward().cpu()
        if question == "training" and first:
            return first.pop()
        return clock(getattr(own, question))

    return respond


def _lif(device: torch.device, dtype: torch.dtype, tau: float, norm: Norm | None, backend: str) -> Callable:
    from spikingjelly.activation_based import neuron, surrogate

    fire = surrogate.ATan()
    node = neuron.LIFNode(tau, surrogate_function=fire, detach_reset=True, step_mode="m", backend=backend)
    affine = [p.to(device, dtype) for p in norm] if norm else None

    def model(x: Tensor) -> Tensor:
        node.reset()
        return node(nn.functional.layer_norm(x, affine[0].shape, *affine) if affine else x)

    return model


def _block(parts: Any, backend: str) -> nn.Module:
    from spikingjelly.activation_based import functional

    from benchmarks.peer_block import PeerBlock

    block = PeerBlock(parts)
    functional.set_backend(block, backend)
    return block


if __name__ == "__main__":
    _serve()
