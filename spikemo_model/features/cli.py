"""Commands ``extract`` and ``finetune-text``."""

from pathlib import Path
from typing import Annotated

import typer

from spikemo_model.data.corpus import Corpus
from spikemo_model.data.store import load_corpus
from spikemo_model.features.clips import read_release
from spikemo_model.features.text import DEFAULT_ENCODER
from spikemo_model.features.visual import DEFAULT_FACE_ENCODER

Root = Annotated[Path, typer.Argument(help="Folder of MELD or IEMOCAP as published.")]
Out = Annotated[Path, typer.Argument(help="New folder for the result.")]
Encoder = Annotated[str, typer.Option(help="Text encoder: a name on the Hugging Face hub or a local folder.")]
MaxTokens = Annotated[int | None, typer.Option(min=8, help="Tokens of context and utterance; default: the most.")]

_EXTRACT_EXAMPLES = """\b
Examples:
  python -m spikemo_model extract MELD.Raw features/meld
  python -m spikemo_model extract IEMOCAP_full_release features/iemocap --audio-width 512
  python -m spikemo_model extract MELD.Raw out --text-encoder models/roberta --face-encoder models/resnet
  python -m spikemo_model train --data-dir features/meld"""
_FINETUNE_EXAMPLES = """\b
Examples:
  python -m spikemo_model finetune-text features/meld tuned
  python -m spikemo_model train --data-dir tuned/features"""


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``; their errors are one-line OSErrors and ValueErrors.

    Args:
        app: The command line that gets them.
    """
    app.command("extract", epilog=_EXTRACT_EXAMPLES)(_extract)
    app.command("finetune-text", epilog=_FINETUNE_EXAMPLES)(_finetune_text)


def _extract(
    root: Root,
    out: Out,
    modality: Annotated[list[str] | None, typer.Option(help="text, audio or visual; repeat it; default: all.")] = None,
    text_encoder: Encoder = DEFAULT_ENCODER,
    max_tokens: MaxTokens = None,
    audio_width: Annotated[int | None, typer.Option(min=1, help="Reduce audio to this width by PCA.")] = None,
    face_encoder: Annotated[str, typer.Option(help="ResNet: a hub name or a folder.")] = DEFAULT_FACE_ENCODER,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
) -> None:
    """Make a feature store from raw clips. Stopped, the same command goes on; bad clips are listed and skipped."""
    from spikemo_model.features.extract import CLIPS, MODALITIES, extract

    flaws = extract(
        root,
        out,
        modality or MODALITIES,
        text_encoder=text_encoder,
        max_tokens=max_tokens,
        audio_width=audio_width,
        face_encoder=face_encoder,
        workers=workers,
    )
    for flaw in flaws[:10]:
        typer.echo(f"{flaw.split} {flaw.dialogue} {flaw.utterance}: {flaw.modality}: {flaw.reason}")
    if flaws:
        typer.echo(f"{len(flaws)} such stand-ins in all; {out / CLIPS} lists them.")
    typer.echo(f"features: {out}")


def _finetune_text(
    root: Annotated[Path, typer.Argument(help="Folder of MELD or IEMOCAP as published, or a feature store.")],
    out: Out,
    encoder: Encoder = DEFAULT_ENCODER,
    max_tokens: MaxTokens = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training utterances.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Utterances a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-5,
    seed: Annotated[int, typer.Option(help="Of start, order and dropout.")] = 0,
) -> None:
    """Fine-tune a text encoder for emotion on the training split, and store its features of all splits."""
    from spikemo_model.features.finetune import finetune_text

    finetune_text(
        _conversations(root),
        out,
        encoder,
        max_tokens=max_tokens,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    typer.echo(f"encoder: {out / 'encoder'}")
    typer.echo(f"features: {out / 'features'}")


def _conversations(root: Path) -> Corpus:
    """A feature store's conversations, or those of a data set as published."""
    return load_corpus(root) if (root / "index.json").is_file() else read_release(root).corpus
