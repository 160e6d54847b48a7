"""SpikEmo: emotions in conversations, by spiking attention."""

from spikemo_model.batch import DialogueBatch
from spikemo_model.config import SpikEmoConfig
from spikemo_model.conversation import Utterance
from spikemo_model.model import SpikEmo

__all__ = ["DialogueBatch", "SpikEmo", "SpikEmoConfig", "Utterance"]
