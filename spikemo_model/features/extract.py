"""From a data set as published to a feature store: every utterance's text, sound and face."""

import csv
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from torch import Tensor
from tqdm.auto import tqdm

from spikemo_model.checkpoints import replace_atomically
from spikemo_model.data.corpus import Corpus, DataError, standardise
from spikemo_model.data.store import save_corpus
from spikemo_model.features.audio import functionals, reduce_width
from spikemo_model.features.clips import read_release
from spikemo_model.features.media import attempt
from spikemo_model.features.text import DEFAULT_ENCODER, ContextEncoder
from spikemo_model.features.visual import DEFAULT_FACE_ENCODER, FaceEncoder, faces
from spikemo_model.features.work import Parts, claim, describe, lasting
from spikemo_model.runs import leave_with

MODALITIES = ("text", "audio", "visual")
CLIPS = "clips.csv"
_FRAMES = 20

Key = tuple[str, str, str]  # split, dialogue, utterance


class Flaw(NamedTuple):
    """What an utterance lacks.

    Args:
        split: Its split.
        dialogue: Its dialogue.
        utterance: Its id.
        modality: The modality whose features are a stand-in.
        reason: One line.
    """

    split: str
    dialogue: str
    utterance: str
    modality: str
    reason: str


def extract(
    root: Path,
    out: Path,
    modalities: Sequence[str] = MODALITIES,
    *,
    text_encoder: str = DEFAULT_ENCODER,
    max_tokens: int | None = None,
    audio_width: int | None = None,
    face_encoder: str = DEFAULT_FACE_ENCODER,
    workers: int | None = None,
) -> list[Flaw]:
    """Extract features of MELD or IEMOCAP as published, into a feature store.

    Finished parts are kept in ``<out>.partial`` until the store is whole: after a kill, the same call goes on. Clips
    that cannot be read are tried again then. An utterance without a usable clip stays in its dialogue: its audio is
    the mean of the training split, its visual features are zeros, as those of a clip without a face, and
    ``clips.csv`` in the store lists it with the reason.

    Args:
        root: The data set's folder (`read_release`).
        out: New folder of the store. Its corpus names version and settings of each extractor.
        modalities: Which of "text" (`ContextEncoder`), "audio" (`functionals`, standardised on train) and "visual"
            (`faces` of up to 20 pictures, embedded by `FaceEncoder`).
        text_encoder: A name on the Hugging Face hub or a local folder.
        max_tokens: Length of the text encoder's window; None for the longest that it takes.
        audio_width: Width to which audio is reduced (`reduce_width`); None leaves 6373.
        face_encoder: A ResNet on the Hugging Face hub or in a local folder.
        workers: Processes that decode and measure clips; None for one a core.

    Returns:
        What ``clips.csv`` lists.

    Raises:
        DataError: ``root`` does not hold the data, or no clip of the training split can be used.
        FileExistsError: ``out`` is there already.
        OSError: An encoder cannot be loaded, or a worker process died.
        ValueError: A modality is unknown, or ``<out>.partial`` holds work of other settings.
    """
    if out.exists():
        raise FileExistsError(f"extract: {out} exists already. Choose another folder or remove it.")
    unknown = [name for name in modalities if name not in MODALITIES]
    if unknown or not modalities:
        raise ValueError(f"extract: modalities must be some of {MODALITIES}, got {tuple(modalities)}.")
    corpus, clips = read_release(root)
    work = out.with_name(f"{out.name}.partial")
    context = ContextEncoder(text_encoder, max_tokens) if "text" in modalities else None
    embed = FaceEncoder(face_encoder) if "visual" in modalities else None
    settings: dict[str, dict[str, Any]] = {}
    if context:
        used = {
            "encoder": lasting(text_encoder),
            "max_tokens": context.max_tokens,
            "vector": "mean of the utterance's tokens",
        }
        settings["text"] = {"name": "ContextEncoder", "transformers": version("transformers"), **used}
    if "audio" in modalities:
        settings["audio"] = {"name": "functionals", "opensmile": version("opensmile"), "features": "ComParE_2016"}
    if embed:
        used = {"opencv": version("opencv-python-headless"), "encoder": lasting(face_encoder), "pictures": _FRAMES}
        settings["visual"] = {"name": "FaceEncoder", "transformers": version("transformers"), **used}
    claim(work, settings)

    rows: dict[str, dict[Key, Tensor]] = {}
    flaws: list[Flaw] = []
    if context:
        rows["text"] = _read_texts(corpus, context, Parts(work / "text"))
    if "audio" in modalities:
        sounds = {key: (clip.sound,) for key, clip in clips.items()}
        measured, failed = _each_clip("audio", sounds, functionals, lambda x: x, Parts(work / "audio"), workers)
        mean = torch.stack([x for key, x in measured.items() if key[0] == "train"]).mean(0)
        rows["audio"] = {key: measured.get(key, mean) for key in clips}
        flaws += failed
    if embed:
        films = {key: (clip.pictures, _FRAMES) for key, clip in clips.items()}
        measured, failed = _each_clip("visual", films, faces, embed, Parts(work / "visual"), workers)
        zeros = torch.zeros_like(next(iter(measured.values())))
        rows["visual"] = {key: measured.get(key, zeros) for key in clips}
        flaws += failed
        flaws += [Flaw(s, d, u, "visual", "no face") for (s, d, u), x in measured.items() if not x.any()]

    corpus = _with_features(corpus, {name: rows[name] for name in modalities}, settings, flaws)
    if "audio" in modalities:
        corpus = standardise(corpus, ["audio"])
        corpus = reduce_width(corpus, "audio", audio_width) if audio_width else corpus
    _finish(corpus, flaws, work, out)
    return flaws


def _read_texts(corpus: Corpus, context: ContextEncoder, parts: Parts) -> dict[Key, Tensor]:
    """Text features, dialogue by dialogue."""
    context.model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = {}
    every = [(split, dialogue) for split, dialogues in corpus.splits.items() for dialogue in dialogues]
    for split, dialogue in tqdm(every, desc="text"):
        name = f"{split}-{dialogue.id}"
        if name not in parts:
            parts[name] = context.features(dialogue)
        for utterance, x in zip(dialogue.utterance_ids, parts[name], strict=True):
            rows[split, dialogue.id, utterance] = x
    return rows


def _each_clip(
    modality: str,
    clips: dict[Key, tuple[Any, ...]],
    measure: Callable[..., Tensor],
    finish: Callable[[Tensor], Tensor],
    parts: Parts,
    workers: int | None,
) -> tuple[dict[Key, Tensor], list[Flaw]]:
    """Features of every clip that can be read, and why the others cannot.

    ``measure`` of what ``clips`` has runs in ``workers`` processes, ``finish`` in this one, where the GPU is.
    """
    left = [key for key in clips if "-".join(key) not in parts]
    together = {"initializer": leave_with, "initargs": (os.getpid(),)}
    pool = Parallel(n_jobs=workers or -1, return_as="generator_unordered", **together)
    flaws = []
    bar = tqdm(
        pool(delayed(attempt)(key, measure, *clips[key]) for key in left),
        desc=modality,
        total=len(clips),
        initial=len(clips) - len(left),
    )
    for (split, dialogue, utterance), x in _until_a_crash(bar):
        if isinstance(x, str):
            flaws.append(Flaw(split, dialogue, utterance, modality, x))
        else:
            parts[f"{split}-{dialogue}-{utterance}"] = finish(x)
    failed = {(flaw.split, flaw.dialogue, flaw.utterance) for flaw in flaws}
    measured = {key: parts["-".join(key)] for key in clips if key not in failed}
    if not any(split == "train" for split, *_ in measured):
        raise DataError(
            f"extract: no clip of the training split can be used for {modality}; the first: {flaws[0].reason}"
        )
    return measured, sorted(flaws)


def _until_a_crash(results: Iterable[Any]) -> Iterator[Any]:
    """``results``, with the death of a worker in our words."""
    try:
        yield from results
    except TerminatedWorkerError as error:
        raise OSError(
            "extract: a worker process died: a clip crashed its decoder, or memory ran out. What is finished is kept; "
            "go on with fewer workers."
        ) from error


def _with_features(
    corpus: Corpus, rows: dict[str, dict[Key, Tensor]], settings: dict[str, dict[str, Any]], flaws: list[Flaw]
) -> Corpus:
    """The corpus with features, what they are, and how many utterances have a stand-in."""
    splits = {
        split: tuple(
            replace(
                d,
                features={
                    name: torch.stack([own[split, d.id, utterance] for utterance in d.utterance_ids])
                    for name, own in rows.items()
                },
            )
            for d in dialogues
        )
        for split, dialogues in corpus.splits.items()
    }
    about = {name: describe(settings[name]) for name in rows}
    counts = {name: sum(flaw.modality == name for flaw in flaws) for name in rows}
    notes = tuple(
        f"{count} utterances have no {name} features of their own: {CLIPS} says why."
        for name, count in counts.items()
        if count
    )
    return replace(corpus, splits=splits, about=about, notes=(*corpus.notes, *notes), extractors=settings)


def _finish(corpus: Corpus, flaws: list[Flaw], work: Path, out: Path) -> None:
    """Put the store together inside ``work``, move it to ``out`` whole, and remove the parts."""
    store = work / "store"
    shutil.rmtree(store, ignore_errors=True)
    save_corpus(corpus, store)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(Flaw._fields)
    writer.writerows(flaws)
    replace_atomically(store / CLIPS, lambda file: file.write(table.getvalue().encode()))
    os.replace(store, out)
    shutil.rmtree(work)
