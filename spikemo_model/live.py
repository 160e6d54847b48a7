"""Conversations that are classified as they go on."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from spikemo_model.conversation import ConversationError, Utterance
from spikemo_model.data.corpus import collate
from spikemo_model.model import SpikEmo, SpikEmoState
from spikemo_model.prediction import prepare


class LiveConversation:
    """One conversation and a causal model: each utterance is classified when it is said.

    An utterance costs the same however long the conversation, but for fusion, which keeps one row for each of the past.

    Args:
        model: With ``is_causal`` in its configuration; it is put into eval mode.

    Raises:
        ValueError: The model is not causal.

    Example:
        >>> from spikemo_model import SpikEmoConfig
        >>> from spikemo_model.config import ModalityConfig
        >>> model = SpikEmo(SpikEmoConfig({"text": ModalityConfig(3, "forward")}, dim=16, is_causal=True))
        >>> live = LiveConversation(model)
        >>> emotions = live.add(Utterance("Joey", "How you doin'?", {"text": torch.tensor([0.1, -0.2, 0.4])}))
        >>> len(emotions), round(sum(emotions.values()), 4)
        (7, 1.0)
    """

    def __init__(self, model: SpikEmo) -> None:
        if not model.config.is_causal:
            raise ValueError("LiveConversation: the model sees the future; train one with is_causal (train --causal).")
        self.model = model.eval()
        self._speakers: dict[str, int] = {}
        self._state: SpikEmoState | None = None

    def add(self, utterance: Utterance) -> dict[str, float]:
        """Classify what is said next.

        Args:
            utterance: As for `SpikEmo.predict`; features that are not given are made of this utterance alone.

        Returns:
            Emotion to probability.

        Raises:
            ConversationError: Features are missing, not finite, of another width or of other modalities than those of
                the utterances before, or the model's text features need the utterances around.
        """
        extractor = self.model.origin.extractors.get("text", {})
        if "text" not in utterance.features and extractor.get("name") == "ContextEncoder":
            raise ConversationError(
                "LiveConversation: the model's text features are read in the context of the dialogue, future included. "
                "Give features, or train on those of an encoder of single utterances (train --text ENCODER)."
            )
        batch = collate([prepare([utterance], self.model.config, self.model.origin)])
        if self._state is not None and tuple(batch.features) != self._state.brings[1]:
            raise ConversationError(
                f"{utterance.where or 'LiveConversation'}: there are {_listed(batch.features)} features, but "
                f"{_listed(self._state.brings[1])} in the utterances before. Give the same for the whole conversation."
            )
        number = self._speakers.setdefault(utterance.speaker, len(self._speakers))
        batch = replace(batch, speakers=torch.full_like(batch.speakers, number), parties=number + 1)
        with torch.no_grad():
            (logits, _), self._state = self.model.step(batch.to(next(self.model.parameters()).device), self._state)
        return dict(zip(self.model.config.classes, logits[0, 0].softmax(-1).tolist(), strict=True))


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names)
