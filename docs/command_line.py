"""Fills the page of the command line with what its commands print with ``--help`` (a hook of mkdocs)."""

from contextlib import redirect_stdout, suppress
from io import StringIO
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """The page's Markdown, with a section for each command after it."""
    if page.file.src_uri != "api/command-line.md":
        return markdown
    import typer

    from spikemo_model.cli import app

    overview = _help()  # registers all commands
    sections = [f"## {name}\n\n{_help(name)}" for name in typer.main.get_command(app).commands]
    return "\n\n".join([markdown, overview, *sections])


def _help(*command: str) -> str:
    """What a command prints, as a block of code."""
    from spikemo_model.cli import main

    out = StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        main([*command, "--help"])
    return f"```\n{out.getvalue()}```"
