"""Conversations: readers, the feature store, the importer of other projects' files, and made-up ones."""

from spikemo_model.data.corpus import Conversation, Corpus, DataError, TextFeatures, collate, standardise
from spikemo_model.data.iemocap import read_iemocap
from spikemo_model.data.legacy import import_legacy_features
from spikemo_model.data.locate import Located, locate_meld
from spikemo_model.data.meld import read_meld, read_transcripts
from spikemo_model.data.mosi import read_mosi
from spikemo_model.data.store import load_corpus, save_corpus
from spikemo_model.data.synthetic import synthetic_corpus
from spikemo_model.data.text import text_features

__all__ = [
    "Conversation",
    "Corpus",
    "DataError",
    "Located",
    "TextFeatures",
    "collate",
    "import_legacy_features",
    "load_corpus",
    "locate_meld",
    "read_iemocap",
    "read_meld",
    "read_mosi",
    "read_transcripts",
    "save_corpus",
    "standardise",
    "synthetic_corpus",
    "text_features",
]
