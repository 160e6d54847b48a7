"""From raw clips to features: text, sound and faces of MELD and IEMOCAP as published."""

from spikemo_model.features.audio import functionals, reduce_width
from spikemo_model.features.clips import read_release
from spikemo_model.features.extract import extract
from spikemo_model.features.finetune import finetune_text
from spikemo_model.features.text import ContextEncoder
from spikemo_model.features.visual import FaceEncoder, Pictures, faces

__all__ = [
    "ContextEncoder",
    "FaceEncoder",
    "Pictures",
    "extract",
    "faces",
    "finetune_text",
    "functionals",
    "read_release",
    "reduce_width",
]
