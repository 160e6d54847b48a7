"""Audio features: openSMILE's ComParE 2016 functionals."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikemo_model.data.corpus import Corpus, DataError, reduce_by
from spikemo_model.features.media import SAMPLE_RATE, read_audio

# openSMILE's longest window is 60 ms.
_SHORTEST = int(0.06 * SAMPLE_RATE)


def functionals(path: Path) -> Tensor:
    """Measure the sound of a clip: 6373 statistics of loudness, spectrum, pitch and voice quality over time.

    Source: the ComParE 2016 feature set (Schuller et al. 2016) by openSMILE; ``opensmile.Smile(...).feature_names``
    gives the names in order.

    Args:
        path: A wav, flac or video file. Silence is measured like any sound. Long clips are measured whole.

    Returns:
        [6373] float32, raw: in the units of each statistic.

    Raises:
        DataError: The sound cannot be read or is shorter than 60 ms.
    """
    signal = read_audio(path)
    if len(signal) < _SHORTEST:
        raise DataError(f"{path} has {len(signal) / SAMPLE_RATE:.3f} s of sound; openSMILE needs 0.06 s.")
    return torch.tensor(_smile().process_signal(signal, SAMPLE_RATE).to_numpy()[0])


def reduce_width(corpus: Corpus, modality: str, width: int) -> Corpus:
    """Reduce the features of a modality by principal component analysis, fitted on the training split.

    Args:
        corpus: Any; standardise it before.
        modality: Which of its modalities.
        width: Components kept, those of the largest variance.

    Returns:
        The corpus with those features changed, and with centre and axes of the reduction for features to come.

    Raises:
        ValueError: ``width`` is larger than the features' width or the number of training utterances, or the modality
            is reduced already.
    """
    if modality in corpus.reduced:
        raise ValueError(f"reduce_width: {modality} is reduced already. Start from features as they were before.")
    x = torch.cat([d.features[modality] for d in corpus.splits["train"]])
    if not 1 <= width <= min(x.shape):
        raise ValueError(
            f"reduce_width: width must be 1 ... {min(x.shape)} for {x.shape[0]} training utterances x {x.shape[1]} "
            f"{modality} features, got {width}."
        )
    from sklearn.decomposition import PCA

    pca = PCA(width, random_state=0).fit(x.numpy())
    axes = torch.from_numpy(pca.components_.T.copy()).float()
    return replace(
        reduce_by(corpus, {modality: (torch.from_numpy(pca.mean_).float(), axes)}),
        about={**corpus.about, modality: f"{corpus.about[modality]}, reduced to {width} by PCA on train"},
        extractors={**corpus.extractors, modality: {**corpus.extractors.get(modality, {}), "reduced_to": width}},
    )


@functools.cache
def _smile() -> Any:
    import opensmile

    return opensmile.Smile(opensmile.FeatureSet.ComParE_2016, opensmile.FeatureLevel.Functionals)
