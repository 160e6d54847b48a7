"""The documentation: its code runs, its site builds, asks the network for nothing, and lists every public name."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from code_blocks import check_block, code_blocks

import spikeattn
import spikemo_model

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCKS = [(page.relative_to(DOCS), i) for page in sorted(DOCS.rglob("*.md")) for i in range(len(code_blocks(page)))]


@pytest.mark.parametrize(("page", "i"), BLOCKS, ids=str)
def test_code_blocks_run_and_print_what_they_say(page, i, capsys):
    check_block(code_blocks(DOCS / page)[i], page, capsys)


class Page(HTMLParser):
    """What a built page can be linked at, what it links to, and what a browser fetches for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found["id"]} if "id" in found else set()
        self.links |= {found["href"]} if tag == "a" and "href" in found else set()
        self.fetched |= {found["href"]} if tag == "link" else {found["src"]} if "src" in found else set()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    """Every built page."""
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_public_name_is_in_the_api_reference(pages):
    anchors = set().union(*(page.anchors for path, page in pages.items() if path.parent.name == "api"))
    for package in (spikeattn, spikemo_model):
        missing = {f"{package.__name__}.{name}" for name in package.__all__} - anchors
        assert not missing, f"add them to docs/api: {sorted(missing)}"


def test_sections_of_ours_and_equations_are_shown_as_such(site):
    text = (site / "api" / "operations.html").read_text(encoding="utf-8")
    lif = text[text.index('id="spikeattn.lif"') : text.index('id="spikeattn.norm_lif"')]
    for title in ("Parameters", "Returns", "Gradient", "Numerics", "Raises", "Examples"):
        assert lif.count(f'<span class="doc-section-title">{title}:</span>') == 1, title
    assert re.search(r"<code>H\[t\] = V\[t-1\] \+", lif)  # the equation is a block of code
    assert "::" not in re.sub(r"<[^>]+>", "", lif)
    assert "[T, *N]" in lif  # and its stars no emphasis
    assert re.search(r'href="[^"]*#spikeattn.Surrogate"', lif)


def test_parameters_that_share_a_description_are_listed_one_by_one(site):
    text = (site / "api" / "attention.html").read_text(encoding="utf-8")
    mlp = text[text.index('id="spikeattn.SpikingMLP"') : text.index('id="spikeattn.SpikingTransformerBlock"')]
    for name in ("norm", "tau", "v_threshold", "dtype"):
        assert re.search(rf"<b>{name}</b>|<code>{name}</code>", mlp), name


def test_no_page_asks_the_network_for_anything(site, pages):
    for path, page in pages.items():
        away = {address for address in page.fetched if re.match(r"(https?:)?//", address)}
        assert page.fetched, path.name
        assert not away, f"{path.name}: {away}"
    for path in site.rglob("*.css"):
        assert not re.search(r"""(@import|url\()\s*["']?(https?:)?//""", path.read_text(encoding="utf-8")), path.name


def test_links_lead_somewhere(pages):
    inside = 0
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            aim = (path.parent / target).resolve() if target else path
            assert aim in pages, f"{path.name} links to {link}"
            assert not anchor or anchor in pages[aim].anchors, f"{path.name} links to {link}"
            inside += 1
    assert inside > 500


def test_commands_and_options_in_the_guides_exist(site):
    text = (site / "api" / "command-line.html").read_text(encoding="utf-8")
    helps = dict(re.findall(r'<h2 id="([\w-]+)">.*?<code>(.*?)</code>', text, flags=re.DOTALL))
    lines = [
        line
        for page in sorted(DOCS.rglob("*.md"))
        for line in re.findall(r"^(?:python|torchrun .*) -m spikemo_model (.*)$", page.read_text("utf-8"), re.MULTILINE)
    ]
    assert len(lines) > 5
    for line in lines:
        command, *rest = line.split()
        for option in (word for word in rest if word.startswith("--")):
            assert re.search(rf"^ +{option}\b", helps[command], re.MULTILINE), f"{command} has no {option}"
