"""A browser for tests: Debian's Chromium, driven as the Web module drives it."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from genvm_manager import CHROMIUM_FLAGS, BrowserProcess, find_chromium

from ..support import real_reactor
from .support import WAIT

_PLACE_OF_BUTTON = """(() => {
    const within = document.querySelector("dialog:modal") ?? document;
    const named = [...within.querySelectorAll("button")].find(
        (button) => (button.ariaLabel ?? button.innerText) === %s && button.checkVisibility());
    if (!named) return null;
    named.scrollIntoView({block: "center", behavior: "instant"});
    const box = named.getBoundingClientRect();
    const at = {x: box.x + box.width / 2, y: box.y + box.height / 2};
    return named.contains(document.elementFromPoint(at.x, at.y)) ? at : null;
})()"""


class Browser:
    """A Chromium with one page at a time; whoever asks it blocks while the reactor runs."""

    def __init__(self, program: str, folder: str) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._process = BrowserProcess(self._on_event, lambda: None)
        self._session: str | None = None
        self._context = ""
        unsafe = ["--no-sandbox"] if os.geteuid() == 0 else []
        argv = [program, *unsafe, f"--user-data-dir={folder}/profile", *CHROMIUM_FLAGS]
        environ = {"PATH": os.environ["PATH"], "HOME": folder, "TMPDIR": folder}
        pipes: dict[int, int | str] = {0: "w", 1: "r", 2: "r", 3: "w", 4: "r"}
        real_reactor().spawnProcess(self._process, program, argv, environ, childFDs=pipes)

    def _on_event(self, method: str, given: dict[str, Any]) -> None:
        self.events.append((method, given))

    async def call(self, method: str, **given: Any) -> Any:
        """Return the answer to a command for the page, or for the browser before there is one."""
        asked = Deferred.fromCoroutine(self._process.call(method, self._session, **given))
        return await asked.addTimeout(WAIT, real_reactor())

    async def open(self, url: str, *, width: int = 1280, height: int = 800) -> None:
        """Show a page in place of the one before, of which nothing is kept."""
        self._session = None
        if self._context:
            await self.call("Target.disposeBrowserContext", browserContextId=self._context)
        self.events.clear()
        context = await self.call("Target.createBrowserContext")
        self._context = context["browserContextId"]
        made = await self.call(
            "Target.createTarget", url="about:blank", browserContextId=self._context
        )
        attached = await self.call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "Accessibility"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        await self.call("Page.navigate", url=url)
        await self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    async def get(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str, timeout: float = WAIT) -> Any:
        """Return the value of an expression once it is true; fail with the text of the page."""
        deadline = time.monotonic() + timeout
        while True:
            with suppress(ValueError):  # the page is being loaded anew
                if value := await self.get(expression):
                    return value
            assert not (thrown := await self.seen("Runtime.exceptionThrown")), thrown
            if time.monotonic() > deadline:
                shown = await self.get("document.body.innerText")
                raise AssertionError(f"{expression}: not within {timeout} s, but:\n{shown}")
            await deferLater(real_reactor(), 0.02)

    async def text(self, selector: str) -> str:
        """Return what stands in an element, which must be there."""
        return str(await self.get(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def shows(self, selector: str, text: str) -> None:
        """Wait until a text stands in an element."""
        quoted = json.dumps(selector), json.dumps(text)
        await self.until("document.querySelector({})?.innerText.includes({})".format(*quoted))

    async def click(self, name: str) -> None:
        """Press the button of that name with the mouse, where people can see it."""
        place = await self.until(_PLACE_OF_BUTTON % json.dumps(name))
        for kind in ("mousePressed", "mouseReleased"):
            given = {"type": kind, "button": "left", "clickCount": 1, **place}
            await self.call("Input.dispatchMouseEvent", **given)

    async def press(self, key: str, text: str = "") -> None:
        """Press a key."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27}.get(key, 0)
        given = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **given)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    async def type(self, text: str) -> None:
        """Type a text where the focus is."""
        await self.call("Input.insertText", text=text)

    async def named(self, roles: str) -> dict[str, list[str]]:
        """Return the names that assistive technology tells, by role, of some roles."""
        found: dict[str, list[str]] = {}
        for node in (await self.call("Accessibility.getFullAXTree"))["nodes"]:
            role = node["role"]["value"]
            if not node["ignored"] and role in roles.split():
                found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
        return found

    async def seen(self, method: str) -> list[dict[str, Any]]:
        """Return what the browser told by events of a kind, since the page was opened."""
        await self.get("0")
        return [given for name, given in self.events if name == method]

    def close(self) -> None:
        """End it."""
        self._process.end()
        pytest_twisted.blockon(self._process.ended.wait().addTimeout(WAIT, real_reactor()))


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser, and nothing of it afterwards; for fixtures, which run outside the reactor."""
    program = find_chromium()
    assert program is not None, "no Chromium is installed (Debian's package: chromium)"
    with tempfile.TemporaryDirectory(prefix="gb-", ignore_cleanup_errors=True) as folder:
        browser = Browser(program, folder)
        try:
            yield browser
        finally:
            browser.close()
