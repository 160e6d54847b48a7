"""Visual features after VisExtNet: faces of a clip, embedded by a ResNet-101, mean over pictures."""

import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from spikemo_model.data.text import first_line
from spikemo_model.features.media import read_frames

DEFAULT_FACE_ENCODER = "microsoft/resnet-101"
_SIZE = 224
# The detector looks at pictures of at most this height, for faces of at least 1/15 of it.
_HEIGHT = 480
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


class Pictures(NamedTuple):
    """Where to look for a speaker.

    Args:
        path: Video file.
        start: First second.
        end: Last second; None for the end of the file.
        side: Half of the picture that shows the speaker; None for all of it.
    """

    path: Path
    start: float = 0.0
    end: float | None = None
    side: Literal["left", "right"] | None = None


def faces(pictures: Pictures, count: int = 20) -> Tensor:
    """Cut out the largest face of each of up to ``count`` pictures of a clip.

    Returns:
        [n, 224, 224, 3] uint8 RGB, n <= count: pictures without a face are left out, and n may be 0.

    Raises:
        DataError: The pictures cannot be read.
    """
    import cv2

    found = []
    for frame in read_frames(pictures.path, count, pictures.start, pictures.end):
        middle = frame.shape[1] // 2
        half = {"left": frame[:, :middle], "right": frame[:, middle:], None: frame}[pictures.side]
        box = largest_face(half)
        if box is not None:
            x, y, side = box
            found.append(cv2.resize(half[y : y + side, x : x + side], (_SIZE, _SIZE), interpolation=cv2.INTER_AREA))
    return torch.from_numpy(np.stack(found)) if found else torch.zeros(0, _SIZE, _SIZE, 3, dtype=torch.uint8)


def largest_face(picture: np.ndarray) -> tuple[int, int, int] | None:
    """Find the largest frontal face of a picture by OpenCV's Haar cascade ``frontalface_alt``.

    Args:
        picture: [height, width, 3] uint8 RGB.

    Returns:
        Left and upper edge and side of a square in pixels, or None.
    """
    import cv2

    scale = min(1.0, _HEIGHT / picture.shape[0])
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    least = max(1, small.shape[0] // 15)
    boxes = _cascade().detectMultiScale(small, scaleFactor=1.1, minNeighbors=5, minSize=(least, least))
    if len(boxes) == 0:
        return None
    x, y, side, _ = max(boxes, key=lambda box: box[2])
    return int(x / scale), int(y / scale), int(side / scale)


class FaceEncoder:
    """A ResNet that turns the faces of a clip into one vector.

    Args:
        weights: Local folder with a ResNet's ``config.json`` and ``model.safetensors`` in transformers' format, e.g.
            one trained on VGGFace2, or a name on the Hugging Face hub. Mean and standard deviation of pixels come
            from its ``preprocessor_config.json``, else ImageNet's.

    Raises:
        OSError: The weights cannot be loaded; the message says what to download and where to put it.
    """

    def __init__(self, weights: str = DEFAULT_FACE_ENCODER) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = _load(weights).eval().to(self.device)
        settings = Path(weights) / "preprocessor_config.json"
        read = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        constants = _IMAGENET | {name: value for name, value in read.items() if name in _IMAGENET}
        self.mean, self.std = (torch.tensor(constants[name], device=self.device).view(3, 1, 1) for name in _IMAGENET)

    def __call__(self, faces: Tensor) -> Tensor:
        """Embed faces [n, 224, 224, 3] uint8: mean of the pooled last layer, [F] float32; zeros if n is 0."""
        if len(faces) == 0:
            return torch.zeros(self.model.config.hidden_sizes[-1])
        pixels = faces.to(self.device).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            pooled = self.model((pixels - self.mean) / self.std).pooler_output
        return pooled.flatten(1).mean(0).cpu()


def _load(weights: str) -> Any:
    from transformers import ResNetModel

    try:
        model, info = ResNetModel.from_pretrained(
            weights, local_files_only=Path(weights).is_dir(), use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise OSError(f"it lacks {len(info['missing_keys'])} weights of a ResNet")
        return model
    # An empty or foreign folder is a ValueError to transformers.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"FaceEncoder: the face encoder {weights!r} cannot be loaded ({first_line(error)}). Download config.json "
            f"and model.safetensors of {DEFAULT_FACE_ENCODER}, or save a ResNet-101 trained on VGGFace2 by "
            "save_pretrained, and give the folder that holds them."
        ) from error


@functools.cache
def _cascade() -> Any:
    import cv2.data

    return cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_alt.xml")
