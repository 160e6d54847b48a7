"""``python -m spikemo_model experiment``, outside `spikemo_model.experiments`, which takes seconds to import."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Name = Literal["ablation", "modalities", "timesteps", "losses", "compare"]


def register(app: typer.Typer) -> None:
    """Add the command ``experiment`` to ``app``."""
    app.command("experiment", epilog="Example: experiment ablation --seeds 3 --workers 2")(experiment)


def experiment(
    name: Annotated[
        Name,
        typer.Argument(
            help="ablation: Table IV. modalities: Table V. timesteps: Figure 4, T = 2 ... 64. losses: the losses one "
            "by one. compare: beside our MultiEMO and DialogueRNN."
        ),
    ],
    data: Annotated[Literal["meld", "mosi"], typer.Option(help="Which data.")] = "meld",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data's files, or for meld a feature store of any name; else $SPIKEMO_DATA, and as in "
            "train."
        ),
    ] = None,
    text: Annotated[
        str, typer.Option(help='Text features of MELD: "frozen", "finetuned", "ngrams", or a Hugging Face encoder.')
    ] = "auto",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each configuration.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs at most, instead of the preset's 26.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Dialogues a step, instead of the preset's 32.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time, each with a thread or a GPU; default: all there are.")
    ] = None,
    accelerator: Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="Where to train.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of runs and table; what is finished in it is kept. Default: runs/NAME-DATA."),
    ] = None,
) -> None:
    """Compare configurations over several seeds: one table and one plot, beside the paper's numbers.

    Stopped at any moment, the same command goes on where it was. Two minutes a run on one core, with MELD.
    """
    from spikemo_model.experiments.cells import EXPERIMENTS, base
    from spikemo_model.experiments.run import run_cells
    from spikemo_model.experiments.summary import write_summary
    from spikemo_model.job import locate

    folder = out or Path("runs") / f"{name}-{data}"
    try:
        corpus, source = locate(data, data_dir, text)
        typer.echo(f"data: {source}")
        chosen = EXPERIMENTS[name](base(corpus, epochs, batch_size))
        results = run_cells(
            corpus,
            chosen.cells,
            range(first_seed, first_seed + seeds),
            folder,
            workers=workers,
            accelerator=accelerator,
            announce=typer.echo,
        )
        options = [f"--{key} {value}" for key, value in (("data", data), ("text", text), ("seeds", seeds))]
        options += [f"--first-seed {first_seed}"] if first_seed else []
        options += [f"--epochs {epochs}"] if epochs else []
        options += [f"--batch-size {batch_size}"] if batch_size else []
        command = f"python -m spikemo_model experiment {name} {' '.join(options)}"
        path = write_summary(chosen, results, corpus, command, folder)
    except (OSError, ValueError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"\n{path.read_text(encoding='utf-8')}\ntable: {path}\nplot: {path.with_suffix('.svg')}")
