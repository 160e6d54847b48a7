"""Conversations that are no data set: utterances, and how they are read from JSON Lines and CSV."""

import codecs
import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor


class ConversationError(ValueError):
    """Something is wrong with a conversation; the message names the line or utterance, and the cure."""


@dataclass(frozen=True)
class Utterance:
    """What somebody says in a conversation.

    Args:
        speaker: Any name; each new one is a new party.
        text: The transcript; may be empty.
        features: By modality, [F], as its extractor gives them, neither standardised nor reduced. A modality may be
            left out where the model remembers its extractor.
        clip: Sound or video of the utterance, for the extractors of audio and visual features.
        where: Where it was read, for messages.

    Example:
        >>> Utterance("Joey", "How you doin'?").speaker
        'Joey'
    """

    speaker: str
    text: str = ""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    clip: Path | None = None
    where: str = ""


def read_conversations(path: Path) -> dict[str, list[Utterance]]:
    """Read utterances from CSV (``.csv``, with a header) or JSON Lines (any other name, an object a line).

    Columns are ``speaker``, ``text`` and, if wanted, ``dialogue`` (a name; without it all are one dialogue),
    ``features`` and ``clip`` (a path). ``features`` is the path of a ``.safetensors`` file with a tensor [F] by
    modality, or an object from modality to a list of numbers or to the path of an ``.npy`` file, in CSV as JSON.
    Paths start from the folder of ``path``. Empty lines are passed over. Lines of CSV end as csv has it, by a carriage
    return alone, too.

    Args:
        path: The file, UTF-8.

    Returns:
        Utterances in their order, by dialogue.

    Raises:
        ConversationError: A line is not as it must be, or there is none; the message names it.
    """
    table = path.suffix.lower() == ".csv"
    dialogues: dict[str, list[Utterance]] = {}
    with path.open("rb") as file:
        lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="" if table else "\n")
        for dialogue, utterance in _utterances(lines, path, path.parent, table):
            dialogues.setdefault(dialogue, []).append(utterance)
    return dialogues


def read_live(stream: BinaryIO) -> Iterator[tuple[str, Utterance]]:
    """Read utterances from a stream, each as soon as its line is there; otherwise as `read_conversations`.

    Args:
        stream: JSON Lines, or CSV if its first line is a header with ``speaker`` and ``text``, each line with a newline
            at its end. Paths start from here.

    Returns:
        Dialogue, "" where none is named, and utterance, in their order.

    Raises:
        ConversationError: A line is not as it must be, or there is none; the message names it.
    """
    first = stream.readline().removeprefix(codecs.BOM_UTF8)
    names = {name.strip(b' "\r\n') for name in first.split(b",")}
    lines = (line.decode("utf-8", "surrogateescape") for line in itertools.chain([first], stream))
    return _utterances(lines, "standard input", Path(), {b"speaker", b"text"} <= names)


def _utterances(lines: Iterable[str], name: Path | str, folder: Path, table: bool) -> Iterator[tuple[str, Utterance]]:
    """Dialogue and utterance of each row, at least one, as the lines come, decoded with "surrogateescape"."""
    text = _checked(lines, name)
    where = ""
    for line, row in _csv_rows(name, text) if table else _json_rows(name, text):
        where = f"{name}, line {line}"
        speaker, said, dialogue, clip = (_string(row, name, where) for name in ("speaker", "text", "dialogue", "clip"))
        if not speaker or said is None:
            raise ConversationError(f"{where}: {'text' if speaker else 'speaker'} is missing. Add the column.")
        utterance = Utterance(
            speaker=speaker,
            text=said,
            features=_features(row.get("features"), folder, where),
            clip=folder / clip if clip else None,
            where=where,
        )
        yield dialogue or "", utterance
    if not where:
        raise ConversationError(f"{name} holds no utterance.")


def _checked(lines: Iterable[str], name: Path | str) -> Iterator[str]:
    """Lines without bytes that were not UTF-8, which "surrogateescape" has kept as surrogates."""
    for number, line in enumerate(lines, start=1):
        try:
            line.encode()
        except UnicodeEncodeError as error:
            raise ConversationError(f"{name}, line {number}: this is not UTF-8. Convert it.") from error
        yield line


def _csv_rows(name: Path | str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a CSV file with the number of their last line."""
    reader = csv.DictReader(lines, restval="", strict=True)
    try:
        for row in reader:
            if None in row:
                raise ConversationError(f"{name}, line {reader.line_num}: more cells than columns. Quote the text.")
            yield reader.line_num, row
    except csv.Error as error:
        raise ConversationError(f"{name}, line {reader.reader.line_num}: this is no CSV ({error}).") from error


def _json_rows(name: Path | str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSON Lines file with the number of their line."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConversationError(f"{name}, line {number}: this is no JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ConversationError(f"{name}, line {number}: a line must be a JSON object, got {line[:40]}.")
            yield number, row


def _string(row: dict[str, Any], name: str, where: str) -> str | None:
    """A cell that must be text, or not there."""
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise ConversationError(f"{where}: {name} must be a string, got {json.dumps(value)[:40]}.")
    if value is not None and any("\ud800" <= character <= "\udfff" for character in value):
        raise ConversationError(f"{where}: {name} holds half a character (a lone surrogate). Write it in UTF-8.")
    return value


def _features(value: Any, folder: Path, where: str) -> dict[str, Any]:
    """Features as a line gives them, each still to be checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = json.loads(value)
        if value is None or value == "":
            return {}
        if isinstance(value, str) and value.endswith(".safetensors"):
            return load_file(folder / value)
        if isinstance(value, dict):
            return {
                name: np.load(folder / x, allow_pickle=False) if isinstance(x, str) else x for name, x in value.items()
            }
    except (OSError, ValueError, EOFError, RecursionError, SafetensorError) as error:
        raise ConversationError(f"{where}: features cannot be read ({error}).") from error
    raise ConversationError(
        f'{where}: features must be a .safetensors file or an object like {{"text": [0.1, 0.2]}} or '
        f'{{"text": "a.npy"}}, got {json.dumps(value)[:40]}.'
    )
