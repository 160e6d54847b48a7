"""Small models and batches."""

import torch

from spikemo_model import DialogueBatch, SpikEmoConfig
from spikemo_model.config import DSWAConfig, FusionConfig, ModalityConfig


def small_config(modalities=("text", "audio", "visual"), contexts=("none", "forward", "bidirectional"), **kwargs):
    """A configuration that runs in milliseconds."""
    widths = {"text": 6, "audio": 3, "visual": 5}
    chosen = {name: ModalityConfig(widths[name], context) for name, context in zip(modalities, contexts, strict=False)}
    dswa = kwargs.pop("dswa", DSWAConfig(time_steps=4, depth=2, num_heads=2, tau=2.0))
    fusion = kwargs.pop("fusion", FusionConfig(layers=2, num_heads=2, hidden=24))
    return SpikEmoConfig(chosen, dim=16, classifier_hidden=12, dswa=dswa, fusion=fusion, **kwargs)


def random_batch(lengths, extra=0, modalities=("text", "audio", "visual"), dtype=torch.float64, parties=3):
    """Random dialogues of the given lengths, padded with ``extra`` places more than the longest needs."""
    widths = {"text": 6, "audio": 3, "visual": 5}
    B, L = len(lengths), max(lengths) + extra
    mask = torch.arange(L) < torch.tensor(lengths).unsqueeze(1)
    return DialogueBatch(
        features={name: torch.randn(B, L, widths[name], dtype=dtype) for name in modalities},
        speakers=torch.randint(parties, (B, L)) * mask,
        mask=mask,
        labels=torch.randint(7, (B, L)).masked_fill(~mask, -1),
        ids=tuple(f"dialogue{b}" for b in range(B)),
    )
