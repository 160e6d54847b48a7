"""What the README shows works as it stands there."""

import re
from pathlib import Path

from code_blocks import check_block, code_blocks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run_and_print_what_they_say(capsys):
    blocks = code_blocks(ROOT / "README.md")
    assert blocks
    for block in blocks:
        check_block(block, "README.md", capsys)


def test_files_that_are_named_exist():
    named = set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert named
    for path in named:
        assert (ROOT / path).exists(), path


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
