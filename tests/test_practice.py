"""The practice executor as a real process, against a small blocking host."""

from __future__ import annotations

import ast
import base64
import builtins
import dis
import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from genvm_manager import (
    Address,
    HostSession,
    HostState,
    HostStorage,
    decode_calldata,
    deployment_writes,
    encode_calldata,
    install_practice_executor,
    main,
    practice_executor_source,
)

from .integration.support import alive, eventually
from .support import PATIENCE

ME = b"\x01" * 20
MESSAGE = {
    "contract_address": base64.b64encode(ME).decode(),
    "sender_address": base64.b64encode(b"\x02" * 20).decode(),
    "origin_address": base64.b64encode(b"\x02" * 20).decode(),
    "chain_id": "61999",
    "value": None,
    "is_init": False,
}


@pytest.fixture(scope="session")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_practice_executor(tmp_path_factory.mktemp("root"), "v0.1.0")


class ThreadHost:
    """A host for one connection, in a thread: HostSession over a blocking socket.

    ``stuck_after``: the number of answers after which it reads on but answers no more. With
    ``keeps_open`` it does not close after the result either, and collects what still comes.
    """

    def __init__(
        self,
        listener: socket.socket,
        state: HostState,
        stuck_after: int | None,
        keeps_open: bool,
    ) -> None:
        self.state = state
        self.session = HostSession(state)
        self.error: Exception | None = None
        self.stuck = threading.Event()
        self.after_result = b""
        self._stuck_after = stuck_after
        self._keeps_open = keeps_open
        self._listener = listener
        listener.settimeout(PATIENCE)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(PATIENCE)
                self._serve(connection)
        except Exception as error:
            self.error = error

    def _serve(self, connection: socket.socket) -> None:
        answered = 0
        while self.session.outcome is None:
            data = connection.recv(65536)
            if not data:
                return
            self.session.feed(data)
            while (answer := self.session.step()) is not None:
                if self._stuck_after is not None and answered >= self._stuck_after:
                    self.stuck.set()
                    continue
                connection.sendall(answer)
                answered += 1
        while self._keeps_open and (data := connection.recv(65536)):
            self.after_result += data

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._listener.close()


NODE = {"node_address": "0xaa", "tx_id": "0xbb"}


@dataclass
class Run:
    """A practice run: what the test says, then what came of it."""

    executor: Path
    directory: Path
    script: str = ""
    prelude: str = ""
    host_data: dict[str, Any] = field(default_factory=lambda: dict(NODE))
    calldata: Any = field(default_factory=lambda: {"method": "m", "args": [], "kwargs": {}})
    message: dict[str, Any] = field(default_factory=lambda: dict(MESSAGE))
    extra: list[str] = field(default_factory=list)
    storage: HostStorage = field(default_factory=HostStorage)
    stuck_after: int | None = None
    keeps_open: bool = False
    writable: bool = True
    host_uri: str = ""
    tcp: str = ""

    def start(self) -> subprocess.Popen[bytes]:
        state = HostState(ME, encode_calldata(self.calldata), self.storage, self.writable)
        if self.script:
            state.deploy(deployment_writes(self.script.encode()))
        uri = self._listen(state)
        reader, writer = os.pipe()
        self.log_reader = reader
        self.process = subprocess.Popen(
            [
                str(self.executor),
                f"--log-fd={writer}",
                "run",
                *self.extra,
                "--host-data",
                json.dumps(self.host_data | ({"practice": self.prelude} if self.prelude else {})),
                "--host",
                self.host_uri or uri,
                "--message",
                json.dumps(self.message),
                "--cookie=7",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(writer,),
        )
        os.close(writer)
        return self.process

    def _listen(self, state: HostState) -> str:
        if self.tcp:
            family = socket.AF_INET6 if ":" in self.tcp else socket.AF_INET
            listener = socket.create_server((self.tcp.strip("[]"), 0), family=family)
            uri = f"{self.tcp}:{listener.getsockname()[1]}"
        else:
            path = self.directory / "host.sock"
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.listen()
            uri = f"unix://{path}"
        self.host = ThreadHost(listener, state, self.stuck_after, self.keeps_open)
        return uri

    def finish(self) -> Run:
        log = bytearray()

        def read_log() -> None:
            while chunk := os.read(self.log_reader, 65536):
                log.extend(chunk)

        thread = threading.Thread(target=read_log, daemon=True)
        thread.start()
        self.stdout, stderr = self.process.communicate(timeout=PATIENCE)
        self.stderr = stderr.decode()
        self.status = self.process.returncode
        thread.join(PATIENCE)
        assert not thread.is_alive()
        os.close(self.log_reader)
        self.log_bytes = bytes(log)
        self.log = [json.loads(x) for x in self.log_bytes.splitlines() if x.startswith(b"{")]
        return self

    def __call__(self) -> Run:
        self.start()
        return self.finish()

    @property
    def outcome(self) -> tuple[str, Any]:
        self.host.join()
        assert self.host.session.outcome is not None, (self.stderr, self.host.error)
        outcome = self.host.session.outcome
        if outcome.kind == "vm_error":
            return outcome.kind, outcome.data.decode()
        return outcome.kind, decode_calldata(outcome.data)


@pytest.fixture
def make(executor: Path, tmp_path: Path) -> Callable[..., Run]:
    numbers: Iterator[int] = iter(range(100))

    def build(*steps: str, **options: Any) -> Run:
        directory = tmp_path / str(next(numbers))
        directory.mkdir()
        script = "\n".join(["# v0.1.0", "on method m", *steps])
        return Run(executor, directory, options.pop("script", script), **options)

    return build


# Command line and exit statuses


def test_the_script_needs_only_the_standard_library(executor: Path) -> None:
    lines = re.findall(r"^(?:import|from) ([\w., ]+)", practice_executor_source(), re.MULTILINE)
    imports = {name for line in lines for name in line.split(" import ")[0].split(", ")}
    assert "sys" in imports
    assert imports <= sys.stdlib_module_names
    assert executor.stat().st_mode & 0o777 == 0o755
    assert executor.parts[-4:] == ("executor", "v0.1.0", "bin", "genvm")


def names_in(code: CodeType) -> tuple[set[str], set[str]]:
    """Return the global names that code takes, and those that it makes."""
    steps = [*dis.get_instructions(code)]
    taken = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    made = {step.argval for step in steps if step.opname in ("STORE_NAME", "STORE_GLOBAL")}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = names_in(inner)
            taken |= more[0]
            made |= more[1]
    return taken, made


def test_the_script_has_all_that_it_names() -> None:
    source = practice_executor_source()
    taken, made = names_in(compile(source, "genvm", "exec"))
    assert {"os", "json", "select"} <= taken
    assert taken - made - set(dir(builtins)) - {"__name__", "__annotations__"} == set()
    imports = [each for each in ast.parse(source).body if isinstance(each, ast.Import)]
    names = {alias.name for each in imports for alias in each.names}
    assert names <= taken, "what is not needed is not imported"


def test_asking_a_module_without_wsproto_says_what_to_install(
    executor: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    host_data = json.dumps(NODE | {"practice": "ask-llm hello"})
    words = ["run", "--host=unix:///x", "--cookie=1", "--message", json.dumps(MESSAGE)]
    done = subprocess.run(
        [python, "-IS", executor, *words, "--host-data", host_data],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "asking a module requires the Python package wsproto" in done.stderr
    assert f"install it with: {python} -m pip install wsproto\n" in done.stderr


@pytest.mark.parametrize("name", ["with a space", "x" * 150, "quo'te"])
def test_any_interpreter_path_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / name / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{os.path.realpath(sys.executable)}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    path = install_practice_executor(tmp_path, "v1.2.3")
    done = subprocess.run([path, "precompile"], capture_output=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.count(b"not GenVM") == 1


def command(executor: Path, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    done = subprocess.run(
        [executor, *arguments], input=stdin, capture_output=True, timeout=PATIENCE, check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    ("code", "version"),
    [
        (b"# v0.1.0\nrest", "v0.1.0"),
        (b"//v1.2.3", "v1.2.3"),
        (b"--  v2.*.* \nx", "v2.*.*"),
        (b"# hello\n# v0.1.0", "v0.1.0"),  # none is stated
    ],
)
def test_parse_version_pattern(executor: Path, code: bytes, version: str) -> None:
    status, stdout, _ = command(executor, "parse-version-pattern", stdin=code)
    assert (status, stdout) == (0, f"{version}\n")


@pytest.mark.parametrize("code", [b"v0.1.0", b"", b"\xff\xfe" * 1000])
def test_parse_version_pattern_refuses_what_real_executors_refuse(
    executor: Path, code: bytes
) -> None:
    status, stdout, stderr = command(executor, "parse-version-pattern", stdin=code)
    assert (status, stdout) == (1, "")
    assert "not a contract" in stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--log-fd=2", "run", "--sync", "--sync"), "--sync is given twice"),
        (("--log-fd=2", "run", "--host=a:1", "--host", "b:1"), "--host is given twice"),
        (("--log-fd=2", "--log-fd=2", "run"), "--log-fd is given twice"),
        ([], "expected a command"),
        (["frobnicate"], "unexpected argument 'frobnicate'"),
        (["run"], "missing --host-data, --host, --message, --cookie"),
        (["run", "--unknown"], "unexpected argument '--unknown'"),
        (["--log-fd=x", "precompile"], "--log-fd"),
        (
            ["run", "--host-data={}", "--host=a:1", "--message={}", "--cookie=1", "--print=x"],
            "--print",
        ),
    ],
)
def test_wrong_command_line_is_status_2(executor: Path, arguments: list[str], problem: str) -> None:
    status, _, stderr = command(executor, *arguments)
    assert status == 2
    assert problem in stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"host_uri": "unix:///nonexistent/socket"}, "cannot reach the host unix:///nonexistent"),
        ({"host_uri": "127.0.0.1:1"}, "cannot reach the host 127.0.0.1:1"),
        ({"host_uri": "nonsense"}, "expected unix://path or host:port"),
        ({"message": {}}, "bad message: KeyError: 'contract_address'"),
        (
            {"message": MESSAGE | {"contract_address": "AAAA"}},
            "contract_address: expected 20 bytes",
        ),
        ({"message": MESSAGE | {"sender_address": "AAAA"}}, "sender_address: expected 20 bytes"),
        ({"message": MESSAGE | {"chain_id": "0x1"}}, "chain_id: expected a decimal number"),
        ({"message": MESSAGE | {"chain_id": 1}}, "bad message: TypeError"),
        ({"message": MESSAGE | {"value": "1"}}, "value: expected an integer"),
        ({"message": MESSAGE | {"is_init": 1}}, "is_init: expected true or false"),
        ({"message": MESSAGE | {"datetime": 1}}, "datetime: expected a string"),
        ({"host_data": {}}, "bad host data: expected an object with a string node_address"),
        ({"host_data": {"node_address": "0x"}}, "expected an object with a string tx_id"),
        ({"host_data": {"node_address": "0x", "tx_id": 1}}, "with a string tx_id"),
        ({"extra": ["--permissions", "rq"]}, "bad permissions 'rq'"),
    ],
)
def test_set_up_errors_are_status_1(
    make: Callable[..., Run], options: dict[str, Any], problem: str
) -> None:
    run = make("return 1", **options)()
    assert run.status == 1
    assert problem in run.stderr
    assert problem in run.log[-1]["message"]
    assert run.log[-1]["level"] == "error"


def test_a_closed_log_descriptor_is_status_1(executor: Path) -> None:
    status, _, stderr = command(
        executor,
        *("--log-fd=77", "run", "--host-data={}", "--host=a:1", "--message={}", "--cookie=1"),
    )
    assert status == 1
    assert "log descriptor 77" in stderr


@pytest.mark.parametrize("tcp", ["127.0.0.1", "[::1]"])
def test_tcp_hosts(make: Callable[..., Run], tcp: str) -> None:
    if tcp == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    run = make("return 5", tcp=tcp)()
    assert (run.status, run.outcome) == (0, ("return", 5))


@pytest.mark.parametrize(
    "extra",
    [
        ["--debug-mode", "--sync", "--permissions", "r", "--print", "stderr-full"],
        ["--allow-latest", "--permissions=rw", "--print=stderr-full"],
    ],
)
def test_known_extra_arguments(make: Callable[..., Run], extra: list[str]) -> None:
    run = make("return 5", extra=extra)()
    assert (run.status, run.outcome, run.stdout) == (0, ("return", 5), b"")
    assert run.stderr.count("not GenVM") == 1


def test_print(make: Callable[..., Run]) -> None:
    frame = b"\x00" + encode_calldata(5)
    assert make("return 5", extra=["--print=result"])().stdout == f"result {frame.hex()}\n".encode()
    digest = hashlib.sha3_256(frame).hexdigest()
    assert make("return 5", extra=["--print=fingerprint"])().stdout.decode() == (
        f"fingerprint {digest}\n"
    )


# The script language


def vm_error(text: str) -> tuple[str, Any]:
    return "vm_error", text


def user_error(text: str) -> tuple[str, Any]:
    return "user_error", {"message": text, "fingerprint": None}


@pytest.mark.parametrize(
    ("steps", "outcome"),
    [
        ([], ("return", None)),
        (['return {"a": [1, -2, "x", null, true]}'], ("return", {"a": [1, -2, "x", None, True]})),
        (["error not enough {funds}"], user_error("not enough {funds}")),
        (["vm-error out of memory"], vm_error("out of memory")),
        (["set 7", 'return ["$last", "$$last"]'], ("return", [7, "$last"])),
        (["", "# comment", "  return 1  ", "return 2"], ("return", 1)),
        (["return 1.5"], vm_error("line 3: return: value: a fraction has no calldata form")),
        (["sleep 0", "frobnicate"], vm_error("line 4: frobnicate: no such step")),
        (["sleep soon"], vm_error("line 3: sleep: could not convert string to float: 'soon'")),
        (["sleep -1"], vm_error("line 3: sleep: expected seconds")),
        (["sleep inf"], vm_error("line 3: sleep: expected seconds")),
        (
            ["log loud x"],
            vm_error(
                "line 3: log: expected one of trace, debug, info, warn, error, then a message"
            ),
        ),
        (["log-big -1"], vm_error("line 3: log-big: expected a number that is not negative")),
        (["return $args.0"], vm_error("line 3: return: Expecting value: line 1 column 1 (char 0)")),
        (['return "$args.0"'], vm_error("line 3: return: there is no $args.0")),
        (['return "$nothing"'], vm_error("line 3: return: there is no $nothing")),
        (["store"], vm_error("line 3: store: Expecting value: line 1 column 1 (char 0)")),
        (["load"], vm_error("line 3: load: expected a name")),
        (
            ["print-hex xyz"],
            vm_error(
                "line 3: print-hex: non-hexadecimal number found in fromhex() arg at position 0"
            ),
        ),
        (
            ["spam nowhere 5"],
            vm_error("line 3: spam: expected stdout, stderr or log, then a number of bytes"),
        ),
        (
            ["touch /nonexistent/file"],
            vm_error("line 3: touch: [Errno 2] No such file or directory: '/nonexistent/file'"),
        ),
        (["on nothing"], vm_error("line 3: on: expected init, schema or method NAME")),
        (["on method m"], vm_error("line 3: on: a second block method m")),
        (["return " + "[" * 5000], ("vm_error", None)),
    ],
)
def test_outcome_of_steps(
    make: Callable[..., Run], steps: list[str], outcome: tuple[str, Any]
) -> None:
    run = make(*steps)()
    kind, data = run.outcome
    assert (run.status, kind) == (0, outcome[0])
    if outcome == ("vm_error", None):
        assert data.startswith("line 3: return: ")
    else:
        assert data == outcome[1]


@pytest.mark.parametrize(
    ("script", "calldata", "is_init", "outcome"),
    [
        ("on init\nreturn 1\non method f\nreturn 2", {}, True, ("return", 1)),
        ("on init\nreturn 1\non method f\nreturn 2", {"method": "f"}, False, ("return", 2)),
        ("on method f", {}, True, ("return", None)),
        ("on method f", {"method": "g"}, False, vm_error("the contract has no method g")),
        ("on init", {}, False, vm_error("the contract has no method None")),
        ('on schema\nreturn "{}"', {"method": "#get-schema"}, False, ("return", "{}")),
        (
            "on schema\nreturn 1",
            {"method": "#get-schema"},
            False,
            vm_error("the schema is not a string"),
        ),
        ("on schema", {"method": "#get-schema"}, False, vm_error("the schema is not a string")),
        ("on method f", {"method": "#get-schema"}, False, vm_error("the contract has no schema")),
        ("on schema\nerror no", {"method": "#get-schema"}, False, user_error("no")),
        (
            "print x",
            {"method": "f"},
            False,
            vm_error("line 1: print: a step before the first block"),
        ),
        ("", {"method": "f"}, False, vm_error("the contract has no method f")),
        ("on method f", [], False, vm_error("the calldata is not a map")),
    ],
)
def test_blocks(
    make: Callable[..., Run], script: str, calldata: Any, is_init: bool, outcome: Any
) -> None:
    run = make(script=script, calldata=calldata, message=MESSAGE | {"is_init": is_init})()
    assert (run.status, run.outcome) == (0, outcome)


def test_references(make: Callable[..., Run]) -> None:
    address = Address(b"\x09" * 20)
    run = make(
        'return {"a": "$args.1", "k": ["$kwargs.to"], "m": "$message.chain_id"}',
        calldata={"method": "m", "args": [1, [2, b"x"]], "kwargs": {"to": address}},
    )()
    kind, data = run.outcome
    assert (kind, data) == ("return", {"a": [2, b"x"], "k": [address], "m": "61999"})
    assert isinstance(data["k"][0], Address)


def test_only_a_newline_ends_a_step(make: Callable[..., Run]) -> None:
    run = make('return "a\u2028b\x85c"\r')()
    assert run.outcome == ("return", "a\u2028b\x85c")


def test_stored_values_last_across_runs(make: Callable[..., Run]) -> None:
    storage = HostStorage()
    message = MESSAGE | {"is_init": True}
    script = '# v0.1.0\non init\nstore total {"n": "$args.0"}\non method m\nload total\n'
    first = make(script=script, message=message, calldata={"args": [2**70]}, storage=storage)()
    assert first.outcome == ("return", None)
    script += 'return ["$last", "$storage.total", "$storage.never"]'
    second = make(script=script, storage=storage)()
    assert second.outcome == ("return", [{"n": 2**70}, {"n": 2**70}, None])
    slot = hashlib.sha3_256(b"practice:total").digest()
    wire = encode_calldata({"n": 2**70})
    stored = b"".join(storage.read(ME, slot, 0, 4 + len(wire)))
    assert stored == len(wire).to_bytes(4, "little") + wire


@pytest.mark.parametrize(
    ("step", "permissions", "outcome"),
    [
        ("store x 1", "rscn", "forbidden: storage write without permission 'w'"),
        ("load x", "wscn", "forbidden: storage read without permission 'r'"),
        ('return "$storage.x"', "", "forbidden: storage read without permission 'r'"),
    ],
)
def test_permissions(make: Callable[..., Run], step: str, permissions: str, outcome: str) -> None:
    run = make(step, extra=[f"--permissions={permissions}"])()
    assert (run.status, run.outcome) == (0, ("vm_error", outcome))
    assert "storage_write" not in run.host.state.requests


def test_a_refusal_of_the_host_is_a_vm_error(make: Callable[..., Run]) -> None:
    run = make("store x 1", writable=False)()
    assert (run.status, run.outcome) == (
        0,
        vm_error("the host answered storage_write with error 2"),
    )


def test_output_steps(make: Callable[..., Run]) -> None:
    run = make(
        "print out {braces}",
        "print-err err text",
        "print-hex c3",
        "print-hex a90a",
        "log warn careful: {x}",
        "log-raw not json at all",
        "log-big 300000",
    )()
    assert run.stdout.decode() == "out {braces}\né\n"
    assert run.stderr.splitlines()[1:] == ["err text"]
    assert {"level": "warn", "message": "careful: {x}", "target": "practice"} in run.log
    assert b"\nnot json at all\n" in run.log_bytes
    assert run.log[-1]["message"] == "x" * 300_000
    assert run.log[0]["cookie"] == "7"
    assert run.outcome == ("return", None)


@pytest.mark.parametrize("target", ["stdout", "stderr", "log"])
@pytest.mark.parametrize("size", [0, 1, 1_000_003])
def test_spam_writes_that_many_bytes(make: Callable[..., Run], target: str, size: int) -> None:
    quiet, loud = make()(), make(f"spam {target} {size}")()

    def length(run: Run) -> int:
        return len({"stdout": run.stdout, "stderr": run.stderr, "log": run.log_bytes}[target])

    assert length(loud) - length(quiet) == size
    assert loud.outcome == ("return", None)


def test_file_steps(make: Callable[..., Run]) -> None:
    run = make("touch D/pid", "wait-file D/go", "append D/list one two", "append D/list three")
    run.script = run.script.replace("D/", f"{run.directory}/")
    process = run.start()
    eventually((run.directory / "pid").exists, what="touch")
    assert process.poll() is None
    assert not (run.directory / "list").exists()
    (run.directory / "go").touch()
    run.finish()
    assert (run.directory / "pid").read_text() == f"{process.pid}\n"
    assert (run.directory / "list").read_text() == "one two\nthree\n"


@pytest.mark.parametrize("status", [0, 3, 255])
def test_exit_reports_nothing(make: Callable[..., Run], status: int) -> None:
    run = make(f"exit {status}", "return 1")()
    assert run.status == status
    run.host.join()
    assert run.host.session.outcome is None


@pytest.mark.parametrize(("name", "number"), [("KILL", 9), ("SIGSEGV", 11), ("15", 15)])
def test_die(make: Callable[..., Run], name: str, number: int) -> None:
    run = make(f"die {name}", "return 1")()
    assert run.status == -number
    run.host.join()
    assert run.host.session.outcome is None


@pytest.mark.parametrize(("step", "own"), [("grandchild", False), ("grandchild-session", True)])
def test_grandchild_outlives_the_run_and_holds_the_pipes(
    make: Callable[..., Run], step: str, own: bool
) -> None:
    run = make(f"{step} 300", "return 1")
    process = run.start()
    assert process.wait(PATIENCE) == 0
    log = os.read(run.log_reader, 65536)
    (pid,) = re.findall(rb'"message": "grandchild".*"pid": (\d+)', log)
    grandchild = int(pid)
    try:
        assert alive(grandchild)
        assert os.getsid(grandchild) == (grandchild if own else os.getsid(0))
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stderr.fileno(), 65536)
        for fd in (process.stdout.fileno(), process.stderr.fileno(), run.log_reader):
            assert select.select([fd], [], [], 0)[0] == []
        assert run.outcome == ("return", 1)
    finally:
        os.kill(grandchild, signal.SIGKILL)
    eventually(lambda: not alive(grandchild), what="the grandchild dies")
    run.finish()


def test_flooding_a_reading_host_ends_normally(make: Callable[..., Run]) -> None:
    run = make("flood-host 1000", "store x 1", "flood-host 5", 'return "$storage.x"')()
    assert (run.status, run.outcome) == (0, ("return", 1))
    assert run.host.state.requests["get_calldata"] == 1006


def test_garbage_ends_the_run(make: Callable[..., Run]) -> None:
    run = make("garbage-host ff00", "load x")()
    assert run.status == 1
    assert "host" in run.stderr
    run.host.join()
    assert "unknown method 255" in str(run.host.error)


# The prelude


def test_prelude_runs_before_the_host_is_needed(make: Callable[..., Run]) -> None:
    run = make("return 1", prelude="touch D/early\nwait-file D/go")
    run.prelude = run.prelude.replace("D/", f"{run.directory}/")
    run.start()
    eventually((run.directory / "early").exists, what="the prelude")
    assert not run.host.state.requests
    (run.directory / "go").touch()
    assert run.finish().outcome == ("return", 1)


@pytest.mark.parametrize(
    ("prelude", "status", "problem"),
    [
        ("exit 3", 3, ""),
        ("die KILL", -9, ""),
        ("load x", 1, "prelude: this step needs the host"),
        ("flood-host 1", 1, "prelude: this step needs the host"),
        ("return 1", 1, "prelude: an outcome before the host is connected"),
        ("frobnicate", 1, "line 1: frobnicate: no such step"),
        ("sleep 0\non init", 1, "line 2: on: the prelude has no blocks"),
    ],
)
def test_prelude_ends(make: Callable[..., Run], prelude: str, status: int, problem: str) -> None:
    run = make("return 1", prelude=prelude, host_uri="unix:///nonexistent/socket")()
    assert run.status == status
    assert problem in run.stderr


# Cancellation


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_sleep_reports_a_timeout(make: Callable[..., Run], number: int) -> None:
    run = make("touch D/flag", "sleep 3600")
    run.script = run.script.replace("D/", f"{run.directory}/")
    process = run.start()
    eventually((run.directory / "flag").exists, what="the sleep begins")
    process.send_signal(number)
    run.finish()
    assert (run.status, run.outcome) == (0, vm_error("timeout"))


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_a_signal_while_blocked_on_the_host_reports_a_timeout(
    make: Callable[..., Run], answers: int
) -> None:
    run = make("return 1", stuck_after=answers)
    process = run.start()
    assert run.host.stuck.wait(PATIENCE)
    process.send_signal(signal.SIGTERM)
    run.finish()
    assert (run.status, run.outcome) == (0, vm_error("timeout"))


def test_a_signal_while_the_acknowledgement_is_due_does_not_report_twice(
    make: Callable[..., Run],
) -> None:
    # get_calldata, two reads of the code, and then the result is never acknowledged.
    run = make("return 1", stuck_after=3, keeps_open=True)
    process = run.start()
    assert run.host.stuck.wait(PATIENCE)
    process.send_signal(signal.SIGTERM)
    run.finish()
    assert (run.status, run.outcome) == (0, ("return", 1))
    assert run.host.after_result == b""


def test_a_signal_while_a_module_accepts_no_connection_reports_a_timeout(
    make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        host, port = listener.getsockname()
        with socket.create_connection((host, port)):  # which takes the only place there is
            monkeypatch.setenv("GENVM_LLM_MODULE", f"ws://{host}:{port}")
            run = make("touch D/flag", "ask-llm x")
            run.script = run.script.replace("D/", f"{run.directory}/")
            process = run.start()
            eventually((run.directory / "flag").exists, what="it is about to connect")
            process.send_signal(signal.SIGTERM)
            run.finish()
    assert (run.status, run.outcome) == (0, vm_error("timeout"))


def test_a_signal_while_flooding_a_host_that_does_not_read(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    run = make("return 1")
    path = tmp_path / "deaf.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE)
        run.host_uri = f"unix://{path}"
        run.script = "on method m\nflood-host 100000000"
        process = run.start()
        connection, _ = listener.accept()
        with connection:
            state = HostState(ME, encode_calldata(run.calldata))
            state.deploy(deployment_writes(run.script.encode()))
            session = HostSession(state)
            connection.settimeout(PATIENCE)
            while state.requests["storage_read"] < 2:
                session.feed(connection.recv(1))
                while (answer := session.step()) is not None:
                    connection.sendall(answer)
            assert connection.recv(1) == b"\x00"
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
    run.finish()
    assert run.log[-1]["problem"] == "the host does not read"


def test_a_signal_while_a_full_pipe_holds_the_output_up(make: Callable[..., Run]) -> None:
    run = make("touch D/flag", "spam stdout 10000000", "return 1")
    run.script = run.script.replace("D/", f"{run.directory}/")
    process = run.start()
    eventually((run.directory / "flag").exists, what="the spam begins")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    run.finish()
    assert run.outcome == vm_error("timeout")
    assert len(run.stdout) < 10_000_000


def test_a_signal_in_the_prelude_reports_a_timeout(make: Callable[..., Run]) -> None:
    run = make("return 1", prelude="touch D/flag\nsleep 3600")
    run.prelude = run.prelude.replace("D/", f"{run.directory}/")
    process = run.start()
    eventually((run.directory / "flag").exists, what="the sleep begins")
    process.send_signal(signal.SIGTERM)
    run.finish()
    assert (run.status, run.outcome) == (0, vm_error("timeout"))


def test_a_signal_without_a_host_still_ends_with_status_0(make: Callable[..., Run]) -> None:
    run = make(prelude="touch D/flag\nsleep 3600", host_uri="unix:///nonexistent/socket")
    run.prelude = run.prelude.replace("D/", f"{run.directory}/")
    process = run.start()
    eventually((run.directory / "flag").exists, what="the sleep begins")
    process.send_signal(signal.SIGTERM)
    assert run.finish().status == 0
    assert run.log[-1]["message"] == "cancelled, and the host did not confirm it"


def test_ignore_sigterm(make: Callable[..., Run]) -> None:
    run = make("ignore-sigterm", "touch D/flag", "wait-file D/go", "return 1")
    run.script = run.script.replace("D/", f"{run.directory}/")
    process = run.start()
    eventually((run.directory / "flag").exists, what="SIGTERM is ignored")
    process.send_signal(signal.SIGTERM)
    (run.directory / "go").touch()
    run.finish()
    assert (run.status, run.outcome) == (0, ("return", 1))


def test_a_practice_root_replaces_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made twice it is the same; the root of a release stays as it is."""
    program = tmp_path / "executor" / "v0.1.0" / "bin" / "genvm"
    assert main(["practice-root", str(tmp_path)]) == 0
    assert main(["practice-root", str(tmp_path)]) == 0
    program.write_text("a release\n")
    manifest = tmp_path / "data" / "manifest.yaml"
    manifest.write_text("executor_versions: {}\n")
    assert main(["practice-root", str(tmp_path)]) == 1
    assert "new folder" in capsys.readouterr().err
    assert manifest.read_text() == "executor_versions: {}\n"
    assert program.read_text() == "a release\n"


def test_a_practice_root_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["practice-root", str(tmp_path / "file")]) == 1
    assert "Not a directory" in capsys.readouterr().err
