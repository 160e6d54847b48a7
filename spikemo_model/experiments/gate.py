"""What DSWA's gate does: how far it is from level, and what it is worth to a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikemo_model.data.corpus import Conversation, Corpus, collate
from spikemo_model.evaluation import predict, score
from spikemo_model.model import SpikEmo


@dataclass(frozen=True)
class Gate:
    """DSWA's gate in a trained model.

    Args:
        spread: Mean of ``|L g - 1|`` over validation utterances and channels, g the gate (softmax over the L
            utterances of a dialogue); 0 for a level gate, dimensionless. Dialogues of one utterance do not count.
        level_f1: Weighted F1 on test, in percent, with the gate held level: ``g = 1 / L`` everywhere.
    """

    spread: float
    level_f1: float


def measure_gate(model: SpikEmo, corpus: Corpus, batch_size: int = 64) -> Gate | None:
    """Measure the gate of ``model`` on ``corpus``; None without DSWA. The model is in eval mode afterwards."""
    if not model.dswa:
        return None
    spread = _spread(model.eval(), corpus.splits["valid"])
    hooks = [dswa.norm.register_forward_hook(lambda *call: torch.zeros_like(call[-1])) for dswa in _dswas(model)]
    try:
        level = score(predict(model, corpus.splits["test"], batch_size), corpus.splits["test"], corpus.classes)
    finally:
        for hook in hooks:
            hook.remove()
    return Gate(spread, level.weighted_f1)


def _spread(model: SpikEmo, dialogues: Sequence[Conversation]) -> float:
    batch = collate(dialogues).to(next(model.parameters()).device)
    seen: list[Tensor] = []
    hooks = [dswa.norm.register_forward_hook(lambda *call: seen.append(call[-1].mean(0))) for dswa in _dswas(model)]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    relevance = torch.cat(seen)  # [modalities * B, L, D]
    mask = batch.mask.repeat(len(relevance) // len(batch), 1)
    gate = torch.softmax(relevance.masked_fill(~mask.unsqueeze(-1), -torch.inf), dim=1)
    L = mask.sum(1, keepdim=True)
    return float((gate * L.unsqueeze(-1) - 1).abs()[mask & (L > 1)].mean())


def _dswas(model: SpikEmo) -> list:
    return list(model.dswa.values())
