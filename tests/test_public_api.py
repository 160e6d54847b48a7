"""The public face: exported names, who may import whom, and what every docstring says."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import spikeattn
import spikemo_model

ROOT = Path(__file__).parent.parent
MODULES = sorted([*(ROOT / "spikeattn").rglob("*.py"), *(ROOT / "spikemo_model").rglob("*.py")])

# Each layer may import those after it, and itself.
LAYERS = [
    "spikemo_model",
    "spikeattn",
    "spikeattn.interop",
    "spikeattn._report",
    "spikeattn.nn",
    "spikeattn.ops",
    "spikeattn._recycled",
    "spikeattn._cpu",
    "spikeattn._checks",
    "spikeattn._backends",
    "spikeattn._cuda",
    "spikeattn._leak",
    "spikeattn._autograd",
    "spikeattn._compile",
]


def layer(module: str) -> int:
    """Position of the most particular layer that holds ``module``."""
    return max(i for i, name in enumerate(LAYERS) if module == name or module.startswith(name + "."))


def imports(path: Path) -> list[str]:
    """Modules of ours that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module in ("spikeattn", "spikemo_model"):
                found += [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                found.append(node.module)
    return [name for name in found if name.split(".")[0] in ("spikeattn", "spikemo_model")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for other in imports(path):
        assert layer(other) >= layer(own), f"{own} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_torchvision_prints_or_asserts_on_input(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert "torchvision" not in path.read_text(encoding="utf-8")
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: assert"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert path.name in ("experiment.py", "training.py", "__main__.py"), f"{path}:{node.lineno}: print"


def test_all_names_are_exported_and_sorted():
    assert set(spikeattn.__all__) <= set(dir(spikeattn))
    for name in [
        "lif",
        "LIF",
        "IF",
        "ParametricLIF",
        "Sigmoid",
        "ATan",
        "PiecewiseQuadratic",
        "PiecewiseExp",
        "SoftSign",
        "SuperSpike",
        "Erf",
        "Rect",
        "spike",
        "SpikingSelfAttention",
        "SpikingCrossAttention",
        "SpikeDrivenSelfAttention",
        "QKAttention",
        "SpatioTemporalAttention",
        "DualSpikeSelfAttention",
        "SpikingMLP",
        "SpikingTransformerBlock",
        "SpikingTransformer",
        "attention_maps",
        "firing_rates",
    ]:
        assert name in spikeattn.__all__
    assert {"SpikEmo", "SpikEmoConfig", "DialogueBatch"} <= set(spikemo_model.__all__)


def public(package) -> list[tuple[str, object]]:
    """Exported classes and functions of a package."""
    return [(name, getattr(package, name)) for name in package.__all__]


@pytest.mark.parametrize(("name", "thing"), [*public(spikeattn), *public(spikemo_model)])
def test_docstrings_name_every_parameter(name, thing):
    doc = inspect.getdoc(thing)
    assert doc
    assert doc.splitlines()[0].endswith("."), f"{name}: the first line is no sentence"
    if "Arguments, names and defaults of spikingjelly" in doc or issubclass_safe(thing, (Exception, tuple)):
        return
    described = set(re.findall(r"^\s{4}([a-z_0-9, \n]+):", doc.partition("Args:")[2], flags=re.MULTILINE))
    described = {part.strip() for group in described for part in group.replace("\n", " ").split(",")}
    for parameter in inspect.signature(thing).parameters:
        if "Args:" in doc and parameter not in ("self", "args", "kwargs"):
            assert parameter in described, f"{name}: {parameter} is not described"


def issubclass_safe(thing, classes) -> bool:
    """Whether ``thing`` is a class below one of ``classes``."""
    return inspect.isclass(thing) and issubclass(thing, classes)


def test_versions_agree():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{spikeattn.__version__}"' in text
    assert f"## {spikeattn.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_both_packages_are_typed():
    assert (ROOT / "spikeattn" / "py.typed").is_file()
    assert (ROOT / "spikemo_model" / "py.typed").is_file()
