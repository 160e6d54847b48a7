"""Watch a model tell the emotions of conversations as they go on.

Takes a causal model, else trains a small one on MELD's text for some epochs, and plays dialogues of MELD's test
split to it, utterance by utterance. It has seen nothing of what comes later.

    python examples/live.py                                          train for two epochs first, about a minute
    python examples/train_meld.py --causal --modalities text --run-dir runs/live
    python examples/live.py --model runs/live/seed0 --dialogues 3 --pause 1
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from spikemo_model import SpikEmo
from spikemo_model.conversation import Utterance
from spikemo_model.data import Corpus
from spikemo_model.job import Job, locate, run_job
from spikemo_model.live import LiveConversation
from spikemo_model.prediction import fit


def play(model: SpikEmo, corpus: Corpus, dialogues: int, pause: float) -> None:
    """Print the utterances of some dialogues with the emotion that the model hears, and the true one."""
    for dialogue in sorted(corpus.splits["test"], key=len)[-dialogues:]:
        live = LiveConversation(model)
        print(f"\n{dialogue.id}")
        for i, speaker in enumerate(dialogue.speakers):
            features = {name: x[i] for name, x in dialogue.features.items()}
            text = dialogue.texts[i] if dialogue.texts else ""
            start = time.perf_counter()
            emotions = live.add(Utterance(speaker, text, features))
            took = 1e3 * (time.perf_counter() - start)
            heard = max(emotions, key=emotions.__getitem__)
            label = int(dialogue.labels[i])
            truth = corpus.classes[label] if label >= 0 else "unknown"
            print(f"  {heard:>9} {emotions[heard]:4.0%} (it is {truth}; {took:.0f} ms)  {speaker}: {text}", flush=True)
            time.sleep(pause)


def main(argv: list[str] | None = None) -> None:
    """Options, a model, dialogues."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a causal model; default: train one")
    parser.add_argument("--data-dir", help="folder of MELD's files, or a feature store")
    parser.add_argument("--epochs", type=int, default=2, help="of training, without --model")
    parser.add_argument("--dialogues", type=int, default=2, help="how many to play, the longest")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between utterances")
    options = parser.parse_args(argv)
    try:
        corpus = locate("meld", options.data_dir).corpus
        if options.model:
            model = SpikEmo.from_pretrained(options.model)
        else:
            with tempfile.TemporaryDirectory() as folder:
                job = Job(data_dir=options.data_dir, modalities=("text",), epochs=options.epochs, causal=True)
                run_job(job, Path(folder))
                model = SpikEmo.from_pretrained(Path(folder) / "seed0")
        corpus = fit(corpus, model.config, model.origin)
        model.origin = replace(model.origin, standardised={}, reduced={})  # the features are so already
        play(model, corpus, options.dialogues, options.pause)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
