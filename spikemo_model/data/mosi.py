"""CMU-MOSI: videos of one speaker each, with text, audio and visual features and binary sentiment."""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch

from spikemo_model.data.corpus import SPLITS, Conversation, Corpus, DataError

CLASSES = ("negative", "positive")
_ARRAYS = {"text": "text100", "audio": "audio73", "visual": "video100"}
_ABOUT = {
    "text": "100-d utterance vectors of the transcripts",
    "audio": "73-d openSMILE functionals",
    "visual": "100-d 3D-CNN vectors of the face",
}
_SPLIT_FILE = "gcnet_standard_split_videos.json"


def read_mosi(root: Path) -> Corpus:
    """Read CMU-MOSI's 93 videos as dialogues of one speaker.

    Args:
        root: Holds ``cmu_mosi_trimodal.npz`` and ``gcnet_standard_split_videos.json``, the usual split.

    Returns:
        A corpus of 52 training, 10 validation and 31 test videos with the modalities "text", "audio" and "visual".

    Raises:
        DataError: A file is missing or truncated, lacks an array, or the two do not name the same videos.
    """
    path, split_path = root / "cmu_mosi_trimodal.npz", root / _SPLIT_FILE
    for needed in (path, split_path):
        if not needed.is_file():
            raise DataError(f"CMU-MOSI: there is no {needed}.")
    wanted = ["video", "segment", "transcript", "label2", *_ARRAYS.values()]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in wanted if name not in arrays]
            if missing:
                raise DataError(f"CMU-MOSI: {path} lacks the arrays {missing}; it has {sorted(arrays.files)}.")
            data = {name: arrays[name] for name in wanted}
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DataError(f"CMU-MOSI: {path} cannot be read ({error}). Copy the file again.") from error

    videos = {name: _video(name, data) for name in dict.fromkeys(data["video"].tolist())}
    splits = json.loads(split_path.read_text(encoding="utf-8"))
    unknown = sorted(set().union(*splits.values()) ^ videos.keys())
    if unknown:
        raise DataError(f"CMU-MOSI: {split_path} and {path} differ in the videos {unknown[:5]}.")
    chosen = {split: tuple(videos[name] for name in splits[split]) for split in SPLITS}
    return Corpus("CMU-MOSI", CLASSES, chosen, _ABOUT)


def _video(name: str, data: dict[str, np.ndarray]) -> Conversation:
    """The utterances of one video, in order."""
    own = np.flatnonzero(data["video"] == name)
    own = own[np.argsort(data["segment"][own], kind="stable")]
    return Conversation(
        id=name,
        features={m: torch.from_numpy(data[array][own].astype(np.float32)) for m, array in _ARRAYS.items()},
        speakers=(name,) * len(own),
        labels=torch.from_numpy(data["label2"][own].astype(np.int64)),
        utterance_ids=tuple(str(segment) for segment in data["segment"][own]),
        texts=tuple(data["transcript"][own].tolist()),
    )
