"""What a tier of tests needs, and that it must not be missed quietly where SPIKEATTN_REQUIRE names it."""

import os

import pytest


def required(name: str) -> bool:
    """Whether the absence of ``name`` (nvrtc, hostsim or cuda) is a failure."""
    return name in os.environ.get("SPIKEATTN_REQUIRE", "").split(",")


def skip_without(name: str, reason: str) -> None:
    """Skip the test because ``name`` is missing, or fail it where that is required."""
    if required(name):
        pytest.fail(f"SPIKEATTN_REQUIRE names {name}: {reason}")
    pytest.skip(reason)
