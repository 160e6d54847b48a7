"""The suites, by name."""

from benchmarks.registry import Suite
from benchmarks.suites.attention import ATTENTION
from benchmarks.suites.block import BLOCK
from benchmarks.suites.event_linear import EVENT_LINEAR
from benchmarks.suites.lif import LIF
from benchmarks.suites.norm_lif import NORM_LIF

SUITES: dict[str, Suite] = {suite.name: suite for suite in (LIF, NORM_LIF, EVENT_LINEAR, ATTENTION, BLOCK)}
