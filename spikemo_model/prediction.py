"""What a trained model needs of a new conversation: features of every modality, extracted where they are not given."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikemo_model.config import SpikEmoConfig
from spikemo_model.conversation import ConversationError, Utterance
from spikemo_model.data.corpus import (
    Conversation,
    Corpus,
    DataError,
    reduce_by,
    reduced_by,
    scaled_by,
    standardise_by,
)
from spikemo_model.data.text import text_features
from spikemo_model.hub import Origin

_Constants = dict[str, tuple[Tensor, Tensor]]


def prepare(utterances: Sequence[Utterance], config: SpikEmoConfig, origin: Origin) -> Conversation:
    """Features of the modalities of a configuration, checked, extracted where they are not given, as it reads them.

    With ``modality_dropout``, a modality that no utterance has is left out.

    Args:
        utterances: At least one.
        config: Of the model.
        origin: Of the model: its extractors, and how it standardises and reduces.

    Raises:
        ConversationError: Features are missing and cannot be made, or are not finite or of another width.
        OSError: An extractor cannot be loaded.
    """
    if not utterances:
        raise ConversationError("predict: the conversation holds no utterance.")
    named = [replace(u, where=u.where or f"utterance {i}") for i, u in enumerate(utterances, start=1)]
    for u in named:
        unknown = sorted(u.features.keys() - config.modalities.keys())
        if unknown:
            raise ConversationError(
                f"{u.where}: the model has no modality {unknown[0]!r}, but {list(config.modalities)}."
            )
    dialogue = Conversation(
        id="conversation",
        features={},
        speakers=tuple(u.speaker for u in named),
        labels=torch.full((len(named),), -1),
        utterance_ids=tuple(u.where for u in named),
        texts=tuple(u.text for u in named),
    )
    features = {}
    for name, width in origin.raw_widths(config).items():
        if config.modality_dropout and not any(_has(u, name, origin) for u in named):
            continue
        rows = _rows(name, named, dialogue, origin)
        x = torch.stack([_checked(row, width, f"{u.where}: {name}") for row, u in zip(rows, named, strict=True)])
        x = scaled_by(x, origin.standardised[name]) if name in origin.standardised else x
        features[name] = reduced_by(x, origin.reduced[name]) if name in origin.reduced else x
    if not features:
        raise ConversationError(f"predict: no utterance has {' or '.join(config.modalities)} features. Give some.")
    return replace(dialogue, features=features)


def fit(corpus: Corpus, config: SpikEmoConfig, origin: Origin) -> Corpus:
    """The modalities of a configuration, standardised and reduced as its model has learned them.

    With ``modality_dropout``, those that the corpus has.

    Args:
        corpus: With raw features, or standardised, and then reduced, on the training split of the model.
        config: Of the model.
        origin: Of the model.

    Raises:
        ValueError: Modalities, widths or classes are others, or the corpus is standardised or reduced in another way.
    """
    there = [name for name in config.modalities if name in corpus.about]
    missing = [name for name in config.modalities if name not in there]
    if not there or (missing and not config.modality_dropout):
        raise ValueError(
            f"{corpus.name} has no {' or '.join(missing)} features, but {list(corpus.about)}. Choose data that has "
            "some, or a model that was trained to do without (train --modality-dropout)."
        )
    corpus = corpus.select(there)
    raw = origin.raw_widths(config)
    widths = {m: config.modalities[m].features if m in corpus.reduced else raw[m] for m in there}
    if corpus.widths != widths or corpus.classes != config.classes:
        raise ValueError(
            f"{corpus.name} has features {corpus.widths} and the classes {corpus.classes}, the model wants {widths} "
            f"and {config.classes}. Choose the data and text features that it was trained on."
        )
    # of a modality that the model remembers nothing of, features are taken as they are
    known = [m for m in corpus.about if m in origin.about or m in origin.standardised or m in origin.reduced]
    scales = _left(corpus, "standardised", corpus.standardised, origin.standardised, known)
    late = next((name for name in scales if name in corpus.reduced), None)
    if late:
        raise _otherwise(corpus, late, "standardised")
    reductions = _left(corpus, "reduced", corpus.reduced, origin.reduced, known)
    return reduce_by(standardise_by(corpus, scales), reductions)


def _left(corpus: Corpus, how: str, done: _Constants, wanted: _Constants, modalities: Sequence[str]) -> _Constants:
    """What is ``wanted`` of ``modalities`` and not ``done``; what is done must be as wanted."""
    for name in modalities:
        if name in done and not (name in wanted and all(map(torch.equal, done[name], wanted[name]))):
            raise _otherwise(corpus, name, how)
    return {name: wanted[name] for name in modalities if name in wanted and name not in done}


def _otherwise(corpus: Corpus, modality: str, how: str) -> ValueError:
    return ValueError(
        f"{corpus.name}: {modality} features are {how} in another way than those that the model was trained on. "
        "Choose the data and text features that it was trained on."
    )


def _has(utterance: Utterance, modality: str, origin: Origin) -> bool:
    """Whether there are features of a modality, or what its extractor makes them of."""
    made_by = origin.extractors.get(modality, {}).get("name")
    return (
        modality in utterance.features
        or made_by in ("encoder_features", "ContextEncoder")
        or (made_by in ("functionals", "FaceEncoder") and utterance.clip is not None)
    )


def _rows(modality: str, utterances: Sequence[Utterance], dialogue: Conversation, origin: Origin) -> list[Any]:
    """Features of each utterance: its own, or made by the extractor that the model remembers."""
    given = [u.features.get(modality) for u in utterances]
    lacking = next((u for x, u in zip(given, utterances, strict=True) if x is None), None)
    if lacking is None:
        return given
    settings = origin.extractors.get(modality, {})
    match settings:
        case {"name": "encoder_features", "encoder": encoder}:
            made = list(text_features({"conversation": list(dialogue.texts)}, encoder).rows["conversation"])
        case {"name": "ContextEncoder", "encoder": encoder, "max_tokens": max_tokens}:
            made = list(_context_encoder(encoder, max_tokens).features(dialogue))
        case {"name": "functionals" | "FaceEncoder"} if modality in origin.reduced or "reduced_to" not in settings:
            made = [_of_clip(u, modality, settings) if x is None else x for x, u in zip(given, utterances, strict=True)]
        case _:
            alone = "train --text ENCODER --modalities text, or " if modality == "text" else ""
            raise ConversationError(
                f"{lacking.where}: there are no {modality} features, and the model cannot make them: it knows them as "
                f"{origin.about.get(modality, 'unknown')!r}. Give them as features, or train on features whose "
                f"extractor it can call: {alone}extract CLIPS STORE and train --data-dir STORE."
            )
    return [own if x is None else x for x, own in zip(given, made, strict=True)]


def _of_clip(utterance: Utterance, modality: str, settings: dict[str, Any]) -> Tensor:
    """Features of the sound or the pictures of an utterance."""
    from spikemo_model.features import Pictures, faces, functionals

    if utterance.clip is None:
        raise ConversationError(f"{utterance.where}: there are no {modality} features and no clip. Give one of them.")
    try:
        if settings["name"] == "functionals":
            return functionals(utterance.clip)
        return _face_encoder(settings["encoder"])(faces(Pictures(utterance.clip), settings["pictures"]))
    except DataError as error:
        raise ConversationError(f"{utterance.where}: {error}") from error


@functools.lru_cache(maxsize=1)
def _context_encoder(encoder: str, max_tokens: int) -> Any:
    from spikemo_model.features import ContextEncoder

    return ContextEncoder(encoder, max_tokens)


@functools.lru_cache(maxsize=1)
def _face_encoder(encoder: str) -> Any:
    from spikemo_model.features import FaceEncoder

    return FaceEncoder(encoder)


def _checked(x: Any, width: int, what: str) -> Tensor:
    """Features [width], finite, as float32."""
    try:
        x = x.detach().cpu().float() if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x, np.float64)).float()
    except (TypeError, ValueError, OverflowError) as error:
        raise ConversationError(f"{what} features must be numbers ({error}).") from error
    if x.shape != (width,):
        raise ConversationError(f"{what} features must have shape ({width},), got {tuple(x.shape)}.")
    if not x.isfinite().all():
        raise ConversationError(f"{what} features hold NaN or infinity. Extract them again.")
    return x
