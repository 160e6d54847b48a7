"""Feature store: a corpus on disk, as safetensors and a JSON index."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spikemo_model.data.corpus import SPLITS, Conversation, Corpus, DataError

_INDEX, _FEATURES = "index.json", "features.safetensors"
_FORMAT = "spikemo-features-1"


def save_corpus(corpus: Corpus, folder: Path) -> None:
    """Write ``corpus`` to a new ``folder``; it appears complete or not at all.

    Layout: ``features.safetensors`` holds ``<split>/<modality>`` [utterances, F] and ``<split>/labels``, and
    ``mean/<modality>`` and ``std/<modality>`` [F] of what was standardised, ``centre/<modality>`` [F] and
    ``axes/<modality>`` [F, K] of what was reduced; ``index.json`` names the dialogues of each split in the order of
    the rows.

    Raises:
        FileExistsError: ``folder`` is there already.
    """
    if folder.exists():
        raise FileExistsError(f"save_corpus: {folder} exists already. Choose another folder or remove it.")
    index: dict[str, Any] = {
        "format": _FORMAT,
        "name": corpus.name,
        "classes": corpus.classes,
        "about": corpus.about,
        "notes": corpus.notes,
        "extractors": corpus.extractors,
        "splits": {},
    }
    tensors = {}
    for split in SPLITS:
        dialogues = corpus.splits[split]
        index["splits"][split] = [
            {"id": d.id, "speakers": d.speakers, "utterance_ids": d.utterance_ids, "texts": d.texts} for d in dialogues
        ]
        tensors[f"{split}/labels"] = torch.cat([d.labels for d in dialogues])
        for name in corpus.about:
            tensors[f"{split}/{name}"] = torch.cat([d.features[name] for d in dialogues])
    for name, (mean, std) in corpus.standardised.items():
        tensors |= {f"mean/{name}": mean, f"std/{name}": std}
    for name, (centre, axes) in corpus.reduced.items():
        tensors |= {f"centre/{name}": centre, f"axes/{name}": axes}
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(tensors, unfinished / _FEATURES)
        (unfinished / _INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=1), encoding="utf-8")
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def load_corpus(folder: Path) -> Corpus:
    """Read what `save_corpus` wrote.

    Raises:
        DataError: A file is missing, truncated or of another format, or the two do not fit together.
    """
    for name in (_INDEX, _FEATURES):
        if not (folder / name).is_file():
            raise DataError(f"feature store: there is no {folder / name}. Make the store with import_legacy_features.")
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        found = index.get("format")
    except (ValueError, AttributeError) as error:
        raise DataError(f"feature store: {folder / _INDEX} cannot be read ({error}). Make the store again.") from error
    if found != _FORMAT:
        raise DataError(f"feature store: {folder / _INDEX} must be of format {_FORMAT!r}, got {found!r}.")
    try:
        tensors = load_file(folder / _FEATURES)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"feature store: {folder / _FEATURES} cannot be read ({error}). Make the store again."
        ) from error
    try:
        splits = {split: _read_split(index, tensors, split) for split in SPLITS}
        parts = index["name"], tuple(index["classes"]), splits, index["about"], tuple(index["notes"])
        extractors = index.get("extractors", {})
        scales = {m: (tensors[f"mean/{m}"], tensors[f"std/{m}"]) for m in index["about"] if f"mean/{m}" in tensors}
        reduced = {m: (tensors[f"centre/{m}"], tensors[f"axes/{m}"]) for m in index["about"] if f"axes/{m}" in tensors}
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(
            f"feature store: {folder / _INDEX} and {_FEATURES} do not fit together ({error!r}). Make the store again."
        ) from error
    return Corpus(*parts, scales, reduced, extractors)


def _read_split(index: dict[str, Any], tensors: dict[str, torch.Tensor], split: str) -> tuple[Conversation, ...]:
    """Dialogues of one split, cut from its tensors."""
    entries = index["splits"][split]
    lengths = [len(entry["speakers"]) for entry in entries]
    columns = {name: tensors[f"{split}/{name}"].split(lengths) for name in index["about"]}
    labels = tensors[f"{split}/labels"].split(lengths)
    return tuple(
        Conversation(
            id=entry["id"],
            features={name: rows[i].clone() for name, rows in columns.items()},
            speakers=tuple(entry["speakers"]),
            labels=labels[i].clone(),
            utterance_ids=tuple(entry["utterance_ids"]),
            texts=tuple(entry["texts"]),
        )
        for i, entry in enumerate(entries)
    )
