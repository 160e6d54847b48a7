"""What the README shows works as it stands there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_code_blocks_run_and_print_what_they_say(capsys):
    assert BLOCKS
    for block in BLOCKS:
        promised = re.findall(r"^print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        capsys.readouterr()
        exec(compile(block, "README.md", "exec"), {})
        assert capsys.readouterr().out.splitlines() == promised


def test_files_that_are_named_exist():
    named = set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert named
    for path in named:
        assert (ROOT / path).exists(), path


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
