"""Model directories: weights as safetensors, the configuration and a model card, as the Hugging Face Hub has them."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from spikemo_model.config import SpikEmoConfig, from_dict, to_dict

_FORMAT = "spikemo-model-1"
_CARD, _CONSTANTS, _WEIGHTS, _CONFIG = "README.md", "standardised.safetensors", "model.safetensors", "config.json"

M = TypeVar("M", bound="Pretrained")


@dataclass(frozen=True)
class Origin:
    """What a trained model comes from.

    Args:
        data: Name of the data set; empty if unknown.
        about: What each modality's features are, in words.
        extractors: By modality, what made its features: "name", and its settings.
        scores: Scores on the test split, in percent, by name.
        standardised: By modality, mean [F] and standard deviation [F] that `SpikEmo.predict` takes out of features.
        reduced: By modality, centre [F] and axes [F, K] by which it then brings them to the width K of the model.
    """

    data: str = ""
    about: dict[str, str] = field(default_factory=dict)
    extractors: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    standardised: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    reduced: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def raw_widths(self, config: SpikEmoConfig) -> dict[str, int]:
        """Width of the features that `SpikEmo.predict` takes, by modality: before any reduction."""
        return {
            name: len(self.reduced[name][0]) if name in self.reduced else modality.features
            for name, modality in config.modalities.items()
        }


class Pretrained(nn.Module):
    """A model that is saved to and loaded from model directories, and pushed to the Hugging Face Hub.

    A directory holds ``config.json``, ``model.safetensors``, a model card ``README.md`` and, where features were
    standardised or reduced, ``standardised.safetensors``. A finished run of `spikemo_model.training.train` is one, too.

    Args:
        config: The configuration.
    """

    def __init__(self, config: SpikEmoConfig) -> None:
        super().__init__()
        self.config = config
        self.origin = Origin()

    @classmethod
    def from_pretrained(cls: type[M], name_or_folder: str | os.PathLike[str], revision: str | None = None) -> M:
        """Load a model, in eval mode, on the CPU, with the bits and types that were saved.

        Args:
            name_or_folder: A model directory, or a name on the Hub ("owner/model").
            revision: Branch, tag or commit on the Hub; None for the newest.

        Raises:
            FileNotFoundError: There is no such directory, it is incomplete, or the Hub cannot give it.
            ValueError: It is of another version, damaged, or its weights do not fit its configuration.
        """
        folder = Path(name_or_folder)
        if not folder.is_dir():
            folder = _download(os.fspath(name_or_folder), revision)
        values = _read_config(folder)
        weights = _read_tensors(folder / _WEIGHTS)
        changed = values.get("standardised") or values.get("reduced")
        constants = _read_tensors(folder / _CONSTANTS) if changed else {}
        try:
            model = cls(from_dict(SpikEmoConfig, values["model"]))
            widths = {name: modality.features for name, modality in model.config.modalities.items()}
            raw = widths | values.get("reduced", {})  # by modality, the width before
            shapes: dict[str, tuple[int, ...]] = {
                f"{what}/{m}": (raw[m],) for m in values["standardised"] for what in ("mean", "std")
            }
            for m in values.get("reduced", {}):
                shapes |= {f"centre/{m}": (raw[m],), f"axes/{m}": (raw[m], widths[m])}
            known = {f.name: values[f.name] for f in fields(Origin) if f.name not in ("standardised", "reduced")}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"from_pretrained: {folder / _CONFIG} does not fit this version ({error!r}). Save the model again."
            ) from error
        _check(folder / _CONSTANTS, shapes, constants)
        _check(folder / _WEIGHTS, {name: tuple(x.shape) for name, x in model.state_dict().items()}, weights)
        model.load_state_dict(weights, assign=True)
        model.origin = Origin(
            **known,
            standardised={m: (constants[f"mean/{m}"], constants[f"std/{m}"]) for m in values["standardised"]},
            reduced={m: (constants[f"centre/{m}"], constants[f"axes/{m}"]) for m in values.get("reduced", {})},
        )
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the model to a new directory, which appears complete or not at all.

        Args:
            folder: Must not exist yet, or be empty.

        Raises:
            FileExistsError: ``folder`` holds something.
        """
        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(f"save_pretrained: {folder} exists already. Choose another folder or remove it.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, content in self.files().items():
                (unfinished / name).write_bytes(content)
            unfinished.chmod(0o755)
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def push_to_hub(self, name: str, *, private: bool = False, revision: str | None = None) -> str:
        """Upload the model directory to the Hugging Face Hub, as who logged in by ``hf auth login``.

        Args:
            name: "owner/model"; it is made if it is not there.
            private: Whether a new one is private.
            revision: Branch; None for the main one.

        Returns:
            The address of the commit.

        Raises:
            OSError: The Hub cannot be reached, or refuses.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=name, folder_path=folder, revision=revision, commit_message="Upload SpikEmo"
            )
        return commit.commit_url

    def files(self, **more: Any) -> dict[str, bytes]:
        """Contents of the files of the model directory by name, in the order in which to write them.

        Args:
            more: Further entries of ``config.json``, as JSON has them.
        """
        from safetensors.torch import save

        config = {"format": _FORMAT, "model": to_dict(self.config), **asdict(self.origin), **more}
        config["standardised"] = list(self.origin.standardised)
        config["reduced"] = {name: len(centre) for name, (centre, _) in self.origin.reduced.items()}
        constants: dict[str, Tensor] = {}
        for name, (mean, std) in self.origin.standardised.items():
            constants |= {f"mean/{name}": mean, f"std/{name}": std}
        for name, (centre, axes) in self.origin.reduced.items():
            constants |= {f"centre/{name}": centre, f"axes/{name}": axes}
        return {
            _CARD: self._card().encode("utf-8"),
            **({_CONSTANTS: save(constants)} if constants else {}),
            _WEIGHTS: save({name: x.contiguous() for name, x in self.state_dict().items()}),
            _CONFIG: json.dumps(config, ensure_ascii=False, indent=1).encode("utf-8"),
        }

    def _card(self) -> str:
        """The model card, Markdown."""
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("spikemo_model", "templates"), trim_blocks=True, lstrip_blocks=True
        )
        parameters = sum(p.numel() for p in self.parameters())
        return environment.get_template("model_card.md").render(
            config=self.config, origin=self.origin, raw=self.origin.raw_widths(self.config), parameters=parameters
        )


def _download(name: str, revision: str | None) -> Path:
    """A model directory of the Hub, from the local cache where it is there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[_CARD, _CONSTANTS, _WEIGHTS, _CONFIG]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"from_pretrained: {name!r} is no directory, and cannot be had from the Hugging Face Hub "
            f"({str(error).splitlines()[0]})."
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a complete model directory of this version."""
    path = folder / _CONFIG
    if not path.is_file():
        runs = sorted(p.parent.name for p in folder.glob(f"*/{_CONFIG}"))
        cure = f"These do: {', '.join(runs)}." if runs else "Name one that `save_pretrained` wrote."
        raise FileNotFoundError(f"from_pretrained: {folder} holds no {_CONFIG}. {cure}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"from_pretrained: {path} cannot be read ({error}). Save the model again.") from error
    if found is None and "training" in values:
        raise FileNotFoundError(f"from_pretrained: {folder} is a run that is not finished. Go on with it by --resume.")
    if found != _FORMAT:
        raise ValueError(f"from_pretrained: {path} must be of format {_FORMAT!r}, got {found!r}. Save the model again.")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: {path.parent} is incomplete: it has no {path.name}. Copy it again.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"from_pretrained: {path} is damaged ({error}). Copy it again.") from error


def _check(path: Path, shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    """The tensors of ``path`` have the names and shapes that its configuration asks for."""
    for name in sorted(shapes.keys() | tensors.keys()):
        wanted, found = shapes.get(name), tuple(tensors[name].shape) if name in tensors else None
        if wanted != found:
            raise ValueError(
                f"from_pretrained: {path} does not fit {_CONFIG}: {name} must have shape {wanted}, got {found}. "
                "Take both from one model."
            )
