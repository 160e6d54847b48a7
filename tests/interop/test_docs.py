"""What docs/interop.md shows works as it stands there."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_run_and_print_what_they_say(block, capsys):
    promised = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
    assert promised
    exec(compile(block, "interop.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == promised
