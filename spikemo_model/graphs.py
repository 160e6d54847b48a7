"""SpikEmo on a GPU by CUDA graphs: a forward or backward pass is one launch instead of thousands."""

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikemo_model.batch import DialogueBatch
from spikemo_model.model import SpikEmo, SpikEmoOutput

logger = logging.getLogger(__name__)

# Lengths and numbers of speakers are rounded up to a multiple of it, so that few shapes occur.
_MULTIPLE = 8


class GraphedSpikEmo:
    """Calls a `SpikEmo` whose forward and backward passes are captured as CUDA graphs, one a shape of batch.

    Its kernels are small, thousands a batch, and a process launches them more slowly than a GPU runs them. A shape that
    is new is run a few times and captured, which takes as long as some batches; from then on it is replayed. Lengths
    are rounded up: padding changes no utterance's result. Where a capture fails, a warning says so once, and the model
    runs as it does without.

    All graphs share their memory: between a call and its backward there may be no other call, and gradients are to be
    set to None before the next backward, not added to.

    Args:
        model: On a GPU, without ``published_behaviour``. Its parameters may change their values, not their memory.
    """

    def __init__(self, model: SpikEmo) -> None:
        self.model = model
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple, Any] = {}
        self._usable = True
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
            # A capture runs on a stream of its own; what it leaves for the gradients of parameters is on that one.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    def __call__(self, batch: DialogueBatch) -> SpikEmoOutput:
        """As the model; what a call returns is overwritten by the next one."""
        if not self._usable:
            return self.model(batch)
        whole = rounded(batch)
        inputs = (*whole.features.values(), whole.speakers, whole.mask)
        shapes = tuple(x.shape for x in inputs)
        mode = (self.model.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _autocast())
        key = (tuple(whole.features), shapes, whole.parties, mode)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture(_Flat(self.model, whole), inputs)
            except RuntimeError as error:
                self._usable = False
                self._graphs.clear()  # their memory, too, is the model's now
                logger.warning("CUDA graphs are not used, training is slower: %s", str(error).splitlines()[0])
                return self.model(batch)
        logits, *fused = self._graphs[key](*inputs)
        L = batch.mask.shape[1]
        names = [name for name in self.model.encoders if name in batch.features]
        return SpikEmoOutput(logits[:, :L], {name: x[:, :L] for name, x in zip(names, fused, strict=True)})

    def _capture(self, flat: "_Flat", inputs: tuple[Tensor, ...]) -> Any:
        """``flat`` as graphs, on memory of their own for the inputs."""
        static = tuple(x.clone() for x in inputs)
        enabled, dtype = _autocast()
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):  # a cache would outlive the capture
            return torch.cuda.make_graphed_callables(
                cast(Any, flat), static, 1, allow_unused_input=True, pool=self._pool
            )


class _Flat(nn.Module):
    """A model as a function of tensors alone, for batches like one."""

    def __init__(self, model: SpikEmo, batch: DialogueBatch) -> None:
        super().__init__()
        self.model, self.names, self.parties = model, tuple(batch.features), batch.parties
        self.training = model.training  # alone: parts of the model may be frozen in another mode

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Logits, and fused features by modality in the order of the model, of features, speakers and mask."""
        *features, speakers, mask = inputs
        named = dict(zip(self.names, features, strict=True))
        logits, fused = self.model(DialogueBatch(named, speakers, mask, parties=self.parties))
        return logits, *fused.values()


def rounded(batch: DialogueBatch) -> DialogueBatch:
    """``batch`` with padding and speakers added up to a multiple of 8; without labels."""
    L = batch.mask.shape[1]
    more = -L % _MULTIPLE
    parties = int(batch.speakers.max()) + 1 if batch.parties is None else batch.parties
    return DialogueBatch(
        {name: nn.functional.pad(x, (0, 0, 0, more)) for name, x in batch.features.items()},
        nn.functional.pad(batch.speakers, (0, more)),
        nn.functional.pad(batch.mask, (0, more)),
        parties=parties + -parties % _MULTIPLE,
    )


def _autocast() -> tuple[bool, torch.dtype]:
    """Whether autocast is on for a GPU, and its type."""
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
