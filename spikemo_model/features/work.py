"""Work that can be killed and taken up again: settings that must agree, and finished parts on disk."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from spikemo_model.checkpoints import replace_atomically
from spikemo_model.runs import write_json

_SETTINGS = "settings.json"


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Note ``settings`` in a new ``folder``, or make sure that the work in it has the same.

    Raises:
        ValueError: It holds work of other settings.
    """
    path = folder / _SETTINGS
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
        if differing:
            raise ValueError(
                f"{folder} holds unfinished work of other settings; they differ in {', '.join(differing)}. Remove the "
                "folder, or take the same settings to go on."
            )
    else:
        write_json(path, settings)


def lasting(encoder: str) -> str:
    """A name on the hub as it is, a local folder by its whole path: settings may be read from any place."""
    return str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder


def describe(extractor: dict[str, Any]) -> str:
    """An extractor with its settings, in one line."""
    settings = ", ".join(f"{name} {value}" for name, value in extractor.items() if name != "name")
    return f"{extractor['name']} ({settings})"


class Parts:
    """Finished parts of a result, one file each, whole or not there.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        """Whether the part is there."""
        return self._path(name).is_file()

    def __getitem__(self, name: str) -> Tensor:
        """Read a part."""
        return load_file(self._path(name))["x"]

    def __setitem__(self, name: str, x: Tensor) -> None:
        """Write a part."""
        replace_atomically(self._path(name), lambda file: file.write(save({"x": x.contiguous()})))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
