"""MELD and IEMOCAP as published: conversations from their text files, and where the clip of each utterance is."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from spikemo_model.config import IEMOCAP_EMOTIONS
from spikemo_model.data.corpus import SPLITS, Conversation, Corpus, DataError, TextFeatures
from spikemo_model.data.meld import FILES, read_meld, read_transcripts
from spikemo_model.features.visual import Pictures

_MELD_FOLDERS = {"train": "train_splits", "valid": "dev_splits_complete", "test": "output_repeated_splits_test"}
_IEMOCAP_CODES = dict(zip(("hap", "sad", "neu", "ang", "exc", "fru"), IEMOCAP_EMOTIONS, strict=True))
_TURN = re.compile(r"^\[(\d+\.\d+) - (\d+\.\d+)\]\t(\w+)\t(\w{3})\t", re.MULTILINE)
_LINE = re.compile(r"^(\w+) \[[\d.]+-[\d.]+\]: (.*)$", re.MULTILINE)
# Every tenth dialogue of sessions 1 to 4 is for validation: 108, 12 and 31 dialogues, as in the paper.
_VALID_EVERY = 10


class Clip(NamedTuple):
    """The recording of one utterance.

    Args:
        sound: File that holds its sound and no other.
        pictures: Where its speaker is to be seen.
    """

    sound: Path
    pictures: Pictures


class Release(NamedTuple):
    """A data set as published.

    Args:
        corpus: Its conversations, without features.
        clips: By split, dialogue and utterance id; a file may be missing.
    """

    corpus: Corpus
    clips: dict[tuple[str, str, str], Clip]


def read_release(root: Path) -> Release:
    """Read MELD's or IEMOCAP's own files.

    Args:
        root: MELD: ``{train,dev,test}_sent_emo.csv`` and the folders ``train_splits``, ``dev_splits_complete`` and
            ``output_repeated_splits_test``, these also one folder down in ``train``, ``dev`` and ``test``.
            IEMOCAP: ``IEMOCAP_full_release``, with ``Session1`` ... ``Session5``. Session 5 is the test split.

    Raises:
        DataError: It is neither, or a text file is missing or malformed.
    """
    if (root / "Session1").is_dir():
        return _read_iemocap(root)
    if any((root / f"{name}_sent_emo.csv").is_file() for name in FILES.values()):
        return _read_meld(root)
    raise DataError(
        f"{root} holds neither MELD (train_sent_emo.csv, dev_sent_emo.csv, test_sent_emo.csv) nor IEMOCAP (Session1 "
        "... Session5). Give the folder that holds these."
    )


def _read_meld(root: Path) -> Release:
    nothing = {split: torch.zeros(len(rows), 0) for split, rows in read_transcripts(root).items()}
    corpus = read_meld(root, TextFeatures(nothing, ""), None)
    clips: dict[tuple[str, str, str], Clip] = {}
    for split, folder in _MELD_FOLDERS.items():
        below = root / FILES[split] / folder
        place = below if below.is_dir() else root / folder
        for dialogue in corpus.splits[split]:
            for utterance in dialogue.utterance_ids:
                path = place / f"{dialogue.id}_{utterance}.mp4"
                clips[split, dialogue.id, utterance] = Clip(path, Pictures(path))
    return Release(corpus, clips)


def _read_iemocap(root: Path) -> Release:
    """Sentences with one of the six emotions; the others have no place in the published split either."""
    splits: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    clips: dict[tuple[str, str, str], Clip] = {}
    for session in range(1, 6):
        folder = root / f"Session{session}"
        evaluations = sorted((folder / "dialog" / "EmoEvaluation").glob("Ses*.txt"))
        if not evaluations:
            raise DataError(f"IEMOCAP: there are no files Ses*.txt in {folder / 'dialog' / 'EmoEvaluation'}.")
        for path in evaluations:
            split = "test" if session == 5 else "train"
            if split == "train" and (len(splits["train"]) + len(splits["valid"])) % _VALID_EVERY == _VALID_EVERY - 1:
                split = "valid"
            dialogue, own = _read_iemocap_dialogue(folder, path)
            splits[split].append(dialogue)
            clips |= {(split, dialogue.id, name): clip for name, clip in own.items()}
    corpus = Corpus("IEMOCAP", IEMOCAP_EMOTIONS, {k: tuple(v) for k, v in splits.items()}, {"text": ""})
    return Release(corpus, clips)


def _read_iemocap_dialogue(folder: Path, path: Path) -> tuple[Conversation, dict[str, Clip]]:
    """One dialogue, in the order of time, and the clips of its utterances."""
    transcript = folder / "dialog" / "transcriptions" / path.name
    if not transcript.is_file():
        raise DataError(f"IEMOCAP: there is no {transcript}.")
    said = dict(_LINE.findall(transcript.read_text(encoding="utf-8", errors="replace")))
    turns = [
        (float(start), float(end), name, _IEMOCAP_CODES[code])
        for start, end, name, code in _TURN.findall(path.read_text(encoding="utf-8", errors="replace"))
        if code in _IEMOCAP_CODES
    ]
    turns.sort()
    unsaid = [name for _, _, name, _ in turns if name not in said]
    if unsaid or not turns:
        raise DataError(f"IEMOCAP: {transcript} lacks {unsaid or 'all sentences'} of {path}.")
    dialogue = path.stem  # Ses01F_impro01: session 1, where the woman wears the markers and is on the left
    clips: dict[str, Clip] = {}
    speakers = []
    for start, end, name, _ in turns:
        speakers.append(name.removeprefix(f"{dialogue}_")[0])
        side: Literal["left", "right"] = "left" if speakers[-1] == dialogue[5] else "right"
        film = folder / "dialog" / "avi" / "DivX" / f"{dialogue}.avi"
        sound = folder / "sentences" / "wav" / dialogue / f"{name}.wav"
        clips[name] = Clip(sound, Pictures(film, start, end, side))
    conversation = Conversation(
        id=dialogue,
        features={"text": torch.zeros(len(turns), 0)},
        speakers=tuple(speakers),
        labels=torch.tensor([IEMOCAP_EMOTIONS.index(emotion) for *_, emotion in turns]),
        utterance_ids=tuple(clips),
        texts=tuple(said[name] for name in clips),
    )
    return conversation, clips
