"""The page in a real Chromium, driven over its debugging protocol: nothing but the browser and a socket."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from served import serving, toy_guard, wait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SHOTS = os.environ.get("INFERENCEGUARD_SCREENSHOTS")  # a directory: pictures are left there, to be looked at

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


class Page:
    """One tab."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> Any:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            code = {"Enter": 13, "Tab": 9}.get(key, 0)
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      **({"text": text} if text and kind == "keyDown" else {}))  # fmt: skip

    def shot(self, name: str) -> None:
        if SHOTS:
            picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            Path(SHOTS, name + ".png").write_bytes(base64.b64decode(picture))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: Any) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("chromium")
    assert CHROMIUM is not None
    process = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--remote-debugging-port=0", "--window-size=1280,900", f"--user-data-dir={folder}", "about:blank"],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    file = folder / "DevToolsActivePort"
    wait(lambda: file.exists() and len(file.read_text().split()) == 2, 120)
    yield file.read_text().split()[0]
    process.terminate()
    process.wait(60)


@contextlib.contextmanager
def opened(browser: str, url: str, dark: bool = False) -> Iterator[Page]:
    made = urllib.request.Request(f"http://127.0.0.1:{browser}/json/new?about:blank", method="PUT")
    with urllib.request.urlopen(made, timeout=60) as answer:
        address = json.load(answer)["webSocketDebuggerUrl"]
    with connect(address, max_size=None) as socket:
        page = Page(socket)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.call("Emulation.setEmulatedMedia", features=scheme)
        page.call("Page.navigate", url=url)
        wait(lambda: page.run("document.readyState === 'complete' && !!document.querySelector('#budget')?.value"))
        yield page


def send(page: Page, text: str) -> None:
    page.run(f"document.querySelector('#message').value = {json.dumps(text)}")
    page.run("document.querySelector('#form').requestSubmit()")


def answered(page: Page, count: int) -> None:
    wait(
        lambda: (
            page.run("!document.querySelector('#send').disabled && document.querySelectorAll('#turns li').length")
            == count
        )
    )


@pytest.mark.parametrize("dark", [False, True])
def test_a_chat_by_keyboard_shows_the_answer_and_its_search(browser: str, dark: bool) -> None:
    guard = toy_guard(margin=0.0)  # rows are charged in turn, so that some are not
    expected = guard.generate("be kind", seed=0)[0]
    with serving(guard, allow_unguarded=True) as live, opened(browser, f"http://127.0.0.1:{live.port}/", dark) as page:
        page.run("document.querySelector('#message').focus()")
        page.call("Input.insertText", text="be kind")
        page.press("Enter", "\r")
        answered(page, 2)
        assert page.run("document.querySelector('#turns li:last-child .text').textContent") == expected.text
        rows = sum(len(block["fate"]) for block in expected.record["search"])
        assert page.run("document.querySelectorAll('#blocks tbody tr').length") == rows
        marks = "document.querySelectorAll('#chart circle, #chart polygon, #chart text.fault').length"
        charged = sum(cost is not None for block in expected.record["search"] for cost in block["cost"])
        assert page.run(marks) == charged < rows
        assert (
            page.run("document.querySelector('#blocks').textContent.split('not charged').length") == rows - charged + 1
        )
        assert "proposals in" in page.run("document.querySelector('#chart title').textContent")
        assert f"{expected.cost:.2f} of budget 0.50" in page.run("document.querySelector('#verdict').textContent")
        page.run("document.querySelector('#unguarded').click()")
        send(page, "<b>rude</b> <script>alert(1)</script>")
        answered(page, 5)
        assert page.run("document.querySelectorAll('#turns b, #turns script').length") == 0, "text is text"
        assert "UNGUARDED" in page.run("document.querySelector('#turns li.bare').textContent")
        page.shot("dark" if dark else "light")
        page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off on a narrow screen"
        page.shot("narrow-dark" if dark else "narrow-light")
        hosts = {
            event["params"]["request"]["url"].split("/")[2]
            for event in page.events
            if event["method"] == "Network.requestWillBeSent" and event["params"]["request"]["url"].startswith("http")
        }
        assert hosts == {f"127.0.0.1:{live.port}"}, "no outside address"
        problems = [event for event in page.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        assert not problems


CONTRAST = """
(() => {
  const part = (x) => x / 255 <= 0.03928 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4;
  const light = (c) => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const read = (s) => s.match(/[\\d.]+/g).map(Number);
  const back = (e) => {
    for (; e; e = e.parentElement) {
      const c = read(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let worst = 99;
  for (const e of document.querySelectorAll('h1,h2,p,label,summary,td,th,caption,button,span')) {
    if (!e.textContent.trim() || !e.getClientRects().length || e.disabled) continue;
    const [a, b] = [light(read(getComputedStyle(e).color)), light(back(e))].sort((x, y) => y - x);
    worst = Math.min(worst, (a + 0.05) / (b + 0.05));
  }
  return worst;
})()
"""
WAY = ["message", "budget", "beams", "tokens", "seed", "send", "clear"]  # what the Tab key reaches, in this order


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_and_reached(browser: str, dark: bool) -> None:
    with serving(toy_guard()) as live, opened(browser, f"http://127.0.0.1:{live.port}/", dark) as page:
        page.run(
            "document.querySelector('#message').value = 'be kind'; document.querySelector('#form').requestSubmit()"
        )
        answered(page, 2)
        assert page.run(CONTRAST) >= 4.5, "WCAG AA"
        assert page.run("document.querySelector('#unguarded-field').hidden")
        reached = []
        page.run("document.querySelector('.skip').focus()")
        for _ in range(12):
            page.press("Tab")
            reached.append(page.run("document.activeElement.id || document.activeElement.tagName"))
        assert [name for name in reached if name in WAY][: len(WAY)] == WAY
        assert "SUMMARY" in reached, "the ledger is reached by keyboard"
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        asked = {"textbox", "button", "checkbox", "spinbutton", "image"}
        seen = [node for node in nodes if node.get("role", {}).get("value") in asked and not node["ignored"]]
        assert len(seen) >= 8
        assert all(node["name"]["value"] for node in seen), "everything that is used has a name"


def test_errors_are_shown(browser: str) -> None:
    with serving(toy_guard()) as live, opened(browser, f"http://127.0.0.1:{live.port}/") as page:
        send(page, "x" * 5000)
        answered(page, 2)
        assert "must be at most" in page.run("document.querySelector('#turns li.failed').textContent")
