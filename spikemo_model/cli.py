"""The command line: train, evaluate, predict and import, and the commands that other parts register."""

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from spikemo_model import experiment_cli
from spikemo_model.conversation import Utterance, read_conversations, read_live
from spikemo_model.features import cli as features_cli
from spikemo_model.model import SpikEmo

app = typer.Typer(
    help="SpikEmo: emotions in conversations, by spiking attention.",
    epilog="""\b
A first round, where $SPIKEMO_DATA holds meld/, or with what can be downloaded:
  python -m spikemo_model train --run-dir runs/first
  python -m spikemo_model evaluate runs/first/seed0
  python -m spikemo_model predict runs/first/seed0 chat.jsonl""",
    add_completion=False,
    rich_markup_mode=None,
)

_SAID = 48  # characters shown of who said what

Data = Annotated[
    Literal["meld", "mosi"], typer.Option(help="Data set: MELD, or CMU-MOSI. A feature store in --data-dir needs none.")
]
DataDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Feature store of any data set, or folder of the data set's files. Without it: $SPIKEMO_DATA; for MELD "
        "then the user cache, a download, or made-up conversations.",
        show_default=False,
    ),
]
Text = Annotated[
    str,
    typer.Option(
        help='Text features of MELD: "frozen" or "finetuned", which come with the data; "ngrams"; or a Hugging Face '
        'encoder, a name or a folder; "auto" is frozen where it is.'
    ),
]
Model = Annotated[
    str, typer.Argument(help="Model directory, e.g. of a finished run (runs/NAME/seed0), or a name on the Hub.")
]


@app.command(
    epilog="""\b
Examples:
  train                                                 MELD, frozen text and prosody, one seed
  train --seeds 3 --text finetuned                      another text encoder, three seeds
  train --data-dir stores/iemocap --preset published    a feature store, the paper's sizes
  train --data mosi --batch-size 8 --epochs 18          CMU-MOSI, three modalities
  train --resume runs/meld-20260101-120000              go on where a run was stopped
  torchrun --nproc_per_node=2 -m spikemo_model train --run-dir runs/two"""
)
def train(
    data: Data = "meld",
    data_dir: DataDir = None,
    text: Text = "auto",
    modalities: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Subset of the modalities found, separated by commas, e.g. text,audio. Default: all.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        Literal["compact", "published"],
        typer.Option(help="compact: minutes on a CPU. published: the paper's sizes for IEMOCAP or MELD, for a GPU."),
    ] = "compact",
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training split, at most. Default: the preset's.", min=1)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Dialogues a step, over all processes. Default: the preset's.", min=1)
    ] = None,
    time_steps: Annotated[
        int | None, typer.Option(help="T of the spiking blocks, in time steps. Default: the preset's.", min=1)
    ] = None,
    patience: Annotated[
        int, typer.Option(help="Epochs without a better validation score before training stops; 0: never.", min=0)
    ] = 0,
    precision: Annotated[
        Literal["32-true", "bf16-mixed"], typer.Option(help="float32, or bfloat16 where it is safe.")
    ] = "32-true",
    seeds: Annotated[int, typer.Option(help="Number of runs, each with the next seed.", min=1)] = 1,
    first_seed: Annotated[int, typer.Option(help="Seed of the first run.", min=0)] = 0,
    accelerator: Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="Device.")] = "auto",
    save_every: Annotated[
        int, typer.Option(help="Steps between two checkpoints inside an epoch; 0: only at its end.", min=0)
    ] = 0,
    causal: Annotated[
        bool, typer.Option("--causal", help="Train a model for live conversations, which sees the past only.")
    ] = False,
    modality_dropout: Annotated[
        float,
        typer.Option(help="Probability that a step lacks a modality, in [0, 1); above 0, predict does without some."),
    ] = 0.0,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="New folder of the runs. Default: runs/DATA-<time>.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Go on with the runs in this folder, with their own options.", show_default=False
        ),
    ] = None,
) -> None:
    """Train a model, score it and write a report.

    With one seed or several; the epoch is selected on validation, and the test split scored once. The folder of each
    seed is a model directory in the end, for evaluate and predict.
    """
    from spikemo_model.job import Job, new_run_dir, read_job, run_job
    from spikemo_model.training import TrainingDivergedError

    try:
        if resume:
            run_job(read_job(resume), resume, resume=True)
            return
        names = tuple(modalities.split(",")) if modalities else None
        job = Job(
            data=data,
            data_dir=data_dir,
            text=text,
            modalities=names,
            preset=preset,
            epochs=epochs,
            batch_size=batch_size,
            time_steps=time_steps,
            patience=patience,
            precision=precision,
            seeds=seeds,
            first_seed=first_seed,
            accelerator=accelerator,
            save_every=save_every,
            causal=causal,
            modality_dropout=modality_dropout,
        )
        run_job(job, run_dir or new_run_dir(data))
    except TrainingDivergedError as error:
        raise ValueError(error) from error


@app.command(
    epilog="""\b
Examples:
  evaluate runs/first/seed0                               MELD's test split
  evaluate runs/first/seed0 --split valid
  evaluate runs/iemocap/seed0 --data-dir stores/iemocap"""
)
def evaluate(
    model: Model,
    data: Data = "meld",
    data_dir: DataDir = None,
    text: Text = "auto",
    split: Annotated[Literal["train", "valid", "test"], typer.Option(help="Which conversations.")] = "test",
) -> None:
    """Score a model on a split of a data set.

    Prints F1 by class and weighted, in percent, beside the paper's of the test split. Features are standardised as
    the model has learned. A model of --modality-dropout does without a modality that the data lacks.
    """
    from spikemo_model.evaluation import predict, score
    from spikemo_model.job import locate
    from spikemo_model.prediction import fit
    from spikemo_model.report import format_table, score_table

    trained = SpikEmo.from_pretrained(model)
    located = locate(data, data_dir, text)
    corpus = fit(located.corpus, trained.config, trained.origin)
    dialogues = corpus.splits[split]
    scores = score(predict(trained, dialogues), dialogues, corpus.classes)
    header, *rows = score_table(scores, None, corpus)
    typer.echo(f"model: {model}\ndata: {located.source}")
    missing = [name for name in trained.config.modalities if name not in corpus.about]
    if missing:
        typer.echo(f"without {' and '.join(missing)}, which the data lacks: scored on {', '.join(corpus.about)} alone")
    typer.echo()
    columns = None if split == "test" else 2  # the paper's column is of the test split
    typer.echo(format_table([(f"F1 on {split}, %", *header[1:columns]), *(row[:columns] for row in rows)]))
    typer.echo(f"\n{scores.utterances} utterances, {scores.accuracy:.2f} % right")


@app.command(
    epilog="""\b
chat.jsonl holds an object a line:
  {"speaker": "Joey", "text": "How you doin'?"}
  {"speaker": "Rachel", "text": "Fine.", "features": {"text": [0.1, ...], "audio": "rachel.npy"}}
  {"speaker": "Joey", "text": "So...", "clip": "joey.mp4"}
chat.csv has a header:
  speaker,text,dialogue,features,clip
  Joey,"How you doin'?",scene 1,joey.safetensors,
\b
Only speaker and text must be there. Features that are not given are made by the extractors that the model
remembers: text of the text, audio and visual of the clip. A model of --modality-dropout does without a modality that
no utterance has. Utterances without dialogue are one dialogue. Empty lines are passed over; an empty text is an
utterance; a text encoder reads as much of a long one as it takes.
\b
Examples:
  predict runs/first/seed0 chat.jsonl
  predict runs/first/seed0 chat.csv --json > emotions.jsonl
  tail -f chat.jsonl | python -m spikemo_model predict runs/live/seed0 --live"""
)
def predict(
    model: Model,
    conversation: Annotated[
        Path | None,
        typer.Argument(help="File of utterances: .csv, or JSON Lines. Not with --live.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object a line instead of a table.")] = False,
    live: Annotated[
        bool,
        typer.Option("--live", help="Read standard input, JSON Lines or CSV, and print each utterance when it comes."),
    ] = False,
) -> None:
    """Tell the emotions of a conversation.

    Prints the probability of each emotion for every utterance. With --live, of a model of train --causal, at once.
    """
    if (conversation is None) != live:
        raise ValueError("predict: give a file, or --live to read standard input.")
    if conversation is None:
        _predict_live(SpikEmo.from_pretrained(model), as_json)
        return
    dialogues = read_conversations(conversation)
    trained = SpikEmo.from_pretrained(model)
    predicted = {dialogue: trained.predict(utterances) for dialogue, utterances in dialogues.items()}
    for dialogue, utterances in dialogues.items():
        if as_json:
            for u, row in zip(utterances, predicted[dialogue], strict=True):
                typer.echo(_json_line(dialogue, u, row))
        else:
            typer.echo(f"{dialogue}\n\n" * bool(dialogue) + _table(utterances, predicted[dialogue]) + "\n")


@app.command(
    "import",
    epilog="""\b
Examples:
  import MultiEMO/Data/MELD stores/meld           TextFeatures.pkl, AudioFeatures.pkl, VisualFeatures.pkl, Speakers.pkl
  import MMGCN/features stores/iemocap            one IEMOCAP_features*.pkl""",
)
def import_features(
    source: Annotated[Path, typer.Argument(help="Folder of the pickles.")],
    target: Annotated[Path, typer.Argument(help="New folder of the feature store.")],
    seed: Annotated[
        int, typer.Option(help="Of the validation split, which is drawn where the files name none.", min=0)
    ] = 0,
) -> None:
    """Import pickled features of other projects.

    Reads MultiEMO's or MMGCN's files, without running anything in them, and writes a feature store.
    """
    from spikemo_model.data import import_legacy_features

    corpus = import_legacy_features(source, target, seed)
    typer.echo(f"{corpus.name}: {', '.join(f'{name} {width}-d' for name, width in corpus.widths.items())}")
    for split, dialogues in corpus.splits.items():
        typer.echo(f"  {split}: {len(dialogues)} dialogues, {sum(map(len, dialogues))} utterances")
    for note in corpus.notes:
        typer.echo(f"  note: {note}")
    typer.echo(f"feature store: {target}")


experiment_cli.register(app)
features_cli.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: with 0, or with 1 and one line on what is wrong.

    Args:
        arguments: Of the command line; None for those of the process.
    """
    try:
        given = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
        sys.exit(app(given, prog_name="python -m spikemo_model", standalone_mode=False))
    except (OSError, ValueError, ModuleNotFoundError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if isinstance(error, ModuleNotFoundError):
            message += '. Install what the command needs: pip install "spikeattn[spikemo,features]"'
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        sys.exit(1)


def _predict_live(model: SpikEmo, as_json: bool) -> None:
    """Print each utterance of standard input when it comes; ``typer.echo`` flushes."""
    from spikemo_model.live import LiveConversation
    from spikemo_model.report import format_table

    if sys.stdin is None:
        raise ValueError("predict: --live reads standard input, which is closed. Pipe the conversation into it.")
    LiveConversation(model)  # refuses a model that is not causal before anybody has said anything
    conversations: dict[str, LiveConversation] = {}
    header_shown, named = False, ""
    columns = max(map(len, model.config.classes))
    for dialogue, utterance in read_live(sys.stdin.buffer):
        if dialogue not in conversations:
            conversations[dialogue] = LiveConversation(model)
        row = conversations[dialogue].add(utterance)
        if as_json:
            typer.echo(_json_line(dialogue, utterance, row))
            continue
        header = ("utterance".ljust(_SAID), "emotion".rjust(columns), *row)
        *head, line = format_table([header, _table_row(utterance, row)]).splitlines()
        if not header_shown:
            typer.echo("\n".join(head))
            header_shown = True
        if dialogue != named:
            typer.echo(dialogue)
            named = dialogue
        typer.echo(line)


def _json_line(dialogue: str, u: Utterance, row: dict[str, float]) -> str:
    """An utterance with its probabilities, as JSON."""
    found = {"dialogue": dialogue, "speaker": u.speaker, "text": u.text, "probabilities": row}
    return json.dumps(found, ensure_ascii=False)


def _table_row(u: Utterance, row: dict[str, float]) -> tuple[str, ...]:
    """Who said what, the likeliest emotion, and the probability of each."""
    said = textwrap.shorten(f"{u.speaker}: {u.text}", _SAID, placeholder=" ...")
    return (said, max(row, key=row.__getitem__), *(f"{p:.2f}" for p in row.values()))


def _table(utterances: Sequence[Utterance], rows: Sequence[dict[str, float]]) -> str:
    """A dialogue's rows under a header."""
    from spikemo_model.report import format_table

    return format_table([("utterance", "emotion", *rows[0]), *map(_table_row, utterances, rows)])
