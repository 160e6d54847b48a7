"""``python -m spikemo_model``: the command line."""

from spikemo_model.cli import main

main()
