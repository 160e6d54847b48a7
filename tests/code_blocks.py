"""Python code in documents, run as it stands there."""

import re
from pathlib import Path


def code_blocks(page: Path) -> list[str]:
    """Each block of Python of a Markdown page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def check_block(block: str, page: str | Path, capsys) -> None:
    """Run a block: every ``print(...)  # this`` must print ``this``, and nothing else may print."""
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
    assert promised, "the block shows nothing"
    capsys.readouterr()
    exec(compile(block, str(page), "exec"), {})
    assert capsys.readouterr().out.splitlines() == promised
