"""IEMOCAP: feature files, imported once into a feature store."""

from pathlib import Path

from spikemo_model.config import IEMOCAP_EMOTIONS
from spikemo_model.data.corpus import Corpus, DataError
from spikemo_model.data.store import load_corpus


def read_iemocap(root: Path) -> Corpus:
    """Read IEMOCAP from a feature store that `import_legacy_features` made.

    Args:
        root: The store's folder.

    Raises:
        DataError: There is no store, a file of it is damaged, or it holds other classes than IEMOCAP's six.
    """
    if not (root / "index.json").is_file() and any(root.glob("*.pkl")):
        raise DataError(
            f"IEMOCAP: {root} holds pickles. Import them once: import_legacy_features({str(root)!r}, target_dir)."
        )
    corpus = load_corpus(root)
    if corpus.classes != IEMOCAP_EMOTIONS:
        raise DataError(f"IEMOCAP: {root} holds {corpus.name} with the classes {', '.join(corpus.classes)}.")
    return corpus
