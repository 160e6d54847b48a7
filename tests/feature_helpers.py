"""Clips and data sets that the tests of feature extraction make for themselves."""

import csv
import os
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

LINES = [
    ("Joey", "Hey! How you doin'?", "joy"),
    ("Chandler", "Could this BE any longer \N{FACE WITH TEARS OF JOY}", "surprise"),
    ("Ross", "We were on a break!", "anger"),
    ("Rachel", "No.", "neutral"),
]


def write_clip(path: Path, pictures, fps=10, sound=None, rate=16_000, lossless=False) -> Path:
    """An H.264 video of ``pictures`` [height, width, 3], and AAC sound [samples] in -1 ... 1 if there is any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        if len(pictures):
            options = {"preset": "ultrafast", "crf": "0" if lossless else "18"}
            video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
            video.height, video.width = pictures[0].shape[:2]
            video.pix_fmt = "yuv420p"
        if sound is not None:
            audio = container.add_stream("aac", rate=rate, layout="mono")
        if len(pictures):
            for picture in pictures:
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(video.encode())
        if sound is not None and len(sound):
            frame = av.AudioFrame.from_ndarray(sound.astype(np.float32)[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def scene(*faces: tuple[Path, int, int, int], height=240, width=320) -> np.ndarray:
    """A grey picture with photographs of faces: (file, left, top, side) each."""
    picture = np.full((height, width, 3), 127, np.uint8)
    for path, left, top, side in faces:
        photograph = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        picture[top : top + side, left : left + side] = cv2.resize(photograph, (side, side))
    return picture


def write_meld(root: Path, clip: Path, dialogues=2) -> Path:
    """MELD's files as published, with ``clip`` for every utterance: ``dialogues`` of 4 to train on, 1 each to test."""
    folders = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
    for name, folder in folders.items():
        (root / folder).mkdir(parents=True)
        with (root / f"{name}_sent_emo.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID"])
            for d in range(dialogues if name == "train" else 1):
                for u, (speaker, text, emotion) in enumerate(LINES):
                    writer.writerow([d * 4 + u, text, speaker, emotion, "-", d, u])
                    os.link(clip, root / folder / f"dia{d}_utt{u}.mp4")
    return root
