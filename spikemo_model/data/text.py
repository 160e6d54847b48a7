"""Text features made on the spot, for transcripts that come without any."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from spikemo_model.data.corpus import TextFeatures

logger = logging.getLogger("spikemo_model")

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_NGRAMS = "hashed n-grams, reduced on the training split"


def text_features(texts: dict[str, list[str]], encoder: str | None = None) -> TextFeatures:
    """Features of the transcripts of each split: of a Hugging Face encoder if one can be loaded, else of n-grams.

    Args:
        texts: Transcripts by split.
        encoder: A name on the hub or a local folder, which must load; "ngrams" for `ngram_features`; None tries
            `DEFAULT_ENCODER` and falls back to n-grams, saying so.

    Returns:
        The features, with what they are.

    Raises:
        OSError: The named encoder cannot be loaded; the message says what helps.
    """
    if encoder == "ngrams":
        return TextFeatures(ngram_features(texts), _NGRAMS)
    try:
        rows = encoder_features(texts, encoder or DEFAULT_ENCODER)
        name = encoder or DEFAULT_ENCODER
        return TextFeatures(rows, f"{name}, mean over tokens", {"name": "encoder_features", "encoder": name})
    except (ImportError, OSError, ValueError) as error:  # an empty or foreign folder is a ValueError to transformers
        if encoder is not None:
            raise OSError(
                f"text_features: the encoder {encoder!r} cannot be loaded ({first_line(error)}). Install the extra "
                '"features", give a local folder with its weights, or choose "ngrams".'
            ) from error
        logger.warning("text: %s cannot be loaded (%s); hashed n-grams instead", DEFAULT_ENCODER, first_line(error))
        return TextFeatures(ngram_features(texts), _NGRAMS)


def ngram_features(texts: dict[str, list[str]], width: int = 256, seed: int = 0) -> dict[str, Tensor]:
    """Hashed word 1- and 2-grams, weighted by rarity and reduced to ``width``, both on the training split.

    Args:
        texts: Transcripts by split, "train" among them.
        width: Width of the features; less where there are fewer training transcripts.
        seed: Of the reduction.

    Returns:
        Features [rows, width] by split.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.pipeline import make_pipeline

    width = min(width, len(texts["train"]) - 1)
    pipeline = make_pipeline(
        HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False, token_pattern=r"\w+|[!?.]"),
        TfidfTransformer(sublinear_tf=True),
        TruncatedSVD(width, random_state=seed),
    )
    pipeline.fit(texts["train"])
    return {split: torch.from_numpy(pipeline.transform(own)).float() for split, own in texts.items()}


def encoder_features(texts: dict[str, list[str]], encoder: str, batch_size: int = 32) -> dict[str, Tensor]:
    """Last hidden states of a Hugging Face encoder, mean over the tokens of an utterance.

    Args:
        texts: Transcripts by split.
        encoder: A name on the hub or a local folder; nothing of its own code is run.
        batch_size: Utterances at once.

    Returns:
        Features [rows, F] by split.

    Raises:
        ImportError: transformers is not installed.
        OSError: The encoder cannot be loaded.
    """
    tokenizer, model = load_encoder(encoder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    features = {}
    for split, own in texts.items():
        rows = []
        for start in tqdm(range(0, len(own), batch_size), desc=f"text features, {split}", leave=False):
            tokens = tokenizer(
                own[start : start + batch_size], padding=True, truncation=True, max_length=256, return_tensors="pt"
            ).to(device)
            with torch.no_grad():
                hidden = model(**tokens).last_hidden_state  # [rows, tokens, F]
            weight = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            rows.append(((hidden * weight).sum(1) / weight.sum(1)).float().cpu())
        features[split] = torch.cat(rows)
    return features


def load_encoder(encoder: str) -> tuple[Any, Any]:
    """Tokenizer and model, for evaluation, of a Hugging Face encoder; nothing of its own code is run.

    Raises:
        ImportError: transformers is not installed.
        OSError: The encoder cannot be loaded, or lacks weights.
        ValueError: The folder holds no encoder.
    """
    from transformers import AutoModel, AutoTokenizer

    local = Path(encoder).is_dir()
    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=local)
    try:
        model, info = AutoModel.from_pretrained(
            encoder, local_files_only=local, use_safetensors=True, output_loading_info=True
        )
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"its weights cannot be read: {first_line(error)}") from error
    missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]  # unused here, often left out
    if missing:
        raise OSError(f"it lacks {len(missing)} weights, {missing[0]} among them")
    return tokenizer, model.eval()


def first_line(error: BaseException) -> str:
    """First line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
