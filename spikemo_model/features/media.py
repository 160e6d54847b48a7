"""Sound and pictures of a clip, decoded by FFmpeg's libraries, which travel inside PyAV."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spikemo_model.data.corpus import DataError

SAMPLE_RATE = 16_000


def read_audio(path: Path) -> np.ndarray:
    """Decode the first sound track of a wav, flac or video file, as one channel.

    Args:
        path: Any file that FFmpeg reads.

    Returns:
        [samples] float32 in -1 ... 1 at `SAMPLE_RATE` Hz; channels are averaged.

    Raises:
        DataError: The file is missing, cannot be decoded or has no sound track.
    """
    from av import AudioResampler

    with _opened(path) as container:
        if not container.streams.audio:
            raise DataError(f"{path} has no sound track.")
        resampler = AudioResampler("fltp", rate=SAMPLE_RATE)  # FFmpeg's own mix to mono would be louder than its parts
        pieces = [piece for frame in container.decode(audio=0) for piece in resampler.resample(frame)]
        pieces += resampler.resample(None) if pieces else []
        return np.concatenate([np.zeros(0, np.float32), *(piece.to_ndarray().mean(0) for piece in pieces)])


def read_frames(path: Path, count: int, start: float = 0.0, end: float | None = None) -> list[np.ndarray]:
    """Decode up to ``count`` pictures of a video, evenly spaced.

    Args:
        path: Any file that FFmpeg reads.
        count: How many parts of equal length the video is cut into; each gives the picture shown in its middle, and
            no picture is given twice.
        start: First second.
        end: Last second; None for the end of the file.

    Returns:
        At least one picture, [height, width, 3] uint8 RGB.

    Raises:
        DataError: The file is missing, cannot be decoded, does not tell its length or has no pictures.
    """
    with _opened(path) as container:
        if not container.streams.video:
            raise DataError(f"{path} has no pictures.")
        stream = container.streams.video[0]
        if stream.duration is None and container.duration is None:
            raise DataError(f"{path} does not tell how long it is. Convert it to mp4.")
        length = float(stream.duration * stream.time_base) if stream.duration else container.duration / 1e6
        end = length if end is None else min(end, length)
        targets = [start + (i + 0.5) * (end - start) / count for i in range(count)]
        if start > 0:
            container.seek(int(start * 1e6))
        frames = list(_shown_at(targets, container.decode(stream))) if start < end else []
    if not frames:
        raise DataError(f"{path} has no pictures between {start:.2f} s and {end:.2f} s.")
    return frames


def attempt(name: tuple[str, ...], measure: Callable[..., Any], *args: Any) -> tuple[tuple[str, ...], Any]:
    """``name``, with what ``measure`` gives of a clip, or with what is wrong with the clip."""
    try:
        return name, measure(*args)
    except DataError as error:
        return name, str(error)


def _shown_at(targets: list[float], decoded: Iterator[Any]) -> Iterator[np.ndarray]:
    """The pictures on the screen at the times ``targets``, each once."""
    shown = None
    for frame in decoded:
        if shown is not None and frame.time > targets[0]:
            yield shown.to_ndarray(format="rgb24")
            targets = [target for target in targets if target >= frame.time]
            if not targets:
                return
        shown = frame
    if shown is not None:
        yield shown.to_ndarray(format="rgb24")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, with FFmpeg's errors in our words."""
    import av

    if not path.is_file():
        raise DataError(f"there is no {path}.")
    try:
        with av.open(path) as container:
            yield container
    except av.FFmpegError as error:
        raise DataError(f"{path} cannot be decoded ({error.strerror}). Copy the file again.") from error
