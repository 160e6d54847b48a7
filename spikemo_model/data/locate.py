"""Where MELD is: a folder given, $SPIKEMO_DATA, the user cache, a download, or nowhere."""

import os
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple

from platformdirs import user_cache_path

from spikemo_model.data.corpus import Corpus, DataError, standardise
from spikemo_model.data.meld import FILES, read_meld, read_transcripts
from spikemo_model.data.store import load_corpus
from spikemo_model.data.synthetic import synthetic_corpus
from spikemo_model.data.text import text_features

# MELD's transcripts in its own repository (declare-lab/MELD, GPL-3.0).
TRANSCRIPTS_URL = "https://raw.githubusercontent.com/declare-lab/MELD/master/data/MELD"
_TIMEOUT_S = 20.0


class Located(NamedTuple):
    """A corpus, and one line on where it was found."""

    corpus: Corpus
    source: str


def locate_meld(
    data_dir: Path | None = None,
    text: str = "auto",
    audio: bool = True,
    cache_dir: Path | None = None,
    url: str = TRANSCRIPTS_URL,
) -> Located:
    """Find MELD and read it; features standardised on the training split.

    In this order: ``data_dir``; ``$SPIKEMO_DATA``, a folder that holds ``meld/``; the user cache; a download of the
    transcripts; the synthetic corpus. A place that was named and does not hold the data is an error; the rest is
    tried in turn.

    Args:
        data_dir: A folder of MELD's files (or one that holds them in ``meld/``), or a feature store.
        text: "frozen" or "finetuned", arrays that come with the data; "ngrams", or an encoder's name or folder, to
            make them from the transcripts; "auto" takes "frozen" where it is and else makes them.
        audio: Whether to read prosody where it is.
        cache_dir: Instead of the user's cache folder.
        url: Where the transcripts are downloaded from.

    Raises:
        DataError: The named place lacks the data, or a file in it is not as it must be.
    """
    if data_dir is not None:
        if (data_dir / "index.json").is_file():
            return Located(load_corpus(data_dir), f"feature store {data_dir}")
        return Located(_read(_holder(data_dir, "--data-dir"), text, audio), f"MELD in {data_dir}")
    if "SPIKEMO_DATA" in os.environ:
        root = Path(os.environ["SPIKEMO_DATA"])
        return Located(_read(_holder(root, "$SPIKEMO_DATA"), text, audio), "MELD in $SPIKEMO_DATA")
    cached = (cache_dir or user_cache_path("spikemo")) / "meld"
    if _has_transcripts(cached):
        return Located(_read(cached, text, audio), f"MELD's transcripts in the user cache {cached}")
    try:
        _download(cached, url)
    except OSError as error:
        source = f"synthetic conversations, NOT MELD results (no data given, and the download failed: {error})"
        return Located(synthetic_corpus(), source)
    return Located(_read(cached, text, audio), f"MELD's transcripts, downloaded to {cached}")


def _has_transcripts(folder: Path) -> bool:
    return all((folder / f"{name}_sent_emo.csv").is_file() for name in FILES.values())


def _holder(folder: Path, named_by: str) -> Path:
    """The folder of MELD's files: ``folder/meld``, or ``folder`` itself."""
    for candidate in (folder / "meld", folder):
        if _has_transcripts(candidate):
            return candidate
    raise DataError(
        f"MELD: {named_by} is {folder}, but neither it nor its folder meld/ holds train_sent_emo.csv, "
        "dev_sent_emo.csv and test_sent_emo.csv. Point it at the folder that holds meld/, or leave it unset."
    )


def _read(root: Path, text: str, audio: bool) -> Corpus:
    """MELD's files with the features asked for."""
    prosody: Literal["prosody"] | None = "prosody" if audio and (root / "train_prosody8.csv").is_file() else None
    if text == "auto" and (root / "train_text_minilm.npz").is_file():
        text = "frozen"
    if text in ("frozen", "finetuned"):
        corpus = read_meld(root, text, prosody)
    else:
        made = text_features(read_transcripts(root), None if text == "auto" else text)
        corpus = read_meld(root, made, prosody)
    return standardise(corpus, list(corpus.about))


def _download(folder: Path, url: str) -> None:
    """Fetch the three transcripts; the folder appears complete or not at all.

    Raises:
        OSError: The network or the disk fails.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".meld-", dir=folder.parent))
    try:
        for name in FILES.values():
            with (
                urllib.request.urlopen(f"{url}/{name}_sent_emo.csv", timeout=_TIMEOUT_S) as response,
                (unfinished / f"{name}_sent_emo.csv").open("wb") as file,
            ):
                shutil.copyfileobj(response, file)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
