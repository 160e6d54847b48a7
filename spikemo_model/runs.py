"""Runs: the configuration in their folder, files that are whole or not there, and workers that end with them."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from spikemo_model.checkpoints import replace_atomically
from spikemo_model.config import Preset, SpikEmoConfig, TrainingConfig, from_dict, to_dict


def open_run(run_dir: Path, preset: Preset) -> None:
    """Note the configuration in a new ``run_dir``, or make sure that a run there has the same.

    Raises:
        ValueError: It holds a run of another configuration.
    """
    path = run_dir / "config.json"
    values = json.loads(json.dumps({"model": to_dict(preset.model), "training": to_dict(preset.training)}))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(
            f"{part}.{name}"
            for part, own in values.items()
            for name in own
            if found.get(part, {}).get(name) != own[name]
        )
        if differing:
            raise ValueError(
                f"train: {run_dir} holds a run of another configuration; it differs in {', '.join(differing)}. "
                "Choose another folder, or the options of that run."
            )
    elif int(os.environ.get("RANK", "0")) == 0:
        write_json(path, values)


def read_preset(run_dir: Path) -> Preset:
    """Configuration of the run in ``run_dir``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Its ``config.json`` is not one of ours.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"read_preset: there is no {path}; {run_dir} holds no run.")
    values = json.loads(path.read_text(encoding="utf-8"))
    return Preset(from_dict(SpikEmoConfig, values["model"]), from_dict(TrainingConfig, values["training"]))


def write_json(path: Path, values: Any) -> None:
    """Write ``values`` to ``path``, which appears complete or not at all."""
    text = json.dumps(values, ensure_ascii=False, indent=1)
    replace_atomically(path, lambda file: file.write(text.encode("utf-8")))


def leave_with(parent: int) -> None:
    """End this process soon after its ``parent`` has, which when killed could not tell it to."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
