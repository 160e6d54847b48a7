"""Import of checkpoints of the authors' code (Yu-xm/SpikEmo)."""

import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spikemo_model.config import SpikEmoConfig
from spikemo_model.model import SpikEmo

# Their names to ours, but for the attention heads of the fusion. First match wins.
_RENAMES = [
    (r"spikformer_model\.blocks\.(\d+)\.attn\.([qkv])_m\.", r"dswa.shared.blocks.blocks.\1.attn.\2.linear."),
    (r"spikformer_model\.blocks\.(\d+)\.attn\.([qkv])_ln\.", r"dswa.shared.blocks.blocks.\1.attn.\2.norm."),
    (r"spikformer_model\.blocks\.(\d+)\.attn\.last_m\.", r"dswa.shared.blocks.blocks.\1.attn.out.linear."),
    (r"spikformer_model\.blocks\.(\d+)\.attn\.last_ln\.", r"dswa.shared.blocks.blocks.\1.attn.out.norm."),
    (r"spikformer_model\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"dswa.shared.blocks.blocks.\1.mlp.fc\2.linear."),
    (r"spikformer_model\.blocks\.(\d+)\.mlp\.ln(\d)\.", r"dswa.shared.blocks.blocks.\1.mlp.fc\2.norm."),
    (r"spikformer_model\.last_ln\.", r"dswa.shared.norm."),
    (r"(\w+)_dialoguernn\.dialog_rnn_f\.dialogue_cell\.", r"encoders.\1.context.forward_cell."),
    (r"(\w+)_dialoguernn\.dialog_rnn_r\.dialogue_cell\.", r"encoders.\1.context.reverse_cell."),
    (r"(\w+)_dialoguernn\.linear\.", r"encoders.\1.context.merge."),
    (r"(text|audio|visual)_fc\.", r"encoders.\1.projection."),
    (r"multiattn\.multiattn_(\w+)\.multiattn_layers\.(\d+)\.ff\.linear_W1\.", r"fusion.stacks.\1.\2.feed_forward.0."),
    (r"multiattn\.multiattn_(\w+)\.multiattn_layers\.(\d+)\.ff\.linear_W2\.", r"fusion.stacks.\1.\2.feed_forward.3."),
    (r"fc\.", r"classifier.merge."),
    (r"mlp\.linear_1\.", r"classifier.mlp.0."),
    (r"mlp\.linear_2\.", r"classifier.mlp.3."),
]  # fmt: skip
_STAGE = r"multiattn\.multiattn_(\w+)\.multiattn_layers\.(\d+)\."
_HEAD = re.compile(_STAGE + r"attn_(\d)\.attention_heads\.(\d+)\.(query|key|value)_matrix\.(weight|bias)")
_PROJECTION = re.compile(_STAGE + r"attn_(\d)\.projection_matrix\.(weight|bias)")
_ADD_NORM = re.compile(_STAGE + r"add_norm_(\d)\.layer_norm\.(weight|bias)")
# Parameters that never take part in the authors' forward pass.
_UNUSED = re.compile(r"spikformer_model\.transforms\.|\w+_dialoguernn\.")


def load_published_checkpoint(
    path_or_state_dict: str | PathLike[str] | Mapping[str, Tensor], config: SpikEmoConfig
) -> SpikEmo:
    """Make a `SpikEmo` with the weights of a checkpoint of the authors' code.

    With ``config.published_behaviour`` the model computes what theirs computes; without it, the same weights run
    with masks, a centred encoder (its LayerNorm at its start) and membranes that start from rest.

    Args:
        path_or_state_dict: A ``.safetensors`` file, a file of ``torch.save`` (read with ``weights_only=True``), or
            a state dict.
        config: Sizes of the model, as in `meld` or `iemocap`.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or holds more than tensors; the checkpoint lacks parameters of this
            configuration, or has others, or other shapes. The message names them.
    """
    state = path_or_state_dict if isinstance(path_or_state_dict, Mapping) else _read(Path(path_or_state_dict))
    if config.dswa is not None:  # weights that were trained with the published scale of attention
        config = replace(config, dswa=replace(config.dswa, init="published"))
    model = SpikEmo(config)
    ours = model.state_dict()
    renamed = _rename(state)
    missing = sorted(name for name in ours.keys() - renamed.keys() if not name.startswith("dswa.shared.centre."))
    theirs = {ours_name: theirs_name for ours_name, (theirs_name, _) in renamed.items()}
    extra = sorted(theirs[name] for name in renamed.keys() - ours.keys() if not _UNUSED.match(theirs[name]))
    wrong = sorted(
        f"{theirs[name]} {tuple(value.shape)} instead of {tuple(ours[name].shape)}"
        for name, (_, value) in renamed.items()
        if name in ours and value.shape != ours[name].shape
    )
    for what, names in (("lacks", missing), ("has, beyond the configuration,", extra), ("has shapes", wrong)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(
                f"load_published_checkpoint: the checkpoint {what} {shown}. Is it one of this configuration?"
            )
    model.load_state_dict({name: value for name, (_, value) in renamed.items() if name in ours}, strict=False)
    return model.eval()


def _read(path: Path) -> Mapping[str, Tensor]:
    """State dict of a file; nothing in it is executed."""
    if not path.is_file():
        raise FileNotFoundError(f"load_published_checkpoint: there is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"load_published_checkpoint: {path} cannot be read ({reason}). Only tensors are read; nothing is executed."
        ) from error


def _rename(state: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Our names to (one of) theirs and the value."""
    renamed: dict[str, tuple[str, Tensor]] = {}
    heads: dict[str, dict[tuple[str, int], tuple[str, Tensor]]] = {}
    for name, value in state.items():
        if match := _HEAD.fullmatch(name):
            modality, layer, stage, head, role, kind = match.groups()
            ours = f"fusion.stacks.{modality}.{layer}.attentions.{int(stage) - 1}.in_proj_{kind}"
            heads.setdefault(ours, {})[role, int(head)] = name, value
        elif match := _PROJECTION.fullmatch(name):
            modality, layer, stage, kind = match.groups()
            renamed[f"fusion.stacks.{modality}.{layer}.attentions.{int(stage) - 1}.out_proj.{kind}"] = name, value
        elif match := _ADD_NORM.fullmatch(name):
            modality, layer, stage, kind = match.groups()
            renamed[f"fusion.stacks.{modality}.{layer}.norms.{int(stage) - 1}.{kind}"] = name, value
        else:
            renamed[_rename_one(name)] = name, value
    for ours, parts in heads.items():
        order = sorted(parts, key=lambda part: (("query", "key", "value").index(part[0]), part[1]))
        renamed[ours] = parts[order[0]][0], torch.cat([parts[part][1] for part in order])
    return renamed


def _rename_one(name: str) -> str:
    """Our name of a parameter that is stored as we store it; their name where we have none."""
    for pattern, replacement in _RENAMES:
        ours, found = re.subn(rf"^{pattern}", replacement, name)
        if found:
            return ours.replace("attention.scalar.", "attention.")
    return name
