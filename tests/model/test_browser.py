"""The report in a real browser: nothing in the console, nothing from the network, nothing beside the screen."""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import pytest
from model_helpers import small_config
from report_helpers import RESULT, SCORES, conversations

from spikemo_model import SpikEmo
from spikemo_model.config import Preset, TrainingConfig
from spikemo_model.insight import measure
from spikemo_model.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
INSTALL = "apt-get install -y --no-install-recommends chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--no-first-run",
)
# Elements that are wider than the screen, or cut off by what holds them; those that are not shown have no width.
TOO_WIDE = """
[...document.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 ||
  e.getClientRects().length && e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; installs Debian's where there is none and we may."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if not found and shutil.which("apt-get") and os.geteuid() == 0:
        for command in ("apt-get update", INSTALL):
            subprocess.run(command.split(), check=False, capture_output=True, timeout=600)
        found = shutil.which("chromium")
    assert found, f"no browser: none of {NAMES} is on the PATH; install one, on Debian by: {INSTALL}"
    return found


class Browser:
    """A headless browser, spoken to by the DevTools protocol over two pipes."""

    def __init__(self, path: str, profile) -> None:
        to_read, self.to_browser = os.pipe()
        from_browser, to_write = os.pipe()
        # The protocol wants the descriptors 3 and 4.
        command = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", path, *FLAGS]
        command += [f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(to_read, to_write), **quiet)
        os.close(to_read)
        os.close(to_write)
        self.answers = os.fdopen(from_browser, "rb")
        self.rest, self.count, self.session, self.events = b"", 0, None, []
        pages = [target for target in self.ask("Target.getTargets")["targetInfos"] if target["type"] == "page"]
        attach = {"targetId": pages[0]["targetId"], "flatten": True}
        self.session = self.ask("Target.attachToTarget", **attach)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params):
        """Send a command and return its result; events that come before it are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def read(self) -> dict:
        """The next message; an event is kept, too."""
        while b"\0" not in self.rest:
            more = os.read(self.answers.fileno(), 1 << 16)
            assert more, f"the browser ended with {self.process.wait()}"
            self.rest += more
        own, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(own)
        if "method" in message:
            self.events.append(message)
        return message

    def show(self, url: str, width: int) -> None:
        """Load a page on a screen of ``width`` pixels, with everything unfolded."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Page.navigate", url=url)
        while not self.of("Page.loadEventFired"):
            self.read()
        self.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")

    def evaluate(self, script: str):
        """The value of a script on the page."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def of(self, method: str) -> list[dict]:
        """What the events of one kind say."""
        return [event["params"] for event in self.events if event["method"] == method]

    def complaints(self) -> list[str]:
        """Everything in the console."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(params) for kind in kinds for params in self.of(kind)]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, without what it carries itself."""
        urls = [params["request"]["url"] for params in self.of("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def close(self) -> None:
        """End it."""
        os.close(self.to_browser)
        self.process.wait(timeout=20)
        self.answers.close()


@pytest.fixture(scope="module")
def browser(chromium, tmp_path_factory):
    browser = Browser(chromium, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """Address of a report with every section, and with text that is hard to break."""
    corpus = conversations(
        (10, 1, 4, 7), texts=("supercalifragilistic" * 500, "<img src='http://127.0.0.1/x.png'>", "Ha 😀")
    )
    corpus = replace(corpus, name="MELD", notes=("A note about these conversations.",))
    config = small_config(modality_dropout=0.3)
    insight = measure(SpikEmo(config).eval(), corpus)
    preset = Preset(config, TrainingConfig())
    path = write_report(tmp_path_factory.mktemp("report"), RESULT, preset, corpus, "made up", insight, SCORES)
    return path.as_uri()


@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_is_quiet_by_itself_and_fits_the_screen(browser, report, width):
    browser.show(report, width)
    assert browser.complaints() == []
    assert browser.requests() == [report]
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(TOO_WIDE) == []
    smallest = "Math.min(...[...document.querySelectorAll('td, th, p, li, figcaption')].map(e => "
    assert browser.evaluate(smallest + "parseFloat(getComputedStyle(e).fontSize)))") >= 11
    pictures = (
        "[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 300)"
    )
    assert browser.evaluate(pictures) == [True] * 7


def test_a_bad_page_would_be_noticed(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<p style='width: 2000px'>wide</p><img src='http://127.0.0.1:9/x.png'><script>console.error('bad')</script>"
    )
    browser.show(page.as_uri(), 400)
    assert any("bad" in complaint for complaint in browser.complaints())
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert browser.evaluate("document.documentElement.scrollWidth") > 400
    assert any("wide" in element for element in browser.evaluate(TOO_WIDE))
