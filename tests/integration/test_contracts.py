"""Contract operations on the real daemon: versions, deployment writes, read-only runs."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import resource
import stat
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from genvm_manager import ID_STEP, CalldataValue, encode_calldata

from .conftest import Start
from .support import (
    TIMESTAMP,
    Daemon,
    Pending,
    Reply,
    Root,
    alive,
    eventually,
    in_other_threads,
    report,
    timed,
    watched,
)

MIB = 1 << 20
DETECT = "/contract/detect-version"
WRITES = "/contract/pre-deploy-writes"
SCHEMA = "/genvm/run/readonly"
ENDPOINTS = (DETECT, WRITES, SCHEMA)
SLOW = 90.0
"""Seconds for what has a deadline of its own, of 10 or 30 s."""

SLEEPER, MISSING, QUITTER, FAILING, DYING = range(2, 7)
VERSIONS = {
    "v0.1.0": "2025-01-01T00:00:00Z",
    "v0.2.0": "2025-02-01T00:00:00Z",
    "v1.0.0": "2025-03-01T00:00:00Z",
    **{f"v{major}.0.0": "2025-04-01T00:00:00Z" for major in range(SLEEPER, DYING + 1)},
}
NEWEST = DYING
"""What a contract gets that states no version."""


def headers(moment: str = TIMESTAMP) -> dict[str, str]:
    """Return the header of the contract operations."""
    return {"Deployment-Timestamp": moment}


def ask(daemon: Daemon, path: str, code: bytes | str, moment: str = TIMESTAMP) -> Reply:
    """Make a contract operation."""
    body = code if isinstance(code, bytes) else code.encode()
    return daemon.request("POST", path, body, headers(moment), timeout=SLOW)


def begin(daemon: Daemon, path: str, code: bytes | str, moment: str = TIMESTAMP) -> Pending:
    """Make a contract operation without waiting for its response."""
    body = code if isinstance(code, bytes) else code.encode()
    return daemon.send("POST", path, body, headers(moment), timeout=SLOW)


def is_answer(reply: Reply, expected: object) -> None:
    """Check a reply that must be a success."""
    assert (reply.status, reply.json) == (200, expected), reply.raw[:2000]


def is_error(reply: Reply, code: str, *parts: str, status: int = 500) -> None:
    """Check the form of an error reply, and what it says."""
    assert (reply.status, reply.json["code"]) == (status, code), reply.raw[:2000]
    for part in parts:
        assert part in reply.json["error"], reply.json["error"]


def schema_contract(*steps: str, version: str = "v0.1.0") -> str:
    """Return a practice contract with steps for ``#get-schema``."""
    return "\n".join((f"# {version}", "on method f", "return 1", "on schema", *steps, ""))


def temporary(root: Root) -> Path:
    """Return the folder that a daemon has for its temporary files alone."""
    return root.path / "t"


def left_in(root: Root) -> list[str]:
    """Return the names of temporary files."""
    return [path.name for path in temporary(root).iterdir()]


def prepared(executors: dict[str, str]) -> Root:
    """Return a root with ``VERSIONS``: scripts by version, practice executors otherwise."""
    root = Root()
    root.write_manifest(VERSIONS)
    temporary(root).mkdir()
    for version in VERSIONS:
        if version in executors:
            root.script(executors[version], version)
        elif version != f"v{MISSING}.0.0":
            root.practice(version)
    return root


def serve(root: Root, *flags: str) -> Daemon:
    """Start a daemon with 8 permits and its own folder for temporary files."""
    environ = {"TMPDIR": str(temporary(root))}
    return Daemon.serve(root, "--permits", "8", *flags, environ=environ)


def is_clean(daemon: Daemon, root: Root) -> bool:
    """Tell whether nothing of any request is left."""
    return daemon.idle() and not daemon.descendants() and not left_in(root)


RUN_SCRIPTS = {
    f"v{SLEEPER}.0.0": 'echo $$ > "$0.pid"; echo asleep >&2; exec sleep 600',
    f"v{QUITTER}.0.0": "exit 0",
    f"v{FAILING}.0.0": "echo cannot set up >&2; exit 1",
    f"v{DYING}.0.0": "kill -SEGV $$",
}


@pytest.fixture(scope="module")
def shared_root() -> Iterator[Root]:
    """A root with practice executors of majors 0 and 1, and odd executors above."""
    made = prepared(RUN_SCRIPTS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_daemon(shared_root: Root) -> Iterator[Daemon]:
    """A daemon for all tests here that do not ask executors for versions."""
    daemon = serve(shared_root)
    yield daemon
    daemon.close()


@pytest.fixture
def daemon(daemon: Daemon, shared_root: Root) -> Iterator[Daemon]:
    """The shared daemon; each test must leave no process, no permit in use and no file."""
    yield daemon
    eventually(lambda: is_clean(daemon, shared_root), what="nothing is left")


def pid_in(path: Path) -> int:
    """Return the process id that a script wrote to a file, waiting for it."""
    return int(eventually(lambda: path.exists() and path.read_text().strip(), what=f"{path}"))


# --- POST /contract/detect-version ---


@pytest.mark.parametrize(
    ("code", "major"),
    [
        (b"# v0.1.0\n", 0),
        (b"// v1.0.0\n", 1),
        (b"-- v2.0.0-rc1\n", 2),
        (b"# v99.0.0\n", NEWEST),
        (b"# v*.*.*\n", NEWEST),
        (b"import this\n", NEWEST),
        (b"\xff\0", NEWEST),
        (b"\0asm\x01\0\0\0\0\x14\x0dgenvm.versionv0.1.0", 0),
        (b"PK\x05\x06" + bytes(18), NEWEST),
        (b"# v0.1.0\n" + b"x" * 100_000, 0),
        (b"# v0.1.0\n" + b"x" * 3 * MIB, 0),
        (b"# v0.1.0\n" + b"\xff" * 3 * MIB, NEWEST),
    ],
    ids=lambda value: f"{value[:24]!r} {len(value)}" if isinstance(value, bytes) else f"{value}",
)
def test_detect_version(daemon: Daemon, code: bytes, major: int) -> None:
    is_answer(ask(daemon, DETECT, code), {"specified_major": major})


@pytest.mark.parametrize(
    ("moment", "major"),
    [
        ("2025-01-01T00:00:00Z", 0),
        ("2025-01-01T00:00:00z", 0),
        ("2025-01-01T00:00:00.000+00:00", 0),
        ("2025-01-01T00:00:00.000000001Z", 0),
        ("2025-01-01T05:30:00+05:30", 0),
        ("2024-12-31T16:00:00-08:00", 0),
        ("2025-02-28T23:59:59.999Z", 0),
        ("2025-03-01T00:59:59.999+01:00", 0),
        ("2025-03-01T01:00:00.000+01:00", 1),
        ("2025-02-28T23:00:00-01:00", 1),
        ("2025-06-01T00:00:00Z", NEWEST),
        ("9999-12-31T23:59:59Z", NEWEST),
    ],
)
def test_deployment_timestamps(daemon: Daemon, moment: str, major: int) -> None:
    is_answer(ask(daemon, DETECT, "# v99.0.0", moment), {"specified_major": major})


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    "moment",
    ["2024-12-31T23:59:59.999Z", "2025-01-01T00:59:59.999+01:00", "0001-01-01T00:00:00Z"],
)
def test_before_the_first_version(daemon: Daemon, path: str, moment: str) -> None:
    reply = ask(daemon, path, "# v0.1.0", moment)
    is_error(reply, "version_not_available", "no executor is available at", "v0.1.0")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_missing_timestamp(daemon: Daemon, path: str) -> None:
    is_error(daemon.request("POST", path, b"# v0.1.0"), "invalid_request", "Deployment-Timestamp")


@pytest.mark.parametrize(
    "moment",
    [
        "",
        "yesterday",
        "1735689600",
        "2025-01-01",
        "2025-01-01T00:00:00",
        "2025-01-01T00:00:00+0000",
        "2025-02-30T00:00:00Z",
        "2025-01-01T25:00:00Z",
        "2025-01-01T00:00:00Z, 2025-01-01T00:00:00Z",
        "2025-01-01T00:00:00\xe9",
        "9" * 10_000,
    ],
    ids=lambda moment: moment[:50] or "empty",
)
def test_a_wrong_timestamp(daemon: Daemon, moment: str) -> None:
    for path in ENDPOINTS:
        reply = ask(daemon, path, "# v0.1.0", moment)
        is_error(reply, "invalid_request", "Deployment-Timestamp: ")
        assert len(reply.raw) < 1000


def test_no_executor_at_all(start: Start, root: Root) -> None:
    root.write_manifest({})
    daemon = start()
    for path in ENDPOINTS:
        is_error(ask(daemon, path, "# v0.1.0"), "version_not_available")


# --- POST /contract/detect-version, asking executors ---

COPIER, FAILER, HANGER, ABSENT, CHATTERER, DEAF, MUTE, GARBLER, SUICIDE = range(1, 10)
ASKED = {
    COPIER: 'cat > "$0.stdin"; echo "$@" > "$0.argv"; echo v0.7.7',
    FAILER: "echo v0.1.0; exit 3",
    HANGER: 'echo $$ > "$0.pid"; exec sleep 600',
    CHATTERER: "exec yes v0.1.0",
    DEAF: "exec 0<&-; echo v0.1.0",
    MUTE: "cat > /dev/null",
    GARBLER: "printf 'v0.\\377\\n'",
    SUICIDE: "kill -KILL $$",
}


def newest_is(major: int) -> str:
    """Return a moment at which this major is the newest of the root with asked executors."""
    return f"2025-01-{major + 1:02}T12:00:00Z"


def asked_root() -> Root:
    """Return a root whose executors answer oddly, one available each day."""
    root = Root()
    temporary(root).mkdir()
    root.write_manifest({f"v{n}.0.0": f"2025-01-{n + 1:02}T00:00:00Z" for n in range(SUICIDE + 1)})
    root.practice("v0.0.0")
    for major, script in ASKED.items():
        root.script(script, f"v{major}.0.0")
    return root


@pytest.fixture(scope="module")
def asking() -> Iterator[tuple[Daemon, Root]]:
    """A daemon that asks executors for versions, and its root."""
    root = asked_root()
    daemon = serve(root, "--version-detection", "executor")
    yield daemon, root
    daemon.close()
    root.close()


@pytest.mark.parametrize("code", ["# v0.1.0\n", "// v5.0.0\n", "refused\n"])
def test_the_practice_executor_is_asked(asking: tuple[Daemon, Root], code: str) -> None:
    reply = ask(asking[0], DETECT, code, newest_is(0))
    is_answer(reply, {"specified_major": 0})


@pytest.mark.parametrize("size", [10, 5 * MIB], ids=["little", "much"])
def test_the_newest_executor_gets_the_contract(asking: tuple[Daemon, Root], size: int) -> None:
    daemon, root = asking
    code = bytes(range(256)) * (size // 256) + bytes(size % 256)
    is_answer(ask(daemon, DETECT, code, newest_is(COPIER)), {"specified_major": 0})
    program = root.path / "executor" / f"v{COPIER}.0.0" / "bin" / "genvm"
    assert program.with_name("genvm.stdin").read_bytes() == code
    assert program.with_name("genvm.argv").read_text() == "parse-version-pattern\n"
    eventually(lambda: is_clean(daemon, root))


@pytest.mark.parametrize(
    ("major", "answer"), [(DEAF, 0), (MUTE, MUTE), (GARBLER, GARBLER)], ids=["deaf", "mute", "odd"]
)
def test_odd_answers(asking: tuple[Daemon, Root], major: int, answer: int) -> None:
    """An executor that reads nothing is no failure; one that says nothing knows no version."""
    code = b"# v0.1.0\n" + b"#" * 5 * MIB
    is_answer(ask(asking[0], DETECT, code, newest_is(major)), {"specified_major": answer})


@pytest.mark.parametrize(
    ("major", "code", "parts"),
    [
        (FAILER, "detection_failed", ("v2.0.0", "3")),
        (SUICIDE, "detection_failed", ("v9.0.0", "9")),
        (ABSENT, "spawn_failed", ("v4.0.0", "not found")),
    ],
    ids=["exit status 3", "killed", "not installed"],
)
def test_executors_that_fail(
    asking: tuple[Daemon, Root], major: int, code: str, parts: tuple[str, ...]
) -> None:
    daemon, root = asking
    reply = ask(daemon, DETECT, "# v0.1.0", newest_is(major))
    is_error(reply, code, *parts)
    assert str(root.path) not in reply.json["error"]
    assert "ExitStatus" not in reply.json["error"], "the name of a class tells a client nothing"
    eventually(lambda: is_clean(daemon, root))


def test_a_client_that_leaves_while_an_executor_is_asked(asking: tuple[Daemon, Root]) -> None:
    daemon, root = asking
    path = root.path / "executor" / f"v{HANGER}.0.0" / "bin" / "genvm.pid"
    path.unlink(missing_ok=True)
    # More than are asked at once, so some leave the queue.
    pending = [begin(daemon, DETECT, "# v0.1.0", newest_is(HANGER)) for _ in range(6)]
    pid = pid_in(path)
    eventually(lambda: len(daemon.descendants()) == 4, what="four executors are asked")
    assert daemon.permits()["in_use"] == 0, "asking takes no permit"
    for request in reversed(pending):
        request.close()
    eventually(lambda: not alive(pid), what="the executor is killed")
    eventually(lambda: is_clean(daemon, root), what="nothing is left")
    for _ in range(6):  # nobody's turn was lost
        is_answer(ask(daemon, DETECT, "# v0.1.0", newest_is(0)), {"specified_major": 0})


def test_the_end_of_the_manager_while_an_executor_is_asked() -> None:
    root = asked_root()
    daemon = serve(root, "--version-detection", "executor")
    try:
        request = begin(daemon, DETECT, "# v0.1.0", newest_is(HANGER))
        eventually(daemon.descendants, what="an executor is asked")
        assert daemon.stop() == 0
        eventually(lambda: not daemon.descendants(), what="the executor is killed")
        assert left_in(root) == []
        request.close()
    finally:
        daemon.close()
        root.close()


@pytest.mark.parametrize(("script", "warned"), [("exit 2", True), ("echo v0.1.0", False)])
def test_an_executor_that_cannot_be_asked_is_said_at_the_start(script: str, warned: bool) -> None:
    root = Root()
    root.script(f"cat > /dev/null; {script}")
    daemon = serve(root, "--version-detection", "executor")
    try:
        if warned:
            told = daemon.wait_log(lambda r: r["message"].startswith("version_detection: "))
            assert told["level"] == "warn"
            assert "has no parse-version-pattern command" in told["message"]
        else:
            is_answer(ask(daemon, DETECT, "# v0.1.0"), {"specified_major": 0})
        assert daemon.stop() == 0
        assert warned or "version_detection: " not in daemon.text
        assert "Traceback" not in daemon.text + daemon.errors
    finally:
        daemon.close()
        root.close()


def test_the_end_while_an_executor_is_asked_at_the_start() -> None:
    root = Root()
    root.script("exec sleep 600")
    daemon = serve(root, "--version-detection", "executor")
    try:
        eventually(daemon.descendants, what="an executor is asked")
        assert daemon.stop() == 0
        eventually(lambda: not daemon.descendants(), what="it is killed")
        assert "Traceback" not in daemon.text + daemon.errors
    finally:
        daemon.close()
        root.close()


def test_an_executor_that_refuses_the_code(asking: tuple[Daemon, Root]) -> None:
    """The practice executor, as real ones, takes text with a comment on its first line only."""
    daemon, root = asking
    root.script("cat > /dev/null; exit 1", f"v{FAILER}.0.0")
    try:
        reply = ask(daemon, DETECT, "no comment", newest_is(FAILER))
        is_answer(reply, {"specified_major": FAILER})
    finally:
        root.script(ASKED[FAILER], f"v{FAILER}.0.0")


# --- requests with a deadline: sent when the module begins, looked at in its last tests ---


class Late:
    """Requests that take until a deadline of the manager, while other tests run."""

    def __init__(self) -> None:
        self.root = prepared(RUN_SCRIPTS)
        self.asked_root = asked_root()
        self.daemons: list[Daemon] = []

    def begin(self) -> None:
        """Start two daemons and make the requests."""
        kept = ("--execution-retention", "2h")
        self.daemons.append(serve(self.root, *kept))
        self.daemons.append(serve(self.asked_root, "--version-detection", "executor"))
        codes = {
            "never connects": f"# v{SLEEPER}.0.0\n",
            "sleeps": schema_contract("print-err tired", "sleep 300", 'return "late"'),
            "floods": schema_contract("flood-host 5000000", 'return "late"'),
        }
        self.memory = self.daemon.peak_memory()
        self.asked_memory = self.asked.peak_memory()
        self.pending = {name: begin(self.daemon, SCHEMA, code) for name, code in codes.items()}
        for major in (HANGER, CHATTERER):
            moment = newest_is(major)
            self.pending[f"asked {major}"] = begin(self.asked, DETECT, "# v0.1.0", moment)

    @property
    def daemon(self) -> Daemon:
        """The daemon of the read-only runs."""
        return self.daemons[0]

    @property
    def asked(self) -> Daemon:
        """The daemon of the detections."""
        return self.daemons[1]

    def close(self) -> None:
        """End everything."""
        for daemon in self.daemons:
            daemon.close()
        self.root.close()
        self.asked_root.close()


@pytest.fixture(scope="module", autouse=True)
def late() -> Iterator[Late]:
    """The late requests, which begin with the module."""
    made = Late()
    try:
        made.begin()
        yield made
    finally:
        made.close()


# --- POST /contract/pre-deploy-writes ---

CODE_SLOT = hashlib.sha3_256(bytes(32) + b"\x01\0\0\0").digest()


def base64_text(data: bytes) -> str:
    """Return bytes in base64."""
    return base64.b64encode(data).decode()


def writes_of(code: bytes) -> dict[str, Any]:
    """Return the answer for a contract: the length of its code, and behind that the code."""
    pairs = [
        (CODE_SLOT + bytes(4), len(code).to_bytes(4, "little")),
        (CODE_SLOT + b"\4\0\0\0", code),
    ]
    return {"writes": [[base64_text(key), base64_text(value)] for key, value in pairs]}


@pytest.mark.parametrize("size", [9, 10, 11, 49_151, 49_152, 49_153, 65_536, 65_537, 3 * MIB + 1])
def test_deployment_writes(daemon: Daemon, size: int) -> None:
    code = (b"# v0.1.0\n" + bytes(range(128)) * (size // 128 + 1))[:size]
    is_answer(ask(daemon, WRITES, code), writes_of(code))


def test_deployment_writes_where_no_version_is_stated(daemon: Daemon) -> None:
    code = b"\xff\xfe\0no text"
    is_answer(ask(daemon, WRITES, code, "2025-02-01T00:00:00Z"), writes_of(code))
    is_error(ask(daemon, WRITES, code), "unsupported_major", f"major {NEWEST}", "major 0")


@pytest.mark.parametrize("code", ["# v1.0.0\n", "// v2.3.4\n", "# v99.0.0\n"])
def test_other_majors_have_no_deployment_writes(daemon: Daemon, code: str) -> None:
    is_error(ask(daemon, WRITES, code), "unsupported_major", "major 0")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_no_code(daemon: Daemon, path: str) -> None:
    is_error(ask(daemon, path, b""), "invalid_request", "empty")


def test_a_client_that_leaves_while_writes_are_sent(daemon: Daemon) -> None:
    code = b"# v0.1.0\n" + bytes(20 * MIB)
    for _ in range(3):
        begin(daemon, WRITES, code).close()
    is_answer(ask(daemon, WRITES, b"# v0.1.0\n"), writes_of(b"# v0.1.0\n"))


# --- large and hostile code ---


def raw_post(daemon: Daemon, path: str, code: bytes) -> bytes:
    """Return the body of a successful response, without parsing it."""
    connection = http.client.HTTPConnection(daemon.address, timeout=SLOW)
    try:
        connection.request("POST", path, code, headers())
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    assert response.status == 200, body[:2000]
    return body


def test_a_contract_of_20_megabytes(daemon: Daemon) -> None:
    code = b"# v0.1.0\n" + bytes(range(128)) * (20 * MIB // 128)

    def post_three() -> list[bytes]:
        return [raw_post(daemon, WRITES, code) for _ in range(3)]

    bodies = watched(daemon, "3 deployments of 20 MB", post_three)
    for body in bodies:
        assert json.loads(body) == writes_of(code)


def test_the_schema_of_a_contract_of_20_megabytes(daemon: Daemon) -> None:
    code = schema_contract('return "large"').encode() + b"#" * 20 * MIB
    body = watched(daemon, "a schema of 20 MB of code", lambda: raw_post(daemon, SCHEMA, code))
    assert json.loads(body) == {"schema": "large"}


def busy_threads(daemon: Daemon) -> list[int]:
    """Return the threads of the manager, beside the reactor's, that have worked for a while."""
    found = []
    for path in Path(f"/proc/{daemon.pid}/task").iterdir():
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if int(path.name) != daemon.pid and seconds > 0.5:
            found.append(int(path.name))
    return found


@pytest.fixture
def occupied(start: Start) -> Iterator[tuple[Daemon, Future[Reply]]]:
    """A daemon that inspects code of many millions of sections, and its reply to come."""
    daemon = start()
    code = b"\0asm\x01\0\0\0" + b"\x0b\x00" * (30 * MIB)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(ask, daemon, DETECT, code)
        eventually(lambda: reply.done() or busy_threads(daemon), what="the code is inspected")
        try:
            yield daemon, reply
        finally:
            daemon.close()


def test_hostile_code_delays_nobody(occupied: tuple[Daemon, Future[Reply]]) -> None:
    """While one client's code is inspected, others get answers."""
    daemon, _ = occupied
    small = b"# v0.1.0\n" + b"#" * 100_000

    def ask_too() -> Reply:
        return ask(daemon, DETECT, small)

    reply = watched(daemon, "detection beside hostile code", ask_too)
    is_answer(reply, {"specified_major": 0})


def test_the_manager_ends_while_hostile_code_is_inspected(
    occupied: tuple[Daemon, Future[Reply]],
) -> None:
    daemon, _ = occupied
    begun = time.perf_counter()
    assert daemon.stop() == 0
    timed("the end beside hostile code", time.perf_counter() - begun, 1.0)


# --- POST /genvm/run/readonly ---


def hex_result(code: int, data: bytes) -> str:
    """Return the step that reports a result as these bytes, correct or not."""
    frame = bytes((code,)) + data
    return f"garbage-host 03{len(frame).to_bytes(4, 'little').hex()}{frame.hex()}"


def last_run(daemon: Daemon) -> dict[str, Any]:
    """Return the result of the run that ended last; the status lists none that has ended."""
    eventually(lambda: daemon.get("/status")["executions"] == {}, what="the run is over")
    following = daemon.run("exit 0")
    daemon.result(following)
    return daemon.result(following - ID_STEP)


@pytest.mark.parametrize(
    "schema",
    [
        *("{}", "", 'a "quoted" text\n\\', "größer, ✓ \N{PILE OF POO}", "\0", "x" * MIB),
        '\N{PILE OF POO}"' * 100_000,
    ],
    ids=["JSON", "empty", "quoted", "wide", "NUL", "long", "long and wide"],
)
def test_a_schema(daemon: Daemon, schema: str) -> None:
    code = schema_contract(f"return {json.dumps(schema)}")
    for _ in range(5):  # on a busy machine it may not end by itself within its grace
        is_answer(ask(daemon, SCHEMA, code), {"schema": schema})
        result = last_run(daemon)
        assert result["version"] == "v0.2.0"
        if result["cause"] == "exited":
            break
    assert (result["cause"], result["exit_code"]) == ("exited", 0)


@pytest.mark.parametrize(
    ("stated", "moment", "version"),
    [
        ("v0.1.0", "2025-01-01T00:00:00Z", "v0.1.0"),
        ("v0.1.0", TIMESTAMP, "v0.2.0"),
        ("v0.9.9", TIMESTAMP, "v0.2.0"),
        ("v1.0.0", TIMESTAMP, "v1.0.0"),
        ("v1.0.0", "2025-02-01T00:00:00Z", "v0.2.0"),
        ("nothing", "2025-03-01T00:00:00Z", "v0.2.0"),
    ],
)
def test_code_and_header_choose_the_executor(
    daemon: Daemon, stated: str, moment: str, version: str
) -> None:
    code = schema_contract('return "$message.datetime"', version=stated)
    reply = ask(daemon, SCHEMA, code, moment)
    assert reply.status == 200, reply.raw
    assert re.sub(r"\.0+", "", reply.json["schema"]) == moment, "the run takes place at that time"
    assert last_run(daemon)["version"] == version


OTHER_VALUES: tuple[CalldataValue, ...] = (None, 1, True, b"{}", ["{}"], {"a": "{}"})
FAILURES = {
    "no schema": ("# v0.1.0\non method f\nreturn 1", ("VM error", "no schema")),
    "no script": ("# v0.1.0\n\x01nonsense", ("VM error", "line 2")),
    "user error": (schema_contract("error out of cheese"), ("user error: out of cheese",)),
    "VM error": (schema_contract("vm-error exit_code 1"), ("VM error: exit_code 1",)),
    "internal error": (schema_contract(hex_result(3, b"oops")), ("internal error: oops",)),
    "writes": (schema_contract("store x 1", 'return "no"'), ("storage_write", "error 2")),
    "dies": (schema_contract("die KILL"), ("without a result",)),
    "exits": (schema_contract("exit 0"), ("without a result",)),
    "dies in a request": (
        schema_contract("garbage-host 0100", "die KILL"),
        ("without a result|inside a storage_read request",),
    ),
    "an unknown method": (schema_contract("garbage-host ff", "sleep 600"), ("unknown method 255",)),
    "a huge result": (
        schema_contract("garbage-host 03ffffffff", "sleep 600"),
        ("4294967295 bytes", "limit"),
    ),
    "a huge read": (
        schema_contract(f"garbage-host 0100{'00' * 56}ffffffff", "sleep 600"),
        ("4294967295 bytes", "limit"),
    ),
    "no result code": (schema_contract(hex_result(9, b""), "sleep 600"), ("result code",)),
    "an empty result": (schema_contract("garbage-host 0300000000", "sleep 600"), ("result code",)),
    "no calldata": (schema_contract(hex_result(0, b"\x07"), "sleep 600"), ("not calldata",)),
    "null": (schema_contract("return null"), ("not a string",)),
    **{
        f"of type {type(value).__name__}": (
            schema_contract(hex_result(0, encode_calldata(value)), "sleep 600"),
            ("schema is not a string",),
        )
        for value in OTHER_VALUES
    },
    "quits": (f"# v{QUITTER}.0.0", ("without a result", "exit code 0")),
    "fails": (f"# v{FAILING}.0.0", ("exit code 1", "stderr ends: cannot set up")),
    "is killed": (f"# v{DYING}.0.0", ("without a result", "signal 11")),
}


@pytest.mark.parametrize("name", FAILURES)
def test_runs_without_a_schema(daemon: Daemon, shared_root: Root, name: str) -> None:
    code, patterns = FAILURES[name]
    reply = ask(daemon, SCHEMA, code)
    is_error(reply, "contract_failed")
    for pattern in patterns:
        assert re.search(pattern, reply.json["error"], re.IGNORECASE), reply.json["error"]
    for secret in (str(shared_root.path), "host.sock", "Traceback"):
        assert secret not in reply.json["error"]


def test_what_executors_need_in_read_only_runs() -> None:
    root = Root()
    temporary(root).mkdir()
    root.script('printf "%s;" "$@" >&2; exit 1')
    settings = "readonly_extra_args: [--allow-latest, --debug-mode]\n"
    (root.path / "config" / "genvm-manager.yaml").write_text(settings)
    daemon = serve(root)
    try:
        said = ask(daemon, SCHEMA, "# v0.1.0").json["error"]
        assert ";run;--allow-latest;--debug-mode;--permissions;rw;--sync;" in said
    finally:
        daemon.close()
        root.close()


def test_an_executor_that_is_not_installed(daemon: Daemon) -> None:
    is_error(ask(daemon, SCHEMA, f"# v{MISSING}.0.0"), "spawn_failed", f"v{MISSING}.0.0")


@pytest.mark.parametrize("ending", ["error no luck", hex_result(0, b"\x07")])
def test_errors_carry_the_end_of_stderr(daemon: Daemon, ending: str) -> None:
    code = schema_contract("spam stderr 1000000", "print-err the last words", ending)
    reply = ask(daemon, SCHEMA, code)
    is_error(reply, "contract_failed", "the last words")
    assert len(reply.json["error"]) < 3000


def test_a_long_error_is_cut(daemon: Daemon) -> None:
    reply = ask(daemon, SCHEMA, schema_contract(f"error begin{'x' * 500_000}"))
    is_error(reply, "contract_failed", "begin")
    assert len(reply.raw) < 20_000


@pytest.mark.parametrize("code", [0, 1], ids=["return", "user error"])
def test_a_result_of_many_values_delays_nobody(daemon: Daemon, code: int) -> None:
    """To decode it takes more than a second, which is not the reactor's."""
    step = hex_result(code, encode_calldata([0] * 999_000))

    def ask_too() -> Reply:
        return ask(daemon, SCHEMA, schema_contract(step, "sleep 600"))

    reply = in_other_threads(daemon, "a result of many values", ask_too)
    is_error(reply, "contract_failed", ("the schema is not a string", "user error: [0, 0")[code])
    assert len(reply.raw) < 10_000


def test_a_schema_that_is_too_large(daemon: Daemon) -> None:
    code = schema_contract(f'return "{"x" * 5 * MIB}"')
    is_error(ask(daemon, SCHEMA, code), "contract_failed", "consume_result", f"{4 * MIB}")


def test_storage_is_read_and_never_written(daemon: Daemon) -> None:
    """What is not the contract's code reads as zeros, in every run anew."""
    code = schema_contract("load x", 'set ["$last"]', "store x 5", 'return "no"')
    for _ in range(2):
        is_error(ask(daemon, SCHEMA, code), "contract_failed", "storage_write")
    is_answer(ask(daemon, SCHEMA, schema_contract("load x", 'return "ok"')), {"schema": "ok"})
    is_error(
        ask(daemon, SCHEMA, schema_contract('return "$storage.x"')), "contract_failed", "string"
    )


def test_a_flood_of_requests(daemon: Daemon) -> None:
    """The host serves them all; what becomes of answers that nobody reads is tested below."""
    code = schema_contract("flood-host 20000", 'return "after all"')
    is_answer(ask(daemon, SCHEMA, code), {"schema": "after all"})


def test_an_executor_that_lingers_after_its_result(daemon: Daemon) -> None:
    result = hex_result(0, encode_calldata("hi"))
    code = schema_contract("ignore-sigterm", result, "sleep 600")
    is_answer(ask(daemon, SCHEMA, code), {"schema": "hi"})
    assert last_run(daemon)["cause"] == "cancelled"


@pytest.mark.parametrize("step", ["grandchild 600", "grandchild-session 600"])
def test_what_an_executor_leaves_behind_is_killed(daemon: Daemon, step: str) -> None:
    is_answer(ask(daemon, SCHEMA, schema_contract(step, 'return "hi"')), {"schema": "hi"})


def test_a_run_while_it_goes_on(daemon: Daemon, shared_root: Root, tmp_path: Path) -> None:
    """It has a permit, an entry in ``/status``, and a socket that nobody else can reach."""
    go, there = tmp_path / "go", tmp_path / "there"
    code = schema_contract(f"touch {there}", f"wait-file {go}", 'return "hi"')
    request = begin(daemon, SCHEMA, code)
    pid_in(there)
    status = daemon.get("/status")
    assert status["permits"] == {"max": 8, "current": 7, "in_use": 1, "waiting": 0}
    genvm_id, entry = next(iter(status["executions"].items()))
    assert (entry["state"], entry["is_sync"], entry["version"]) == ("running", True, "v0.2.0")
    assert entry["started_at"] < entry["strict_deadline"]
    assert daemon.get(f"/genvm/{genvm_id}") == {"genvm_id": int(genvm_id), "status": None}
    (folder,) = temporary(shared_root).iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (path,) = folder.iterdir()
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    go.touch()
    is_answer(request.reply(), {"schema": "hi"})
    assert left_in(shared_root) == [], "it is gone before the answer comes"
    assert daemon.result(int(genvm_id))["exit_code"] == 0


@pytest.mark.parametrize("phase", ["before it connects", "while it runs", "while it ends"])
def test_a_client_that_leaves(
    daemon: Daemon, shared_root: Root, tmp_path: Path, phase: str
) -> None:
    if phase == "before it connects":
        code = f"# v{SLEEPER}.0.0"
        there = shared_root.path / "executor" / f"v{SLEEPER}.0.0" / "bin" / "genvm.pid"
        there.unlink(missing_ok=True)
    else:
        there = tmp_path / "there"
        result = [hex_result(0, encode_calldata("hi"))] if phase == "while it ends" else []
        code = schema_contract("ignore-sigterm", *result, f"touch {there}", "sleep 600")
    request = begin(daemon, SCHEMA, code)
    pid = pid_in(there)
    assert alive(pid)
    request.close()
    eventually(lambda: not alive(pid), what="the executor is killed")
    eventually(lambda: is_clean(daemon, shared_root), what="nothing is left")
    assert last_run(daemon)["cause"] == "cancelled"


def test_a_client_that_leaves_while_its_run_waits(daemon: Daemon, shared_root: Root) -> None:
    before = daemon.get("/status")["executions"]
    daemon.post("/permits", {"permits": 0})
    request = begin(daemon, SCHEMA, schema_contract('return "hi"'))
    daemon.waiting(1)
    request.close()
    daemon.waiting(0)
    assert daemon.get("/status")["executions"] == before
    eventually(lambda: left_in(shared_root) == [], what="its folder is removed")
    daemon.post("/permits", {"permits": 8})


def test_somebody_else_ends_a_run(daemon: Daemon, tmp_path: Path) -> None:
    there = tmp_path / "there"
    request = begin(daemon, SCHEMA, schema_contract(f"touch {there}", "sleep 600"))
    pid_in(there)
    genvm_id = next(iter(daemon.get("/status")["executions"]))
    assert daemon.request("DELETE", f"/genvm/{genvm_id}").status == 200
    is_error(request.reply(), "contract_failed")


def test_twenty_at_once_on_two_permits(daemon: Daemon, tmp_path: Path) -> None:
    daemon.post("/permits", {"permits": 2})
    journal = tmp_path / "journal"
    pending = [
        begin(
            daemon,
            SCHEMA,
            schema_contract(
                f"append {journal} begin",
                "sleep 0.02",
                f"append {journal} end",
                f'return "{number}"',
            ),
        )
        for number in range(20)
    ]
    assert [request.reply().json for request in pending] == [
        {"schema": str(number)} for number in range(20)
    ]
    running = 0
    for line in journal.read_text().splitlines():
        running += 1 if line == "begin" else -1
        assert running <= 2
    assert journal.read_text().count("begin") == 20
    daemon.post("/permits", {"permits": 8})


def test_twenty_at_once_of_every_kind(daemon: Daemon, tmp_path: Path) -> None:
    """Runs that fail and clients that leave take nothing from those that succeed."""
    codes = [FAILURES[name][0] for name in ("user error", "dies", "writes", "fails", "is killed")]
    codes += [schema_contract('return "hi"'), schema_contract("sleep 600")]
    pending = [(code, begin(daemon, SCHEMA, code)) for code in codes * 3]
    for code, request in pending:
        if "sleep 600" in code:
            request.close()
        elif '"hi"' in code:
            is_answer(request.reply(), {"schema": "hi"})
        else:
            is_error(request.reply(), "contract_failed")


def test_a_draining_manager_starts_no_run(daemon: Daemon) -> None:
    daemon.post("/drain")
    try:
        reply = ask(daemon, SCHEMA, schema_contract('return "hi"'))
        is_error(reply, "draining", status=503)
    finally:
        daemon.post("/undrain")
    is_answer(ask(daemon, SCHEMA, schema_contract('return "hi"')), {"schema": "hi"})


@pytest.mark.parametrize("waits", [False, True], ids=["runs", "waits for permits"])
def test_the_end_of_the_manager_during_a_run(tmp_path: Path, waits: bool) -> None:
    root = prepared({})
    daemon = serve(root)
    try:
        there = tmp_path / "there"
        if waits:
            daemon.post("/permits", {"permits": 0})
        request = begin(daemon, SCHEMA, schema_contract(f"touch {there}", "sleep 600"))
        if waits:
            daemon.waiting(1)
        else:
            pid_in(there)
        assert daemon.stop() == 0
        assert left_in(root) == []
        eventually(lambda: not daemon.descendants(), what="nothing is left")
        assert "Traceback" not in daemon.text + daemon.errors
        request.close()
    finally:
        daemon.close()
        root.close()


@pytest.mark.parametrize("state", ["long", "gone", "gone later", "full"])
def test_a_temporary_folder_that_cannot_be_used(root: Root, state: str) -> None:
    """A socket's path has at most 107 bytes; whatever the folder, the answer is clear."""
    folder = root.path / ("t" * (100 if state == "long" else 1))
    folder.mkdir()
    if state == "gone":
        folder.rmdir()
    daemon = Daemon.serve(root, environ={"TMPDIR": str(folder)})
    code = schema_contract('return "hi"')
    try:
        if state.startswith("gone"):
            is_answer(ask(daemon, SCHEMA, code), {"schema": "hi"})
        if state == "gone later":
            folder.rmdir()
        if state == "full":
            resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))
            code += "#" * 5 * MIB
        if state != "gone":
            reply = ask(daemon, SCHEMA, code)
            is_error(reply, "temporary_folder_failed", "TMPDIR")
            assert str(folder) not in reply.json["error"]
        if state == "gone later":
            reply = ask(daemon, DETECT, "#" * 5 * MIB)
            is_error(reply, "temporary_folder_failed", "TMPDIR")
        assert daemon.idle()
        assert not folder.exists() or list(folder.iterdir()) == []
        assert "Traceback" not in daemon.text
    finally:
        daemon.close()


# --- the requests with a deadline ---


def test_an_executor_that_never_names_a_version(late: Late) -> None:
    for major in (HANGER, CHATTERER):
        reply = late.pending[f"asked {major}"].reply()
        is_error(reply, "detection_failed", f"v{major}.0.0", "10 s")
    eventually(lambda: is_clean(late.asked, late.asked_root), what="nothing is left")
    grown = late.asked.peak_memory() - late.asked_memory
    report(f"executors that talk without end: {grown / MIB:.1f} MiB more")
    assert grown < 100 * MIB
    is_answer(ask(late.asked, DETECT, "# v0.1.0", newest_is(0)), {"specified_major": 0})


def test_runs_that_do_not_end(late: Late) -> None:
    """They never connect, or sleep, or wait for a host that waits for them."""
    names = ("never connects", "sleeps", "floods")
    replies = {name: late.pending[name].reply() for name in names}
    for reply in replies.values():
        is_error(reply, "contract_failed")
    assert "asleep" in replies["never connects"].json["error"]
    assert "tired" in replies["sleeps"].json["error"]
    last = late.daemon.run("exit 0")
    late.daemon.result(last)
    runs = [last - number * ID_STEP for number in range(1, 1 + len(replies))]
    for genvm_id in runs:
        result = late.daemon.result(int(genvm_id))
        assert result["cause"] == "deadline"
        # By SIGTERM, by SIGKILL after that, or by itself once it had reported the timeout.
        assert (result["signal"], result["exit_code"]) in ((15, None), (9, None), (None, 0))
    eventually(lambda: is_clean(late.daemon, late.root), what="nothing is left")
    grown = late.daemon.peak_memory() - late.memory
    report(f"a flood of 5 million requests, answers not read: {grown / MIB:.1f} MiB more")
    assert grown < 120 * MIB, "the answers are larger"
    is_answer(ask(late.daemon, SCHEMA, schema_contract('return "hi"')), {"schema": "hi"})
    assert late.daemon.stop() == 0
    # Whichever end the manager sees first, of the process or of its connection.
    assert [name for name in names if "30 s" not in replies[name].json["error"]] == []
