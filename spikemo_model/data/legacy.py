"""Import of feature files that other projects pickle: MultiEMO's folders and MMGCN's single files.

A pickle is a program. This one is run by an unpickler that knows numpy arrays and Python's containers and refuses
every other name, so that nothing of the file's is executed.
"""

import io
import pickle
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikemo_model.config import IEMOCAP_EMOTIONS, MELD_EMOTIONS
from spikemo_model.data.corpus import Conversation, Corpus, DataError
from spikemo_model.data.store import save_corpus

# MELD's official split, by the numbers that both layouts give its dialogues: 1039 train, 114 valid, 280 test.
_MELD_FIRST_VALID = 1039
_VALID_SHARE = 0.1


class _RefusedError(Exception):
    """The pickle asks for something that is not plain data; the message says what."""


class _Dtype:
    """Stands in for ``numpy.dtype`` while a pickle loads: plain numbers, strings, or a list of objects."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not re.fullmatch(r"[<>]?([fiub]\d{1,2}|[SU]\d{1,6}|O8?)", code):
            raise _RefusedError(f"an array of type {code!r}")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order in ("<", ">"):
            self.code = order + self.code.lstrip("<>")


class _Array:
    """Stands in for ``numpy.ndarray`` while a pickle loads; ``value`` is the array, built by us."""

    value: Any

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise _RefusedError("a malformed array")
        if "O" in dtype.code:
            if not isinstance(data, list) or len(shape) != 1 or len(data) != shape[0]:
                raise _RefusedError("a malformed array of objects")
            self.value = data
            return
        data = data.encode("latin1") if isinstance(data, str) else data
        self.value = np.frombuffer(data, np.dtype(dtype.code)).reshape(shape, order="F" if fortran else "C")


def _scalar(dtype: _Dtype, data: bytes | str) -> Any:
    """A numpy scalar as a Python number or string."""
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, np.dtype(dtype.code))[0].item()


def _from_buffer(data: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    """An array, as protocol 5 spells it."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes, as protocol 2 spells them."""
    if encoding != "latin1":
        raise _RefusedError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _encode,
    **{(module, "bytes"): lambda: b"" for module in ("builtins", "__builtin__")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    **{(module, name): kind for module in ("builtins", "__builtin__")
       for name, kind in (("set", set), ("frozenset", frozenset), ("list", list), ("tuple", tuple), ("dict", dict))},
}  # fmt: skip


class _RestrictedUnpickler(pickle.Unpickler):
    """Knows the names of `_ALLOWED` and no other."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"the name {module}.{name}")
        return _ALLOWED[module, name]


def load_legacy_pickle(path: Path) -> Any:
    """Read a pickle of numpy arrays and builtin containers; anything else is refused by name.

    Raises:
        DataError: The file is missing, truncated, or holds anything else; nothing of it is executed.
    """
    if not path.is_file():
        raise DataError(f"legacy features: there is no {path}.")
    try:
        loaded = _RestrictedUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        return _plain(loaded, {})
    except _RefusedError as error:
        raise DataError(
            f"legacy features: {path} holds {error}, which is refused: only numpy arrays and Python's containers are "
            "read, and nothing is executed."
        ) from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        KeyError,
        RecursionError,
    ) as error:
        raise DataError(f"legacy features: {path} cannot be read ({error}). Copy the file again.") from error


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Replace the stand-ins by what they stand for; ``done`` by id, so that shared parts are visited once."""
    if id(value) not in done:
        if isinstance(value, _Array):
            plain = _plain(value.value, done)
        elif isinstance(value, dict):
            plain = {_plain(k, done): _plain(v, done) for k, v in value.items()}
        elif isinstance(value, list | tuple | set | frozenset):
            plain = type(value)(_plain(v, done) for v in value)
        else:
            return value
        done[id(value)] = plain
    return done[id(value)]


def import_legacy_features(source_dir: Path, target_dir: Path, seed: int = 0) -> Corpus:
    """Read another project's pickled features once, and write them as a feature store.

    Two layouts are known, for MELD and IEMOCAP alike: MultiEMO's folder of ``TextFeatures.pkl``,
    ``AudioFeatures.pkl``, ``VisualFeatures.pkl`` and ``Speakers.pkl``, and the MMGCN family's single
    ``*_features*.pkl``. Both name training and test dialogues only. On MELD the official validation dialogues are
    those numbered from 1039; elsewhere a tenth of the training dialogues, drawn with ``seed``, validates.

    Args:
        source_dir: Folder of the pickles.
        target_dir: New folder of the store.
        seed: Of the drawn validation split.

    Returns:
        The corpus that was written.

    Raises:
        DataError: The layout is not known, a file is missing, truncated or not plain data, or a dialogue lacks
            features; nothing is written.
        FileExistsError: ``target_dir`` is there already.
    """
    source_dir, target_dir = Path(source_dir), Path(target_dir)
    if target_dir.exists():
        raise FileExistsError(
            f"import_legacy_features: {target_dir} exists already. Choose another folder or remove it."
        )
    if (source_dir / "Speakers.pkl").is_file():
        origin = source_dir / "Speakers.pkl"
        fields = load_legacy_pickle(origin)
        features = {
            name: load_legacy_pickle(source_dir / f"{name.capitalize()}Features.pkl")
            for name in ("text", "audio", "visual")
        }
        family = "MultiEMO"
    else:
        found = sorted(source_dir.glob("*_features*.pkl"))
        if len(found) != 1:
            raise DataError(
                f"legacy features: {source_dir} must hold MultiEMO's Speakers.pkl and *Features.pkl, or one "
                f"*_features*.pkl of MMGCN; it has {sorted(p.name for p in source_dir.glob('*.pkl'))}."
            )
        origin = found[0]
        fields = load_legacy_pickle(origin)
        features = None
        family = "MMGCN"
    if not isinstance(fields, tuple | list) or len(fields) not in (9, 10):
        raise DataError(f"legacy features: {origin} must hold a tuple of 9 (IEMOCAP) or 10 (MELD) items.")
    if features is None:
        features = {"text": fields[3], "audio": fields[4], "visual": fields[5]}
    corpus = _corpus(origin, family, fields, features, seed)
    save_corpus(corpus, target_dir)
    return corpus


def _corpus(origin: Path, family: str, fields: Sequence[Any], features: dict[str, Any], seed: int) -> Corpus:
    """A corpus of the tuple that both layouts share: items 1, 2, 7, 8 are speakers, labels, train and test ids."""
    name, classes = ("MELD", MELD_EMOTIONS) if len(fields) == 10 else ("IEMOCAP", IEMOCAP_EMOTIONS)
    speakers, labels, train_ids, test_ids = fields[1], fields[2], fields[7], fields[8]
    train_ids = sorted(train_ids, key=str) if isinstance(train_ids, set | frozenset) else list(train_ids)
    valid_ids = [i for i in train_ids if name == "MELD" and isinstance(i, int) and i >= _MELD_FIRST_VALID]
    note = "Validation: the official dialogues, numbered from 1039."
    if not valid_ids:
        count = max(1, round(_VALID_SHARE * len(train_ids)))
        valid_ids = random.Random(seed).sample(train_ids, count)
        note = f"Validation: {count} training dialogues, drawn with seed {seed}; the files name none."
    held_out = set(valid_ids)
    ids = {"train": [i for i in train_ids if i not in held_out], "valid": valid_ids, "test": list(test_ids)}
    splits = {
        split: tuple(_conversation(origin, name, i, speakers, labels, features) for i in own)
        for split, own in ids.items()
    }
    about = dict.fromkeys(features, f"{family}'s feature files")
    return Corpus(name, classes, splits, about, (note,))


def _conversation(
    origin: Path, name: str, key: Any, speakers: dict[Any, Any], labels: dict[Any, Any], features: dict[str, Any]
) -> Conversation:
    """One dialogue of the pickled dictionaries."""
    for what, values in (("speakers", speakers), ("labels", labels), *features.items()):
        if not isinstance(values, dict) or key not in values:
            raise DataError(f"legacy features: {origin}: {name} dialogue {key} has no {what}.")
    try:
        rows = {
            m: torch.from_numpy(np.stack([np.asarray(row, np.float32) for row in values[key]]))
            for m, values in features.items()
        }
        who = [s if isinstance(s, str) else f"speaker {int(np.argmax(s))}" for s in speakers[key]]
        targets = torch.tensor([int(label) for label in labels[key]])
    except (TypeError, ValueError) as error:
        raise DataError(f"legacy features: {origin}: {name} dialogue {key} is malformed ({error}).") from error
    return Conversation(str(key), rows, tuple(who), targets, tuple(f"utt{i}" for i in range(len(who))))
