"""How the API reference reads docstrings: what griffe's Google parser does not know, said in Markdown.

A griffe extension, which mkdocs.yml names.
"""

import re
from pathlib import Path
from typing import Any

import griffe

_PAGES = Path(__file__).parent / "api"
_REFERENCE = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")
_OWN_SECTION = re.compile(r"^(State|Gradient|Numerics):\n((?: {4}.*\n?|\n)+)", re.MULTILINE)
_RETURNED = re.compile(r"^(Returns:\n {4})(?:Tensor|\w+Output): ", re.MULTILINE)
_SHARED = re.compile(r"^ {4}(\w+(?:,\s+\w+)+):(.*(?:\n {5,}.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Turns every docstring into what the parser and Markdown understand."""

    def __init__(self) -> None:
        text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(_PAGES.glob("*.md")))
        paths = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
        self.documented = {path.rpartition(".")[2]: path for path in paths}

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one module, class or function."""
        if obj.docstring:
            obj.docstring.value = self.markdown(obj.docstring.value)
            if isinstance(obj, griffe.Class) and "NamedTuple" in map(str, obj.bases):
                obj.docstring.value = re.sub(r"^Args:$", "Attributes:", obj.docstring.value, flags=re.MULTILINE)
        if isinstance(obj, griffe.Function):
            for parameter in obj.parameters:
                parameter.annotation = _shape(parameter.annotation)
            obj.returns = _shape(obj.returns)

    def markdown(self, text: str) -> str:
        """A docstring with sections that the parser knows, literal blocks as Markdown has them, and links."""
        text = re.sub(r"^::\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        text = re.sub(r"^Parameters:$", "Attributes:", text, flags=re.MULTILINE)
        text = _OWN_SECTION.sub(_paragraph, text)
        text = _RETURNED.sub(r"\1", text)  # the type is in the signature
        text = _SHARED.sub(_each, text)
        text = re.sub(r"(?<=[\[ ])\*N\b", r"\\*N", text)  # a shape, not the begin of emphasis
        return _REFERENCE.sub(self._link, text)

    def _link(self, match: re.Match[str]) -> str:
        """A link to what the reference documents; a name only, where it does not."""
        head, _, member = match[1].removeprefix("ops.").removeprefix("surrogate.").partition(".")
        if head not in self.documented:
            return match[0]
        return f"[{match[0]}][{self.documented[head]}{'.' * bool(member)}{member}]"


def _paragraph(match: re.Match[str]) -> str:
    """A section of ours as a paragraph under a title like those of the parser's sections."""
    body = re.sub(r"^ {4}", "", match[2], flags=re.MULTILINE)
    return f'<span class="doc-section-title">{match[1]}:</span>\n\n{body}'


def _each(match: re.Match[str]) -> str:
    """Parameters that share a description, one by one."""
    return "\n".join(f"    {name}:{match[2]}" for name in re.split(r",\s+", match[1]))


def _shape(annotation: Any) -> Any:
    """An annotation of jaxtyping with its shape as it is written, where griffe has read the string as Python."""
    text = str(annotation)
    quoted = re.sub(r"\[Tensor, ([^'\"\]]+)\]", lambda m: f'[Tensor, "{m[1].replace(" * ", " *")}"]', text)
    return annotation if quoted == text else quoted
