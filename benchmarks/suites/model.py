"""A training step of the whole SpikEmo: ours, and the same model from SpikingJelly's and PyTorch's parts.

On a GPU ours runs by CUDA graphs, as training does; ours without them is listed, too.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peer_block import PeerBlock
from benchmarks.registry import Case, CaseMakers, Contender, Suite
from benchmarks.suites.block import parts_of
from spikemo_model import DialogueBatch, SpikEmo
from spikemo_model.config import DSWAConfig, ModalityConfig, Preset, SpikEmoConfig, TrainingConfig, iemocap, meld
from spikemo_model.context import DialogueCell, DialogueRNN, ModalityEncoder
from spikemo_model.data.meld import read_meld
from spikemo_model.graphs import GraphedSpikEmo
from spikemo_model.losses import spikemo_loss
from spikemo_model.model import SpikEmoOutput


class PeerCell(nn.Module):
    """`DialogueCell` by PyTorch's GRUCells, one utterance and one modality after another."""

    def __init__(self, ours: DialogueCell) -> None:
        super().__init__()
        self.cell = ours

    def forward(self, u: Tensor, speakers: Tensor, mask: Tensor, parties: int) -> Tensor:
        B, L, D = u.shape
        speaking = nn.functional.one_hot(speakers, parties).bool().unsqueeze(-1)
        g = e = u.new_zeros(B, D)
        p, past, states = u.new_zeros(B, parties, D), [], []
        for t in range(L):
            own = p.gather(1, speakers[:, t, None, None].expand(B, 1, D)).squeeze(1)
            context = u.new_zeros(B, D)
            if past:
                before = torch.stack(past, dim=1)
                context = (torch.softmax(self.cell.attention(before), dim=1) * before).sum(1)
            g = self.cell.g_cell(torch.cat([u[:, t], own], dim=-1), g)
            spoken = self.cell.p_cell(torch.cat([u[:, t], context], dim=-1), own)
            own = torch.where(mask[:, t, None], spoken, own)
            p = torch.where(speaking[:, t], own.unsqueeze(1), p)
            e = self.cell.e_cell(own, e)
            past.append(g)
            states.append(e)
        return torch.stack(states, dim=1)


class PeerContext(nn.Module):
    """`DialogueRNN`, its directions one after the other."""

    def __init__(self, ours: DialogueRNN) -> None:
        super().__init__()
        self.ahead, self.merge, self.dropout = PeerCell(ours.forward_cell), ours.merge, ours.dropout
        self.back = PeerCell(ours.reverse_cell) if ours.reverse_cell is not None else None

    def forward(self, u: Tensor, speakers: Tensor, mask: Tensor, parties: int) -> Tensor:
        e = self.ahead(u, speakers, mask, parties)
        if self.back is not None:
            position = torch.arange(u.shape[1], device=u.device).expand_as(mask)
            order = torch.where(mask, mask.sum(1, keepdim=True) - 1 - position, position)
            wide = order.unsqueeze(-1).expand_as(u)
            reverse = self.back(u.gather(1, wide), speakers.gather(1, order), mask, parties).gather(1, wide)
            e = self.merge(torch.cat([e, reverse * mask.unsqueeze(-1)], dim=-1))
        return torch.relu(self.dropout(e))


class PeerEncoders(nn.ModuleDict):
    """`ModalityEncoders`, one modality after another."""

    def forward(self, features: dict[str, Tensor], speakers: Tensor, mask: Tensor, parties: int) -> dict[str, Tensor]:
        encoded = {}
        for name, encoder in self.items():
            encoded[name] = encoder.project(features[name])
            if encoder.context is not None:
                encoded[name] = encoder.context(encoded[name], speakers, mask, parties)
        return encoded


class PeerBlocks(nn.Sequential):
    """`SpikingTransformer` of `PeerBlock`."""

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, key_padding_mask)
        return x


def peer_of(ours: SpikEmo, tokens: int) -> SpikEmo:
    """A copy with SpikingJelly's neurons, PyTorch's products and one cell of DialogueRNN at a time."""
    peer = copy.deepcopy(ours)
    encoders: dict[str, ModalityEncoder] = dict(peer.encoders.items())
    for encoder in encoders.values():
        if isinstance(encoder.context, DialogueRNN):
            encoder.context = PeerContext(encoder.context)
    peer.encoders = PeerEncoders(encoders)
    for dswa in peer.dswa.values():
        dswa.blocks = PeerBlocks(*(PeerBlock(parts_of(block, tokens)) for block in dswa.blocks.blocks))
    return peer.to(next(ours.parameters()).device)


Sized = tuple[Preset, tuple[int, ...]]  # of so many dialogues


def tiny(dialogues: int) -> Sized:
    """Size 1."""
    widths = {"text": ModalityConfig(8, "none"), "audio": ModalityConfig(6, "bidirectional")}
    return Preset(SpikEmoConfig(widths, dim=16, dswa=DSWAConfig(time_steps=2)), TrainingConfig()), (3, 2)


def MELD(dialogues: int) -> Sized:
    """The published configuration, and training dialogues of similar length, as `DialogueLoader` batches them."""
    root = os.environ.get("SPIKEMO_DATA")
    if root is None:
        raise SystemExit("error: set SPIKEMO_DATA to the folder that holds meld/: the lengths of dialogues are MELD's.")
    lengths = sorted(len(dialogue) for dialogue in read_meld(Path(root) / "meld").splits["train"])
    first = len(lengths) * 3 // 4 - dialogues // 2
    return meld(), tuple(lengths[first : first + dialogues])


def IEMOCAP(dialogues: int) -> Sized:
    """The published configuration, and a quarter of the dialogues, of made-up lengths with IEMOCAP's mean, 49."""
    return iemocap(), (64, 52, 46, 34) * (dialogues // 16)


def make_batch(config: SpikEmoConfig, lengths: tuple[int, ...]) -> DialogueBatch:
    """Random features of dialogues of these lengths."""
    B, L = len(lengths), max(lengths)
    mask = torch.arange(L) < torch.tensor(lengths).unsqueeze(1)
    return DialogueBatch(
        {name: torch.randn(B, L, own.features) for name, own in config.modalities.items()},
        torch.randint(0, 3, (B, L)),
        mask,
        torch.randint(0, len(config.classes), (B, L)).masked_fill(~mask, -1),
        parties=3,
    )


DIALOGUES = {"cpu": 16, "cuda": 64}  # a batch of MELD's


def cases(device: str, quick: bool) -> CaseMakers:
    """MELD's and IEMOCAP's published configurations; bfloat16 is autocast against the peer in float32."""
    sizes = [tiny] if quick else [MELD, IEMOCAP]
    return [partial(_case, size, device, low) for low in (False, True) for size in sizes]


def _case(size: Callable[[int], Sized], device: str, low: bool) -> Case:
    torch.manual_seed(0)
    preset, lengths = size(DIALOGUES[device])
    config, B, L = preset.model, len(lengths), max(lengths)
    batch = make_batch(config, lengths).to(device)
    ours = SpikEmo(config).to(device)
    T = config.dswa.time_steps if config.dswa else 1
    dtype = "bfloat16" if low else "float32"
    autocast = device if low else None
    own = _contender("spikeattn", ours, batch, preset, autocast)
    peer, theirs = peer_of(ours, L), "SpikingJelly 2.0.0's parts, float32"
    peers = {theirs: lambda: _contender(theirs, peer, batch, preset, None)}
    if device == "cuda":
        eager = replace(own, name="spikeattn without CUDA graphs")
        peers[eager.name] = lambda: eager
        own = _contender("spikeattn", ours, batch, preset, autocast, GraphedSpikEmo(ours))
    return Case(
        name=f"{size.__name__}: {B} dialogues, {sum(lengths)} utterances, L={L}, T={T}, {dtype}",
        sizes={"B": B, "L": L, "T": T, "dtype": dtype},
        ours=own,
        peers=peers,
        items=(B, "dialogues"),
    )


def _contender(
    name: str,
    model: SpikEmo,
    batch: DialogueBatch,
    preset: Preset,
    autocast: str | None,
    graphed: GraphedSpikEmo | None = None,
) -> Contender:
    """Inference, and a training step without the optimiser's."""
    call = graphed or model

    def loss(call: Callable[[DialogueBatch], SpikEmoOutput] = call) -> Tensor:
        with torch.autocast(autocast or "cpu", torch.bfloat16, enabled=autocast is not None):
            logits, fused = call(batch)
        by_modality = {modality: x[batch.mask].float() for modality, x in fused.items()}
        return spikemo_loss(
            logits[batch.mask].float(), by_modality, batch.labels[batch.mask], preset.training.loss
        ).total

    def training() -> None:
        model.zero_grad()
        loss().backward()

    def forward() -> Tensor:
        with torch.no_grad(), torch.autocast(autocast or "cpu", torch.bfloat16, enabled=autocast is not None):
            return call(batch).logits

    return Contender(name, forward, training, partial(loss, model), counts_memory=graphed is None)


MODEL = Suite("model", ["tests/model/test_model.py", "tests/model/test_parts.py"], cases)
