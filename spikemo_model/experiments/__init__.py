"""The paper's tables again, and ours beside them: several seeds of several configurations, compared in pairs."""

from spikemo_model.experiments.cells import EXPERIMENTS, Cell, Experiment, base
from spikemo_model.experiments.run import CellResult, run_cells
from spikemo_model.experiments.summary import write_summary

__all__ = ["EXPERIMENTS", "Cell", "CellResult", "Experiment", "base", "run_cells", "write_summary"]
