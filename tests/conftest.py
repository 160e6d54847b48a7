"""Seeds by test, hypothesis without surprises, and required things that must not be skipped."""

import os
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiers import required

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed(request):
    """Each test draws its own numbers, the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN: a cell that is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data; a missing one fails, it does not skip."""
    root = os.environ.get("SPIKEMO_DATA")
    assert root, "set SPIKEMO_DATA to the folder that holds meld/ and mosi/"
    assert (Path(root) / "meld").is_dir(), f"SPIKEMO_DATA={root} holds no meld/"
    return Path(root)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Inputs and outputs of the authors' code."""
    return Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items):
    """Tests that need a GPU are skipped without one, unless SPIKEATTN_REQUIRE names it."""
    if torch.cuda.is_available() or required("cuda"):
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
