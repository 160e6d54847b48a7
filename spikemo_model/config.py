"""Configurations: frozen dataclasses with their ranges checked, and the published presets."""

import dataclasses
import types
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

MELD_EMOTIONS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
IEMOCAP_EMOTIONS = ("happiness", "sadness", "neutral", "anger", "excitement", "frustration")

Context = Literal["none", "forward", "bidirectional", "gru"]


def _require(condition: bool, owner: object, rule: str, value: object) -> None:
    """Raise a ValueError that names the configuration, the rule and the value."""
    if not condition:
        raise ValueError(f"{type(owner).__name__}: {rule}, got {value!r}.")


@dataclass(frozen=True)
class ModalityConfig:
    """One modality.

    Args:
        features: Width of its feature vectors.
        context: What follows the projection: nothing, a DialogueRNN that reads the dialogue forward or in both
            directions, or plain GRUs in both directions beside it (`GRUContext`).
    """

    features: int
    context: Context = "bidirectional"

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.features >= 1, self, "features must be at least 1", self.features)
        _require(self.context in get_args(Context), self, f"context must be one of {get_args(Context)}", self.context)


@dataclass(frozen=True)
class DSWAConfig:
    """Dynamic spiking weight adaptation (paper, III-A2).

    Args:
        time_steps: T, how often the static spikes are repeated.
        depth: Spiking transformer blocks.
        num_heads: Heads of spiking attention.
        mlp_ratio: Width of a block's MLP, as a multiple of the model's width.
        tau: Membrane time constant in time steps, > 1.
        v_threshold: Threshold of the projections' neurons (dimensionless).
        attn_v_threshold: Threshold of the attention's neurons.
        scale: Multiplies the attention's sums of spikes.
        fire: What fires in attention: the "output" (the authors' code) or the "map" (eq. 1 as printed).
        init: "alive", or the "published" start, whose neurons hardly fire.
        shared: Whether all modalities share one set of weights, as published.
    """

    time_steps: int = 32
    depth: int = 2
    num_heads: int = 8
    mlp_ratio: float = 4.0
    tau: float = 10.0
    v_threshold: float = 1.0
    attn_v_threshold: float = 0.5
    scale: float = 0.125
    fire: Literal["output", "map"] = "output"
    init: Literal["alive", "published"] = "alive"
    shared: bool = True

    def __post_init__(self) -> None:
        """Check ranges; `spikeattn` checks the rest."""
        _require(self.time_steps >= 1, self, "time_steps must be at least 1", self.time_steps)
        _require(self.depth >= 1, self, "depth must be at least 1", self.depth)
        _require(self.tau > 1, self, "tau must be > 1 time step", self.tau)


@dataclass(frozen=True)
class FusionConfig:
    """MultiAttn (paper, III-B).

    Args:
        layers: Layers a modality; 0 leaves the fusion to the concatenation in the classifier.
        num_heads: Heads of each attention.
        hidden: Width inside the feed-forward stage.
        keys: Where keys and values come from in every layer: the "features" that enter the fusion (the authors'
            code), or the other modality's stack one "layer" before (eqs. 3 and 4 as printed).
    """

    layers: int = 6
    num_heads: int = 4
    hidden: int = 1024
    keys: Literal["features", "layer"] = "features"

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.layers >= 0, self, "layers must be at least 0", self.layers)
        _require(self.hidden >= 1, self, "hidden must be at least 1", self.hidden)
        _require(self.keys in ("features", "layer"), self, 'keys must be "features" or "layer"', self.keys)


@dataclass(frozen=True)
class SpikEmoConfig:
    """The classifier.

    Args:
        modalities: Any non-empty choice of modalities by name; their order is the order of fusion.
        classes: Emotions by name, in the order of the logits.
        dim: Width D of every modality inside the model.
        classifier_hidden: Width inside the last MLP.
        dropout: Probability in [0, 1), after projections, context, attention, feed-forward and in the classifier.
        input_dropout: Probability in [0, 1) of each feature that enters the model.
        dswa: Dynamic spiking weight adaptation; None leaves it out (Table IV).
        fusion: MultiAttn.
        published_behaviour: Compute as the authors' code does, for its checkpoints: no masks at padding, an encoder
            that is not centred, membranes carried from one modality to the next.
        is_causal: Whether an utterance sees itself and those before only, so that `SpikEmo.step` classifies a
            conversation as it goes on: contexts "none" or "forward", causal attention, a running softmax in eq. (2).
        modality_dropout: Probability in [0, 1) that a training step goes without a modality (one is always left). Above
            0 the model may be given any non-empty subset of its modalities.
    """

    modalities: dict[str, ModalityConfig]
    classes: tuple[str, ...] = MELD_EMOTIONS
    dim: int = 256
    classifier_hidden: int = 512
    dropout: float = 0.0
    input_dropout: float = 0.0
    dswa: DSWAConfig | None = field(default_factory=DSWAConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    published_behaviour: bool = False
    is_causal: bool = False
    modality_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges and what has to fit together."""
        _require(len(self.modalities) >= 1, self, "modalities must name at least one", self.modalities)
        _require(len(self.classes) >= 2, self, "classes must name at least two", self.classes)
        _require(len(set(self.classes)) == len(self.classes), self, "classes must be distinct", self.classes)
        _require(self.classifier_hidden >= 1, self, "classifier_hidden must be at least 1", self.classifier_hidden)
        for name in ("dropout", "input_dropout", "modality_dropout"):
            _require(0 <= getattr(self, name) < 1, self, f"{name} must be in [0, 1)", getattr(self, name))
        if any(modality.context == "gru" for modality in self.modalities.values()):
            _require(self.dim % 2 == 0, self, 'dim must be even for context "gru"', self.dim)
        heads = self.fusion.num_heads
        _require(self.dim % heads == 0, self, f"dim must be a multiple of fusion.num_heads = {heads}", self.dim)
        if self.dswa is not None:
            heads = self.dswa.num_heads
            _require(self.dim % heads == 0, self, f"dim must be a multiple of dswa.num_heads = {heads}", self.dim)
        if self.is_causal:
            contexts = {name: modality.context for name, modality in self.modalities.items()}
            onward = set(contexts.values()) <= {"none", "forward"}
            _require(onward, self, 'is_causal needs contexts "none" or "forward"', contexts)
            _require(not self.published_behaviour, self, "is_causal excludes published_behaviour", True)
        if self.published_behaviour:
            shared = self.dswa is not None and self.dswa.shared
            _require(shared, self, "published_behaviour needs a DSWA shared by the modalities", self.dswa)


@dataclass(frozen=True)
class LossConfig:
    """Weights and constants of the loss (paper, III-C).

    Args:
        ce_weight: Weight of cross-entropy, eq. (10).
        dice_weight: Weight of the self-adjusting Dice loss, eq. (9).
        corr_weight: Weight of the correlation loss, eq. (8).
        corr_pair_weights: Its weights of the pairs of modalities, alpha_1 ... of eq. (8), in the order of the
            modalities: (1, 2), (1, 3), (2, 3); empty for 1 each.
        dice_alpha: Exponent of (1 - p) in eq. (9).
        dice_gamma: Smoothing constant of eq. (9).
        label_smoothing: Share of the target spread over all classes in cross-entropy; 0 in the paper.
        balance: How far cross-entropy makes up for unequal classes: logits are trained with ``balance * log(share)``
            added (Menon et al. 2021, arXiv:2007.07314, eq. 10), from 0, as in the paper, to 1 for balanced error.
        contrastive_weight: Weight of MultiEMO's `focal_contrastive` loss; 0 in the paper.
        contrastive_temperature: Its temperature, > 0 (dimensionless).
        contrastive_focus: Its exponent of (1 - p), >= 1.
        contrastive_balance: Its exponent of one over a class's share.
    """

    ce_weight: float = 1.0
    dice_weight: float = 0.0
    corr_weight: float = 0.0
    corr_pair_weights: tuple[float, ...] = ()
    dice_alpha: float = 1.5
    dice_gamma: float = 0.5
    label_smoothing: float = 0.0
    balance: float = 0.0
    contrastive_weight: float = 0.0
    contrastive_temperature: float = 0.8
    contrastive_focus: float = 2.0
    contrastive_balance: float = 0.8

    def __post_init__(self) -> None:
        """Check ranges."""
        weights = (self.ce_weight, self.dice_weight, self.corr_weight, self.contrastive_weight)
        _require(min(weights) >= 0 and max(weights) > 0, self, "weights must be >= 0, one of them > 0", weights)
        _require(self.dice_gamma > 0, self, "dice_gamma must be > 0", self.dice_gamma)
        _require(0 <= self.label_smoothing < 1, self, "label_smoothing must be in [0, 1)", self.label_smoothing)
        _require(0 <= self.balance <= 1, self, "balance must be in [0, 1]", self.balance)
        temperature, focus = self.contrastive_temperature, self.contrastive_focus
        _require(temperature > 0, self, "contrastive_temperature must be > 0", temperature)
        _require(focus >= 1, self, "contrastive_focus must be at least 1", focus)


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation (paper, IV-A4).

    Args:
        epochs: Passes over the training dialogues, at most.
        batch_size: Dialogues a step, over all processes.
        optimizer: "adam", whose weight decay is L2 regularisation (the paper's), or "adamw", which decouples it.
        learning_rate: Of the optimiser, at the start.
        betas: Decay rates of its two moments.
        weight_decay: Of all parameters.
        lr_decay: Factor on the learning rate every ``lr_decay_epochs``.
        lr_decay_epochs: Epochs between two decays.
        gradient_clip: Largest norm of the gradient; 0 turns clipping off.
        patience: Epochs without a better validation score before training stops; 0 turns that off.
        ema_decay: Decay, a step, of the averaged weights that validation, test and the saved model use; 0 uses the
            last weights.
        precision: "32-true", or "bf16-mixed" for bfloat16 where it is safe.
        loss: The loss.
        seed: Of initialisation, order and dropout.
    """

    epochs: int = 50
    batch_size: int = 64
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-5
    lr_decay: float = 0.95
    lr_decay_epochs: int = 10
    gradient_clip: float = 0.0
    patience: int = 0
    ema_decay: float = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    loss: LossConfig = field(default_factory=LossConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("epochs", "batch_size", "lr_decay_epochs"):
            _require(getattr(self, name) >= 1, self, f"{name} must be at least 1", getattr(self, name))
        _require(self.learning_rate > 0, self, "learning_rate must be > 0", self.learning_rate)
        for name in ("weight_decay", "gradient_clip", "patience"):
            _require(getattr(self, name) >= 0, self, f"{name} must be >= 0", getattr(self, name))
        _require(0 <= self.ema_decay < 1, self, "ema_decay must be in [0, 1)", self.ema_decay)
        for name, choices in (("optimizer", ("adam", "adamw")), ("precision", ("32-true", "bf16-mixed"))):
            _require(getattr(self, name) in choices, self, f"{name} must be one of {choices}", getattr(self, name))


class Preset(NamedTuple):
    """A model and how to train it."""

    model: SpikEmoConfig
    training: TrainingConfig


def meld() -> Preset:
    """The published configuration for MELD: paper, IV-A4, with the layout of the authors' code."""
    modalities = {
        "text": ModalityConfig(768, "none"),
        "audio": ModalityConfig(512, "forward"),
        "visual": ModalityConfig(1000, "forward"),
    }
    loss = LossConfig(ce_weight=0.4, dice_weight=1.0, corr_weight=0.3)
    return Preset(SpikEmoConfig(modalities), TrainingConfig(batch_size=64, loss=loss))


def iemocap() -> Preset:
    """The published configuration for IEMOCAP: paper, IV-A4, with the layout of the authors' code."""
    modalities = {
        "text": ModalityConfig(768, "bidirectional"),
        "audio": ModalityConfig(512, "bidirectional"),
        "visual": ModalityConfig(1000, "bidirectional"),
    }
    loss = LossConfig(ce_weight=1.0, dice_weight=0.6, corr_weight=0.4)
    model = SpikEmoConfig(modalities, classes=IEMOCAP_EMOTIONS, classifier_hidden=256)
    return Preset(model, TrainingConfig(batch_size=32, loss=loss))


def compact(widths: dict[str, int], classes: tuple[str, ...] = MELD_EMOTIONS) -> Preset:
    """A configuration that two CPU cores train in minutes, for small data: ours.

    Plain GRUs give the context, at a fraction of DialogueRNN's time. One block of spiking attention over 4 time steps,
    one layer of fusion, strong dropout, cross-entropy that makes up for a part of the inequality of classes, and
    averaged weights.

    Args:
        widths: Width of the features by modality, e.g. ``Corpus.widths``.
        classes: Emotions by name.
    """
    model = SpikEmoConfig(
        {name: ModalityConfig(width, "gru") for name, width in widths.items()},
        classes=classes,
        dim=128,
        classifier_hidden=256,
        dropout=0.4,
        input_dropout=0.5,
        dswa=DSWAConfig(time_steps=4, depth=1, mlp_ratio=2.0, tau=2.0),
        fusion=FusionConfig(layers=1),
    )
    training = TrainingConfig(
        epochs=26,
        batch_size=32,
        optimizer="adamw",
        learning_rate=1.5e-3,
        weight_decay=0.1,
        lr_decay=1.0,
        gradient_clip=1.0,
        ema_decay=0.998,
        loss=LossConfig(balance=0.2),
    )
    return Preset(model, training)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values, for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Make a configuration of class ``cls`` from what `to_dict` returned.

    Raises:
        ValueError: A key is unknown or missing, or a value out of range; the message names the class.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown keys {unknown}; known are {sorted(known)}.")
    hints = get_type_hints(cls)
    try:
        return cls(**{name: _build(hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}.") from error


def _build(hint: Any, value: Any) -> Any:
    """``value`` as the type ``hint`` wants it: nested dataclasses from dicts, tuples from lists."""
    origin = get_origin(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        hint = next(arg for arg in get_args(hint) if arg is not types.NoneType)
        return _build(hint, value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    if origin is dict:
        return {key: _build(get_args(hint)[1], item) for key, item in value.items()}
    if origin is tuple:
        return tuple(value)
    return value
