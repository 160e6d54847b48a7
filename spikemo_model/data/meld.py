"""MELD: transcripts, speakers and labels from its CSV files, features from the files beside them."""

import csv
import math
import re
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spikemo_model.config import MELD_EMOTIONS
from spikemo_model.data.corpus import Conversation, Corpus, DataError, TextFeatures

# Names of the splits in MELD's file names.
FILES = {"train": "train", "valid": "dev", "test": "test"}
_COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
_PROSODY = (
    "duration", "avg_intensity", "intensity_variation", "avg_pitch",
    "pitch_std", "pitch_range", "articulation_rate", "mean_hnr",
)  # fmt: skip


def read_meld(
    root: Path, text: str | TextFeatures | None = "frozen", audio: Literal["prosody"] | None = "prosody"
) -> Corpus:
    """Read MELD from a folder of its files.

    Dialogues are joined on (split, Dialogue_ID, Utterance_ID), and utterances ordered by their id, which has gaps.

    Args:
        root: Holds ``{train,dev,test}_sent_emo.csv`` and the features.
        text: An array of ``{split}_text_minilm.npz`` ("frozen" or "finetuned"), or features that were made from the
            transcripts (`read_transcripts`); None leaves text out.
        audio: "prosody" for ``{split}_prosody8.csv``; None leaves audio out. An utterance without a measurement
            (no clip, unvoiced) gets the mean of the training split.

    Returns:
        A corpus with the modalities "text", "audio" or both.

    Raises:
        DataError: A file is missing, truncated or malformed; the message names it and the cure.
    """
    rows = {split: _read_transcripts(root / f"{name}_sent_emo.csv") for split, name in FILES.items()}
    features: dict[str, dict[str, Tensor]] = defaultdict(dict)
    about = {}
    if isinstance(text, str):
        rows_of = {split: _read_array(root / f"{name}_text_minilm.npz", text) for split, name in FILES.items()}
        text = TextFeatures(rows_of, f"MiniLM sentence vectors, {text}")
    extractors = {}
    if text is not None:
        about["text"] = text.about
        if text.extractor:
            extractors["text"] = text.extractor
        for split in FILES:
            features[split]["text"] = text.rows[split]
    if audio is not None:
        about["audio"] = "8 measures of prosody (Praat)"
        measured = {split: _read_prosody(root / f"{name}_prosody8.csv", rows[split]) for split, name in FILES.items()}
        means = measured["train"].nanmean(0)
        for split, x in measured.items():
            features[split]["audio"] = torch.where(x.isnan(), means, x).float()
    if not about:
        raise ValueError("read_meld: choose text, audio or both.")
    splits = {split: _dialogues(rows[split], features[split], root / f"{FILES[split]}_sent_emo.csv") for split in rows}
    return Corpus("MELD", MELD_EMOTIONS, splits, about, _repeated_scenes(splits), extractors=extractors)


def read_transcripts(root: Path) -> dict[str, list[str]]:
    """Transcripts of each split, in the order of its CSV."""
    return {
        split: [row["Utterance"] for row in _read_transcripts(root / f"{name}_sent_emo.csv")]
        for split, name in FILES.items()
    }


def _read_transcripts(path: Path) -> list[dict[str, str]]:
    """Rows of a transcript file, checked."""
    if not path.is_file():
        raise DataError(f"MELD: there is no {path}. Copy MELD's three *_sent_emo.csv files to {path.parent}.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"MELD: {path} lacks the columns {missing}. Is it MELD's own file?")
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if any(row[name] is None for name in _COLUMNS) or not row["Utterance_ID"].isdigit():
            raise DataError(f"MELD: {path}, row {number} is cut short. Copy the file again.")
        if row["Emotion"] not in MELD_EMOTIONS:
            where = f"dialogue {row['Dialogue_ID']}, utterance {row['Utterance_ID']}"
            raise DataError(
                f"MELD: {path}, {where}: unknown emotion {row['Emotion']!r}; known are {', '.join(MELD_EMOTIONS)}."
            )
    if not rows:
        raise DataError(f"MELD: {path} has no rows. Copy the file again.")
    return rows


def _read_array(path: Path, name: str) -> Tensor:
    """One array [rows, F] of an ``.npz`` file, float32; pickled objects are refused."""
    if not path.is_file():
        raise DataError(f"MELD: there is no {path}, which holds the {name!r} text features.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if name not in arrays:
                raise DataError(f"MELD: {path} has no array {name!r}; it has {sorted(arrays.files)}.")
            array = arrays[name]
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"MELD: {path} cannot be read ({error}). Copy the file again.") from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(f"MELD: {path}: {name!r} must be rows x features, got {array.dtype} {array.shape}.")
    return torch.from_numpy(array.astype(np.float32))


def _read_prosody(path: Path, rows: list[dict[str, str]]) -> Tensor:
    """Prosody [rows, 8] in the order of the transcripts, NaN where not measured; float64.

    Durations are taken as logarithms: a few of MELD's clips last minutes by mistake.
    """
    if not path.is_file():
        raise DataError(f"MELD: there is no {path}, which holds the prosody. Leave audio out with audio=None.")
    measured = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in ("filename", *_PROSODY) if name not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"MELD: {path} lacks the columns {missing}.")
        for number, row in enumerate(reader, start=2):
            try:
                values = [float(row[name]) if row[name] else math.nan for name in _PROSODY]
            except (TypeError, ValueError) as error:
                raise DataError(f"MELD: {path}, row {number} cannot be read ({error}). Copy the file again.") from error
            if any(map(math.isinf, values)):
                raise DataError(f"MELD: {path}, row {number} ({row['filename']}) holds infinity.")
            values[0] = math.log(max(values[0], 1e-3))
            measured[row["filename"]] = values
    unmeasured = [math.nan] * len(_PROSODY)
    names = [f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}.wav" for row in rows]
    found = sum(name in measured for name in names)
    if found < 0.9 * len(names):
        raise DataError(
            f"MELD: {path} covers {found} of {len(names)} utterances of its transcripts. Is it cut short, or of "
            "another split?"
        )
    return torch.tensor([measured.get(name, unmeasured) for name in names], dtype=torch.float64)


def _dialogues(rows: list[dict[str, str]], features: dict[str, Tensor], path: Path) -> tuple[Conversation, ...]:
    """Group the rows of one split to dialogues."""
    for name, x in features.items():
        if len(x) != len(rows):
            raise DataError(f"MELD: {path} has {len(rows)} utterances, but there are {len(x)} {name} features.")
    members: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        members[int(row["Dialogue_ID"])].append(i)
    dialogues = []
    for dialogue, unordered in members.items():
        indices = sorted(unordered, key=lambda i: int(rows[i]["Utterance_ID"]))
        own = [rows[i] for i in indices]
        dialogues.append(
            Conversation(
                id=f"dia{dialogue}",
                features={name: x[indices] for name, x in features.items()},
                speakers=tuple(row["Speaker"] for row in own),
                labels=torch.tensor([MELD_EMOTIONS.index(row["Emotion"]) for row in own]),
                utterance_ids=tuple(f"utt{row['Utterance_ID']}" for row in own),
                texts=tuple(row["Utterance"] for row in own),
            )
        )
    return tuple(dialogues)


def _repeated_scenes(splits: dict[str, tuple[Conversation, ...]]) -> tuple[str, ...]:
    """Say which test dialogues repeat a scene of the training split: most of their 5-word phrases are in it."""
    origin: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for dialogue in splits["train"]:
        for phrase in _phrases(dialogue):
            origin[phrase].add(dialogue.id)
    notes = []
    for dialogue in splits["test"]:
        phrases = _phrases(dialogue)
        shared = Counter(known for phrase in phrases for known in origin.get(phrase, ()))
        if len(phrases) >= 10 and shared and max(shared.values()) >= len(phrases) / 2:
            notes.append(
                f"Test dialogue {dialogue.id} repeats a scene of training dialogue {shared.most_common(1)[0][0]}."
            )
    return tuple(notes)


def _phrases(dialogue: Conversation) -> set[tuple[str, ...]]:
    """All runs of five words of a dialogue."""
    words = re.findall(r"[a-z]+", " ".join(dialogue.texts).lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
