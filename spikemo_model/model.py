"""SpikEmo: the modality level, the feature level, fusion and the classifier, assembled."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from spikemo_model.batch import DialogueBatch
from spikemo_model.config import SpikEmoConfig
from spikemo_model.context import DialogueState, ModalityEncoder, ModalityEncoders
from spikemo_model.conversation import Utterance
from spikemo_model.dswa import DSWAState, DynamicSpikingWeightAdaptation
from spikemo_model.fusion import Classifier, MultiAttn, Rows
from spikemo_model.hub import Pretrained


class SpikEmoOutput(NamedTuple):
    """What `SpikEmo` returns: logits [B, L, C], and the fused features [B, L, D] by modality."""

    logits: Tensor
    fused: dict[str, Tensor]


class SpikEmoState(NamedTuple):
    """Where causal dialogues stand: what they bring at every step, their context, each DSWA, and the rows of fusion.

    ``brings`` are the number of dialogues and the modalities that there are.
    """

    brings: tuple[int, tuple[str, ...]]
    context: DialogueState | None
    dswa: dict[str, DSWAState]
    rows: list[Rows] | None


class SpikEmo(Pretrained):
    """Emotion of every utterance of a conversation, from text, audio and visual features or any of them.

    ::

        features --ModalityEncoder--> [B, L, D] --DSWA, eq. (2)--> --MultiAttn, eqs. (3, 4)--> --Classifier--> logits

    Source: Yu et al., "SpikEmo: Enhancing Emotion Recognition With Spiking Temporal Dynamics in Conversations".
    Padding and the other dialogues of a batch never change an utterance's logits (except with
    ``published_behaviour``).

    Args:
        config: The configuration; presets are `meld` and `iemocap`.

    Example:
        >>> from spikemo_model.config import ModalityConfig
        >>> model = SpikEmo(SpikEmoConfig({"text": ModalityConfig(8)}, dim=16))
        >>> batch = DialogueBatch({"text": torch.randn(2, 3, 8)}, torch.zeros(2, 3).long(), torch.ones(2, 3).bool())
        >>> model(batch).logits.shape
        torch.Size([2, 3, 7])
    """

    def __init__(self, config: SpikEmoConfig) -> None:
        super().__init__(config)
        names = list(config.modalities)
        self.encoders = ModalityEncoders(
            {
                name: ModalityEncoder(modality, config.dim, config.dropout, config.input_dropout)
                for name, modality in config.modalities.items()
            }
        )
        if config.dswa is None:
            self.dswa = nn.ModuleDict()
        else:
            owners = ["shared"] if config.dswa.shared else names
            published = config.published_behaviour
            self.dswa = nn.ModuleDict(
                {
                    owner: DynamicSpikingWeightAdaptation(config.dim, config.dswa, published, config.is_causal)
                    for owner in owners
                }
            )
        self.fusion = MultiAttn(names, config.dim, config.fusion, config.dropout, config.is_causal)
        self.classifier = Classifier(names, config.dim, config.classifier_hidden, len(config.classes), config.dropout)

    def forward(self, batch: DialogueBatch) -> SpikEmoOutput:
        """Logits and fused features of ``batch``.

        Modalities may be missing if ``config.modality_dropout`` is above 0.

        Raises:
            ValueError: A modality is missing from the batch, or its features have another width.
        """
        encoded = self.encoders(self._checked(batch), batch.speakers, batch.mask, batch.parties)
        adapted = self._adapt(encoded, batch.mask)
        fused = self.fusion(adapted, None if self.config.published_behaviour else batch.mask)
        return SpikEmoOutput(self.classifier(fused), fused)

    def step(self, batch: DialogueBatch, state: SpikEmoState | None = None) -> tuple[SpikEmoOutput, SpikEmoState]:
        """Go on with causal dialogues by their next utterances, one or more; only with ``config.is_causal``.

        Spiking attention and context cost the same at every utterance; fusion keeps one row of keys and values for each
        of the past utterances.

        Args:
            batch: The next L utterances of B dialogues, without padding; speakers are counted as in the whole dialogue.
            state: What the call before returned; None at the start.

        Returns:
            Logits and fused features of these utterances, as one call with the whole dialogue gives them up to
            rounding, and the state.

        Raises:
            ValueError: The model is not causal or trains, or the batch has padding, no utterance, another number of
                dialogues or other modalities than the one before, or lacks a modality.

        Example:
            >>> from spikemo_model.config import ModalityConfig
            >>> config = SpikEmoConfig({"text": ModalityConfig(8, "forward")}, dim=16, is_causal=True)
            >>> model, state = SpikEmo(config).eval(), None
            >>> with torch.no_grad():
            ...     for t in range(3):
            ...         text, speaker = torch.randn(1, 1, 8), torch.tensor([[t % 2]])
            ...         one = DialogueBatch({"text": text}, speaker, torch.ones(1, 1).bool())
            ...         (logits, _), state = model.step(one, state)
            >>> logits.shape
            torch.Size([1, 1, 7])
        """
        if not self.config.is_causal or self.training:
            raise ValueError("SpikEmo: step needs a configuration with is_causal=True, and eval().")
        if not batch.mask.numel() or not batch.mask.all():
            raise ValueError("SpikEmo: step takes utterances without padding; give dialogues that pause a call each.")
        features = self._checked(batch)
        brings = (len(batch), tuple(features))
        before, context, dswa, rows = state or SpikEmoState(brings, None, {}, None)
        if brings != before:
            raise ValueError(
                f"SpikEmo: step goes on with the dialogues and modalities of the step before, {before[0]} of "
                f"{list(before[1])}, got {brings[0]} of {list(brings[1])}."
            )
        encoded, context = self.encoders.go_on(features, batch.speakers, batch.mask, context, batch.parties)
        adapted, dswa = self._adapt_on(encoded, dswa)
        fused, rows = self.fusion.step(adapted, rows)
        return SpikEmoOutput(self.classifier(fused), fused), SpikEmoState(brings, context, dswa, rows)

    def predict(self, conversation: Sequence[Utterance]) -> list[dict[str, float]]:
        """Probability of each emotion of every utterance of a conversation; the model is in eval mode afterwards.

        Args:
            conversation: At least one utterance. Text, audio and visual features that are not given are made by the
                extractors that the model remembers, if it does.

        Returns:
            By utterance, emotion to probability, which add up to 1.

        Raises:
            ConversationError: Features are missing, not finite or of another width; the message names the utterance.
            OSError: An extractor cannot be loaded.
        """
        from spikemo_model.evaluation import predict
        from spikemo_model.prediction import prepare

        (rows,) = predict(self, [prepare(conversation, self.config, self.origin)])
        return [dict(zip(self.config.classes, row.tolist(), strict=True)) for row in rows]

    def _checked(self, batch: DialogueBatch) -> dict[str, Tensor]:
        """The features that the model reads: all, at the widths of the configuration, or those that there are."""
        missing = [name for name in self.encoders if name not in batch.features]
        if missing and not self.config.modality_dropout:
            raise ValueError(
                f"SpikEmo: the batch lacks the modality {missing[0]!r}; it has {sorted(batch.features)}. A model that "
                "was trained with modality_dropout does without."
            )
        if len(missing) == len(self.encoders):
            raise ValueError(f"SpikEmo: the batch has none of {list(self.encoders)}; it has {sorted(batch.features)}.")
        features = {name: batch.features[name] for name in self.encoders if name not in missing}
        for name, x in features.items():
            wanted = self.config.modalities[name].features
            if x.shape[-1] != wanted:
                raise ValueError(f"SpikEmo: {name} features must be {wanted} wide, got {x.shape[-1]}.")
        return features

    def _adapt(self, encoded: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """DSWA on every modality."""
        if self.config.published_behaviour:  # its DSWA is shared
            shared = cast(DynamicSpikingWeightAdaptation, self.dswa["shared"])
            try:
                return {name: shared(x, mask) for name, x in encoded.items()}
            finally:
                shared.reset()
        return self._by_owner(encoded, lambda owner, x: self.dswa[owner](x, mask.repeat(len(x) // len(mask), 1)))

    def _adapt_on(
        self, encoded: dict[str, Tensor], states: dict[str, DSWAState]
    ) -> tuple[dict[str, Tensor], dict[str, DSWAState]]:
        """`_adapt` for the next utterances."""
        after: dict[str, DSWAState] = {}

        def step(owner: str, x: Tensor) -> Tensor:
            dswa = cast(DynamicSpikingWeightAdaptation, self.dswa[owner])
            x, after[owner] = dswa.step(x, states.get(owner))
            return x

        return self._by_owner(encoded, step), after

    def _by_owner(self, encoded: dict[str, Tensor], adapt: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """``adapt`` of each modality on its own, or of all as one batch where they share DSWA's weights."""
        if not self.dswa:
            return encoded
        if "shared" not in self.dswa:
            return {name: adapt(name, x) for name, x in encoded.items()}
        together = adapt("shared", torch.cat(list(encoded.values())))
        return dict(zip(encoded, together.chunk(len(encoded)), strict=True))
