"""The page at ``GET /``, in a real Chromium."""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from genvm_manager import find_chromium

from ..support import async_test
from .browser import Browser, browsing
from .conftest import Start
from .support import WAIT, Daemon, Root, free_port, run_body

in_chromium = pytest.mark.skipif(
    find_chromium() is None and "GENVM_REQUIRE_CHROMIUM" not in os.environ,
    reason="no Chromium is installed (Debian's package: chromium)",
)
TOKEN = "a-token-of-sixteen-characters"
HOSTILE = "<img src=x onerror=hit()><script>hit()</script>"
BROWSERS = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
EXPECTED = re.compile("Failed to load resource: the server responded with a status of (401|500)")


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    """A browser for all tests of the file."""
    with browsing() as made:
        yield made


@asynccontextmanager
async def showing(browser: Browser, daemon: Daemon, **size: int) -> AsyncIterator[Browser]:
    """Show the page of a manager, which may use nothing else and break no rule of its own."""
    await browser.open(f"http://{daemon.address}/", **size)
    yield browser
    asked = [each["request"]["url"] for each in await browser.seen("Network.requestWillBeSent")]
    places = {url.split("/")[2] for url in asked if url != "data:,"}
    assert places == {daemon.address}, asked
    entries = [each["entry"]["text"] for each in await browser.seen("Log.entryAdded")]
    assert [text for text in entries if not EXPECTED.match(text)] == []
    assert await browser.seen("Runtime.exceptionThrown") == []
    assert await browser.seen("Runtime.consoleAPICalled") == []


def with_token(root: Root, start: Start) -> Daemon:
    file = root.path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    return start("--auth-token-file", str(file))


def ask(
    daemon: Daemon, headers: Mapping[str, str], method: str = "GET", path: str = "/"
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(daemon.address, timeout=WAIT)
    try:
        connection.request(method, path, headers=dict(headers))
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, response.read()
    finally:
        connection.close()


# --- what is sent ---


def test_only_browsers_get_the_page(daemon: Daemon) -> None:
    status, headers, page = ask(daemon, BROWSERS)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert rules.pop("script-src").startswith("'sha256-")
    assert rules.pop("style-src").startswith("'sha256-")
    assert rules == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert re.findall(rb"https?:|//[a-z]|innerHTML|insertAdjacent|eval\(", page) == []
    assert ask(daemon, BROWSERS, "HEAD")[1]["content-length"] == str(len(page))
    assert headers["vary"] == "accept"
    for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        assert json.loads(ask(daemon, accept)[2])["name"] == "genvm-manager"
    assert json.loads(ask(daemon, BROWSERS, path="/livez")[2]) == {"result": "alive"}
    assert ask(daemon, BROWSERS, "POST")[0] == 405


@pytest.mark.parametrize(
    ("accept", "gets_page"),
    [
        ("text/html", True),
        ("TEXT/HTML; charset=utf-8", True),
        ("text/*", True),
        ("text/html, */*", True),
        ("text/html;q=0.5, application/json;q=0.4", True),
        ("text/html, application/json", True),
        ("application/json, text/html", False),
        ("application/json, text/html;q=0", False),
        ("application/json;q=0.5, text/html;q=0.4", False),
        ("application/json, text/plain, */*", False),
        ("*/*, text/html;q=0", False),
        ("text/*, text/html; Q = 0.000", False),
        ("text/html;q=0", False),
        ("application/json;q=0, text/html;q=0.001", True),
        ("not-text/html, text/html-not", False),
    ],
)
def test_which_of_page_and_json_is_preferred(daemon: Daemon, accept: str, gets_page: bool) -> None:
    status, headers, _ = ask(daemon, {"Accept": accept})
    assert (status, headers["vary"]) == (200, "accept")
    kind = "text/html" if gets_page else "application/json"
    assert headers["content-type"] == f"{kind}; charset=utf-8"


def test_who_gets_the_page(daemon: Daemon, root: Root, start: Start) -> None:
    for foreign in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        assert ask(daemon, {**BROWSERS, **foreign})[0] == 403
    guarded = with_token(root, start)
    status, _, page = ask(guarded, {**BROWSERS, "Host": "node.example"})
    assert status == 200
    assert TOKEN.encode() not in page
    assert ask(guarded, {**BROWSERS, "Origin": "http://evil.example"})[0] == 403
    assert ask(guarded, {})[0] == ask(guarded, {"Accept": "application/json"})[0] == 401
    assert ask(guarded, BROWSERS, path="/status")[0] == 401
    assert ask(guarded, BROWSERS, "POST")[0] == 401
    # Nobody without the token fills the log, as Twisted's words about a HEAD with a body would.
    assert ask(guarded, BROWSERS, "HEAD")[0] == 200
    assert ask(guarded, BROWSERS, "HEAD", "/status")[0] == 401
    guarded.stop()
    assert [r for r in guarded.records if "HEAD" in r["message"]] == []


# --- in a browser ---


@in_chromium
@async_test
async def test_a_run_as_it_goes(daemon: Daemon, shared_browser: Browser, tmp_path: Path) -> None:
    daemon.post("/permits", {"permits": 1})
    async with showing(shared_browser, daemon) as page:
        await page.shows("#link", "Live")
        await page.shows("#runs-more", "Nothing is running")
        first = daemon.run(f"wait-file {tmp_path}/go", "exit 3", max_execution_minutes=2)
        waiting = daemon.send("POST", "/genvm/run", run_body("exit 0"))
        await page.shows("#runs", f"{first}")
        await page.until("/running[^]*in 1 min[^]*waiting/.test(document.all.runs.innerText)")
        await page.shows("#figures", "1 of 1")
        await page.until("document.title.startsWith('1 running, 1 waiting')")
        await page.until("document.getElementById('running-line').getAttribute('d').includes('L')")
        await page.shows("#waiting-text", "now 1")
        (tmp_path / "go").touch()
        second = waiting.reply().json["id"]
        await page.shows("#ends", f"{second}")
        await page.shows("#runs-more", "Nothing is running")
        ends = await page.text("#ends")
        assert ends.index(f"{second}") < ends.index(f"{first}"), "the last one comes first"
        assert "exit code 3" in ends
        await page.shows("#figures", "0 of 1")
    daemon.post("/permits", {"permits": 8})


@in_chromium
@async_test
async def test_questions_and_what_comes_of_them(
    daemon: Daemon, shared_browser: Browser, tmp_path: Path
) -> None:
    run = daemon.run(f"wait-file {tmp_path}/never", "exit 0")
    async with showing(shared_browser, daemon) as page:
        await page.click(f"Cancel {run}")
        await page.shows("#question", f"Cancel execution {run}?")
        await page.click("Leave it")
        await page.until("!document.querySelector('dialog:modal')")
        assert daemon.permits()["in_use"] == 1
        await page.click(f"Cancel {run}")
        await page.click(f"Cancel execution {run}")
        await page.shows("#ends", "cancelled")
        await page.shows("#notice", f"Cancel execution {run}: shutdown completed")
        assert daemon.result(run)["cause"] == "cancelled"

        daemon.post("/permits", {"permits": 5})
        await page.until("document.all.permits.value === '5'")
        await page.get("document.all.permits.value = 7")
        await page.click("Set permits")
        await page.click("Set permits to 7")
        await page.shows("#notice", "permits set")
        assert daemon.permits()["permits"] == 7
        await page.shows("#figures", "of 7")

        await page.click("Drain")
        await page.shows("#question", "New executions are refused")
        await page.click("Drain")
        await page.shows("#figures", "refused (draining)")
        await page.click("Accept executions again")
        await page.click("Accept executions again")
        await page.shows("#figures", "accepted")

        await page.get("document.all.level.value = 'warn'")
        await page.click("Set log level")
        await page.click("Set log level to warn")
        await page.shows("#notice", "log level set")
        assert daemon.get("/log/level") == {"level": "warn"}
    daemon.post("/log/level", {"level": "info"})
    daemon.post("/permits", {"permits": 8})


@in_chromium
@async_test
async def test_modules_and_errors(root: Root, start: Start, shared_browser: Browser) -> None:
    daemon = start()
    daemon.post("/module/start", {"module_type": "web", "config": {"bind_address": "127.0.0.1:0"}})
    async with showing(shared_browser, daemon) as page:
        await page.shows("#modules", "web: running")
        await page.click("Start the web module")
        await page.click("Start the web module")
        # Nothing but the advice says what is wrong.
        await page.shows("#problem", "the web module is running; stop or restart it")
        await page.click("Stop the web module")
        await page.click("Stop the web module")
        await page.shows("#modules", "web: stopped")
        await page.shows("#notice", "module stopped")
        assert await page.text("#problem") == ""
        await page.click("Start the llm module")
        await page.click("Start the llm module")
        await page.shows("#problem", "put genvm-module-llm.yaml into the config folder")
        await page.shows("#modules", "Last error: ")


@in_chromium
@async_test
async def test_output_is_text(daemon: Daemon, shared_browser: Browser) -> None:
    log = json.dumps({"level": "info", "message": HOSTILE, "long": "l" * 9000})
    written = (f"print {HOSTILE}", "spam stdout 300000", f"print {HOSTILE}", f"print-err {HOSTILE}")
    run = daemon.run(*written, f"log-raw {log}", "exit 0")
    async with showing(shared_browser, daemon) as page:
        await page.shows("#ends", f"{run}")
        await page.get("void (window.hit = () => { window.wasHit = true; })")
        await page.click(f"Output of {run}")
        await page.shows("#output-note", "It has ended: exit code 0")
        await page.until("document.querySelectorAll('pre')[2].textContent")
        stdout, stderr, log = await page.get(
            "[...document.querySelectorAll('pre')].map(p => p.textContent)"
        )
        assert len(stdout) == 50_000
        assert stdout.endswith(HOSTILE + "\n")
        assert HOSTILE in stderr
        assert json.dumps(HOSTILE) in log
        assert len(log) < 3000
        await page.shows("#streams", f"the end; GET /genvm/{run} has what is kept")
        assert await page.get("document.images.length + document.scripts.length") == 1
        assert await page.get("window.wasHit") is None
        await page.click("Close")
    listed = daemon.get("/status")["executions"]
    assert str(run) in listed, "who looks at the output does not take the result"
    daemon.result(run)


@in_chromium
@async_test
async def test_output_as_it_comes(daemon: Daemon, shared_browser: Browser, tmp_path: Path) -> None:
    run = daemon.run("print early", f"wait-file {tmp_path}/go", "print late", "exit 0")
    async with showing(shared_browser, daemon) as page:
        await page.click(f"Output of {run}")
        await page.shows("#streams", "early")
        await page.shows("#output-note", "It has not ended")
        (tmp_path / "go").touch()
        await page.shows("#streams", "late")
        await page.shows("#output-note", "It has ended")
        await page.press("Escape")


@in_chromium
@async_test
async def test_another_clock_than_the_manager_s(
    daemon: Daemon, shared_browser: Browser, tmp_path: Path
) -> None:
    daemon.run(f"wait-file {tmp_path}/go", "exit 0", max_execution_minutes=2)
    async with showing(shared_browser, daemon) as page:
        slow = "const right = Date.now; Date.now = () => right.call(Date) - 7_200_000;"
        await page.call("Page.addScriptToEvaluateOnNewDocument", source=slow)
        await page.get("void (document.isOld = true)")
        await page.call("Page.reload")
        await page.until("!document.isOld && Date.now() < performance.timeOrigin")
        await page.until("/for .*in 1 min/s.test(document.all.runs?.innerText)")
        (tmp_path / "go").touch()
        await page.until(r"/exit code 0.*\b[0-9.]+ s ago/s.test(document.all.ends.innerText)")


@in_chromium
@async_test
async def test_the_token_is_asked_for_once(
    root: Root, start: Start, shared_browser: Browser
) -> None:
    daemon = with_token(root, start)
    async with showing(shared_browser, daemon) as page:
        await page.shows("#sign-in", "This manager requires its token")
        await page.press("Escape")
        await page.press("Escape")
        await page.until("!!document.querySelector('#sign-in:modal')")
        for given, said in (("wrong-" + TOKEN, "refused that token"), ("\u00e9\u4e2d", "refused")):
            await page.until("document.activeElement === document.all.token")
            await page.type(given)
            await page.get("void (document.all.token.isOld = true)")
            await page.press("Enter", "\r")
            await page.until(
                "document.all.token?.isOld === undefined && document.readyState === 'complete'"
            )
            await page.shows("#token-note", said)
        await page.type(TOKEN)
        await page.press("Enter", "\r")
        await page.shows("#link", "Live")
        await page.call("Page.reload")
        await page.until("performance.getEntriesByType('navigation')[0]?.type === 'reload'")
        await page.shows("#link", "Live")
        kept = await page.get(
            "[localStorage.length, document.cookie, location.href, sessionStorage.token]"
        )
        assert kept == [0, "", f"http://{daemon.address}/", TOKEN]
        await page.click("Drain")
        await page.click("Drain")
        await page.shows("#figures", "refused (draining)")
    async with showing(shared_browser, daemon) as page:
        await page.shows("#sign-in", "This manager requires its token")


@in_chromium
@async_test
async def test_a_manager_that_goes_and_comes_back(
    root: Root, start: Start, shared_browser: Browser
) -> None:
    port = str(free_port())
    daemon = start(listen=("--port", port))
    daemon.result(daemon.run("exit 0"))
    async with showing(shared_browser, daemon) as page:
        await page.shows("#link", "Live")
        await page.shows("#ends", "exit code 0")
        daemon.stop()
        await page.shows("#link", "Not live: ")
        await page.shows("#as-of", "as of ")
        await page.until("document.body.matches('.stale')")
        again = start(listen=("--port", port))
        await page.until("document.all.link.innerText === 'Live'")
        await page.shows("#ends-more", "Nothing has finished lately")
        run = again.run("exit 4")
        await page.shows("#ends", f"{run}")
        # The console tells of each attempt while nobody listens.
        page.events = [each for each in page.events if "ERR_CONNECTION_REFUSED" not in str(each)]


@in_chromium
@async_test
async def test_by_keyboard_alone(daemon: Daemon, shared_browser: Browser) -> None:
    async with showing(shared_browser, daemon, width=390, height=844) as page:
        await page.shows("#link", "Live")
        await page.until("document.all.permits.value === '8'")
        focused = "document.activeElement"
        for _ in range(10):
            await page.press("Tab")
            if await page.get(f"{focused}.id") == "permits":
                break
        await page.type("4")  # in place of the 8, which is selected
        await page.press("Tab")
        assert await page.get(f"getComputedStyle({focused}).outlineStyle") == "solid"
        await page.press("Enter", "\r")
        await page.until(f"{focused}.innerText === 'Leave it'")
        await page.press("Tab")
        await page.press("Enter", "\r")
        await page.shows("#notice", "permits set")
        assert daemon.permits()["permits"] == 4
        assert await page.get(f"{focused}.innerText") == "Set permits"
        wide = await page.get("document.documentElement.scrollWidth")
        assert wide == 390, "nothing sticks out on a phone"
    daemon.post("/permits", {"permits": 8})


@in_chromium
@async_test
async def test_focus_and_many_rows(
    root: Root, start: Start, shared_browser: Browser, tmp_path: Path
) -> None:
    root.script('until [ -e "$data" ]; do sleep 0.05; done')
    daemon = start("--permits", "1", "--queue-limit", "200")
    body = run_body(host_data=f"{tmp_path}/go")
    first = daemon.post("/genvm/run", body)["id"]
    waiting = [daemon.send("POST", "/genvm/run", body)]
    daemon.waiting(1)
    async with showing(shared_browser, daemon) as page:
        await page.until("document.all.runs.rows.length === 2")
        button = "document.all.runs.rows[1].querySelector('button')"
        await page.get(f"void {button}.focus()")
        name = await page.get(f"{button}.ariaLabel")
        waiting += [daemon.send("POST", "/genvm/run", body) for _ in range(98)]
        await page.until("document.all.runs.rows.length === 100")
        assert await page.get("document.activeElement.ariaLabel") == name
        assert await page.text("#runs-more") == ""
        more = [daemon.send("POST", "/genvm/run", body) for _ in range(20)]
        await page.shows("#runs-more", "and 20 more: running ones come first, then the newest")
        rows = await page.get(
            "[...document.all.runs.rows].map(row => row.cells[0].firstChild.data)"
        )
        assert len(rows) == 100
        assert rows[0] == f"{first}", "what runs is shown before what waits"
        assert rows[1:] == sorted(rows[1:], key=int, reverse=True)
        # The row is gone, and so is the button; what it stood in has the focus.
        assert await page.get("document.activeElement.id") == "runs-head"
        (tmp_path / "go").touch()
        for pending in (*waiting, *more):
            assert pending.reply().status == 200
        await page.shows("#runs-more", "Nothing is running")
        await page.until("document.all.ends.rows.length === 100")


@in_chromium
@async_test
async def test_names_for_those_who_do_not_see(
    daemon: Daemon, shared_browser: Browser, tmp_path: Path
) -> None:
    run = daemon.run(f"wait-file {tmp_path}/go", "exit 0")
    async with showing(shared_browser, daemon) as page:
        await page.shows("#runs", f"{run}")
        found = await page.named("button spinbutton combobox table region heading columnheader")
        assert all(all(names) for names in found.values()), found
        assert found["spinbutton"] == ["Permits (0 pauses)"]
        assert found["combobox"] == ["Log level"]
        assert found["table"] == ["Running and waiting", "Recently finished"]
        assert {f"Output of {run}", f"Cancel {run}", "Stop the llm module"} < {*found["button"]}
        assert len({*found["button"]}) == len(found["button"]), "each says what it is for"
        await page.click(f"Cancel {run}")
        await page.until("!!document.querySelector('dialog:modal')")
        found = await page.named("dialog button")
        assert found["dialog"] == [f"Cancel execution {run}?"]
        assert found["button"] == ["Leave it", f"Cancel execution {run}"]
        await page.press("Escape")
        (tmp_path / "go").touch()
        await page.shows("#runs-more", "Nothing is running")
