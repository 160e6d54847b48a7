"""The suites, by name."""

from benchmarks.registry import Suite
from benchmarks.suites.attention import ATTENTION
from benchmarks.suites.block import BLOCK
from benchmarks.suites.event_linear import EVENT_LINEAR
from benchmarks.suites.lif import LIF
from benchmarks.suites.model import MODEL
from benchmarks.suites.norm_lif import NORM_LIF
from benchmarks.suites.streaming import STREAMING

_ALL = (LIF, NORM_LIF, EVENT_LINEAR, ATTENTION, BLOCK, MODEL, STREAMING)
SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}
