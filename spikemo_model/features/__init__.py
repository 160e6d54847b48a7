"""From raw clips to features: text, sound and faces of MELD and IEMOCAP as published.

`spikemo_model.features.extract.extract` and `spikemo_model.features.finetune.finetune_text` run over whole data sets.
"""

from spikemo_model.features.audio import functionals, reduce_width
from spikemo_model.features.clips import read_release
from spikemo_model.features.text import ContextEncoder
from spikemo_model.features.visual import FaceEncoder, Pictures, faces

__all__ = ["ContextEncoder", "FaceEncoder", "Pictures", "faces", "functionals", "read_release", "reduce_width"]
