"""The client commands as processes, against the real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from genvm_manager import own_command

from .conftest import Start
from .fake_providers import KEY, Provider
from .support import (
    NO_HOST,
    NODE,
    PROJECT,
    TIMESTAMP,
    WAIT,
    Daemon,
    Root,
    eventually,
    free_port,
    message,
    run_body,
)

Done = subprocess.CompletedProcess[str]
SECRET = "a-token-of-forty-characters-or-nearly-so"
STEERING = "1b5d303b78079b324a1b5b324a"  # sets the title, clears the screen


def url(daemon: Daemon) -> str:
    """Return what ``--server`` takes for a daemon."""
    return daemon.address if "://" in daemon.address else f"http://{daemon.address}"


def begin(server: str | None, *words: str, **options: Any) -> subprocess.Popen[str]:
    """Start a command."""
    clean = {key: text for key, text in os.environ.items() if not key.startswith("GENVM")}
    environ = {**clean, **({} if server is None else {"GENVM_SERVER": server})}
    environ |= options.pop("environ", {})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    argv = own_command(*words)
    return subprocess.Popen(argv, env=environ, cwd=PROJECT, text=True, **{**pipes, **options})


def end(process: subprocess.Popen[str], text: str = "") -> Done:
    """Wait for the end of a command, which never shows a stack."""
    out, err = process.communicate(text, WAIT)
    assert "Traceback" not in (err or "")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def client(server: Daemon | str | None, *words: str, text: str = "", **options: Any) -> Done:
    """Run a command with some text on its stdin."""
    return end(
        begin(url(server) if isinstance(server, Daemon) else server, *words, **options), text
    )


def lines_of(done: Done) -> list[Any]:
    """Return what a command wrote as lines of JSON."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def flags(*steps: str, **changes: str) -> list[str]:
    """Return the flags of a run of the practice executor."""
    host_data = json.dumps({**NODE, "practice": "\n".join(steps)})
    words = ["--message", json.dumps(message()), "--host", NO_HOST, "--host-data", host_data]
    return [*words, *(f"--{name}={text}" for name, text in changes.items())]


@contextlib.contextmanager
def started(server: Daemon | str, *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command that is killed in the end."""
    process = begin(url(server) if isinstance(server, Daemon) else server, *words, **options)
    with process:
        try:
            yield process
        finally:
            process.kill()


# --- each command ---


@pytest.mark.parametrize(
    ("words", "text", "members"),
    [
        ("status", "permits     0 of 8 in use, 0 waiting\n", {"draining": False}),
        ("ps", "ID  STATE  VERSION  PERMITS  PROGRESS\n", {"executions": []}),
        ("permits", "8 permits: 0 in use, 8 available, 0 executions waiting\n", {"available": 8}),
        ("permits 8", "8 permits: ", {"permits": 8}),
        ("module status", "llm  stopped\nweb  stopped\n", {}),
        ("module status web", "web  stopped\n", {}),
        ("module stop llm", "module_not_running\n", {"result": "module_not_running"}),
        ("reload", "manifest_reloaded\n", {"result": "manifest_reloaded"}),
        ("log-level", "info\n", {"level": "info"}),
        ("log-level INFO", "info\n", {"level": "info", "result": "log_level_set"}),
        ("undrain", "accepting\n", {"result": "accepting"}),
    ],
)
def test_what_is_asked_and_answered(
    daemon: Daemon, words: str, text: str, members: Mapping[str, object]
) -> None:
    server = url(daemon)
    for_people, for_programs = (begin(server, *words.split(), *more) for more in ((), ("--json",)))
    shown = end(for_people)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert text in shown.stdout
    told = end(for_programs)
    assert (told.returncode, told.stderr) == (0, "")
    document = json.loads(told.stdout)
    assert {name: document[name] for name in members} == members


def test_a_run_that_is_waited_for(daemon: Daemon, tmp_path: Path) -> None:
    words = flags("print hello", "log info told", "print-err oops", "exit 3", timestamp=TIMESTAMP)
    done = client(daemon, "run", *words, "--wait", "--log")
    (genvm_id,) = (e["id"] for e in daemon.get("/genvm?limit=1")["executions"])
    assert (done.returncode, done.stdout) == (5, "hello\n")
    assert 'info told target="practice"\n' in done.stderr
    assert "oops\n" in done.stderr  # before the log or after it: they come by two pipes
    assert done.stderr.endswith(f"\nexecution {genvm_id}: exit code 3\n")
    assert daemon.get("/status")["unread"] == 0, "its result was read"
    body = tmp_path / "body.json"
    body.write_text(json.dumps(run_body("print hello", "exit 0")))
    done = client(daemon, "run", str(body), "--wait", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["status"]["stdout"] == "hello\n"
    done = client(daemon, "run", "-", "--no-capture", "--wait", text=body.read_text())
    assert (done.returncode, done.stdout) == (0, ""), "a flag goes before the field of the body"


def test_a_run_step_by_step(daemon: Daemon) -> None:
    words = flags("print hello", "print-err oops", "log info told", "sleep 600")
    key = ["--idempotency-key", "once", f"--timestamp={TIMESTAMP}"]
    done = client(daemon, "run", *words, *key)
    genvm_id = done.stdout.strip()
    assert json.loads(client(daemon, "run", *words, *key, "--json").stdout)["id"] == int(genvm_id)
    eventually(lambda: client(daemon, "logs", genvm_id).stdout == "hello\n", what="the output")
    listed, late, events, following = (
        begin(url(daemon), *words)
        for words in (
            ("ps", "--state", "running"),
            ("wait", genvm_id, "--timeout", "10ms"),
            ("logs", genvm_id, "--json"),
            ("logs", "-f", genvm_id, "--log"),
        )
    )
    assert f"\n{genvm_id}  running  " in end(listed).stdout
    assert end(late).returncode == 7
    found = lines_of(end(events))
    assert {"event": "stdout", "data": {"text": "hello\n"}} in found
    assert "finished" not in [line["event"] for line in found]
    waiting = begin(url(daemon), "wait", genvm_id)
    done = client(daemon, "stop", genvm_id, "--grace=1s")
    assert (done.returncode, done.stdout) == (0, f"execution {genvm_id} has ended\n")
    done = end(waiting)
    assert (done.returncode, done.stdout) == (6, "cancelled\n")
    done = end(following)
    assert (done.returncode, done.stdout) == (0, "hello\n")
    assert "oops\n" in done.stderr
    assert "info told" in done.stderr
    listed, ended = (
        begin(url(daemon), *w) for w in (("ps", "--all"), ("wait", genvm_id, "--json"))
    )
    assert f"\n{genvm_id}  finished  v0.1.0   2        cancelled\n" in end(listed).stdout
    assert json.loads(end(ended).stdout)["status"]["cause"] == "cancelled"


def test_draining(daemon: Daemon) -> None:
    genvm_id = daemon.run("wait-file /nonexistent")
    assert client(daemon, "drain").stdout == "draining\n"
    for time in ("10ms", "0"):
        done = client(daemon, "drain", "--wait", time)
        assert (done.returncode, done.stdout) == (7, "draining\n")
    draining = begin(url(daemon), "drain", "--wait", "--json")
    daemon.request("DELETE", f"/genvm/{genvm_id}")
    daemon.result(genvm_id)
    done = end(draining)
    assert (done.returncode, done.stdout) == (0, '{"result": "drained"}\n')
    done = client(daemon, "run", *flags("exit 0"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"genvm-manager: {url(daemon)}: the manager is draining")
    assert client(daemon, "undrain").stdout == "accepting\n"


def test_variables_whose_values_are_no_arguments(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "value"
    file.write_text("from a file\n")
    done = client(daemon, "env", "CLIENT_KEY", text="from stdin\n")
    assert (done.returncode, done.stdout) == (0, "CLIENT_KEY is set\n")
    done = client(daemon, "env", "CLIENT_FILE", "--file", str(file))
    assert done.stdout.startswith("CLIENT_FILE is set; set for ${ENV[CLIENT_FILE]} only; ")
    environ = {"CLIENT_URL": "from the environment"}
    done = client(daemon, "env", "CLIENT_URL", "--from-environment", "--json", environ=environ)
    assert json.loads(done.stdout)["key"] == "CLIENT_URL"
    assert client(daemon, "env", "NOT_THERE", "--from-environment").returncode == 2
    rows = client(daemon, "env").stdout
    assert "CLIENT_FILE  for templates only\n" in rows
    assert "CLIENT_KEY   passed on to executors and modules\n" in rows
    genvm_id = daemon.run(major=1, host_data='printf "%s,%s" "$CLIENT_KEY" "$CLIENT_URL"')
    assert daemon.result(genvm_id)["stdout"] == "from stdin,from the environment"


@pytest.fixture
def models(provider: Provider, tmp_path: Path) -> Path:
    """A configuration of the LLM module, with a model that answers and one that does not."""
    file = tmp_path / "llm.yaml"
    file.write_text(json.dumps(provider.config("says:fine", "status:503")))
    return file


def test_a_module(daemon: Daemon, models: Path) -> None:
    module = ("module", "start", "llm", "--config", str(models))
    assert client(daemon, *module).stdout == "module_started\n"
    done = client(daemon, *module)
    assert done.returncode == 1
    assert "module_already_running: " in done.stderr, "with its advice"
    assert "llm  running; at 127.0.0.1:" in client(daemon, "module", "status").stdout
    done = client(daemon, "module", "restart", "llm", "--config", str(models), "--json")
    assert json.loads(done.stdout)["changed"] is False
    assert client(daemon, "module", "stop", "llm").stdout == "module_stopped\n"


def test_whether_models_answer(daemon: Daemon, provider: Provider, models: Path) -> None:
    entry = {"host": provider.url, "provider": "openai-compatible", "model": "says:so", "key": KEY}
    body = json.dumps({"configs": [entry], "test_prompts": [{"user_message": "?"}] * 2})
    of_file = begin(url(daemon), "llm-check", "--module-config", str(models))
    of_body = begin(url(daemon), "llm-check", "-", "--json")
    done = end(of_file)
    assert done.returncode == 5
    first, second = sorted(done.stdout.splitlines(), reverse=True)
    assert first.startswith("ok      b0/says:fine, prompt 0, ")
    assert first.endswith(" ms: fine")
    assert second.startswith("FAILED  b1/status:503, prompt 0, ")
    assert "says" not in done.stderr
    done = end(of_body, body)
    assert done.returncode == 0
    assert {line["prompt_index"] for line in lines_of(done)} == {0, 1}
    assert {line["model"] for line in lines_of(done)} == {"openai-compatible/says:so"}


# --- where and as whom ---


def test_a_socket_a_token_and_several_managers(root: Root, start: Start, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(f"{SECRET}\n")
    token.chmod(0o600)
    path = root.path / "manager.sock"
    guarded = start("--auth-token-file", str(token), listen=("--socket", str(path)))
    plain = start("--permits", "3")
    assert guarded.address == f"unix://{path}"
    done = client(guarded, "status")
    assert done.returncode == 4
    assert "Authorization" in done.stderr
    assert client(guarded, "status", environ={"GENVM_TOKEN": "another"}).returncode == 4
    assert client(guarded, "status", environ={"GENVM_TOKEN": SECRET}).returncode == 0
    words = ["--token-file", str(token), "--server", guarded.address, "--server", url(plain)]
    done = client(None, "permits", "2", *words)
    text = "2 permits: 0 in use, 2 available, 0 executions waiting"
    expected = [f"{guarded.address}: {text}", f"{url(plain)}: {text}"]
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, sorted(expected))
    nobody = f"http://127.0.0.1:{free_port()}"
    done = client(f"{url(plain)} {nobody}", "permits", "--json")
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert document[url(plain)]["permits"] == 2
    assert document[nobody]["error"].startswith("no manager answers there: ")
    body = run_body("print hello", "print-hex 686f", "exit 0")
    done = client(None, "run", "-", "--wait", *words, text=json.dumps(body))
    assert f"{url(plain)}: hello\n" in done.stdout, "each line is named"
    assert f"{guarded.address}: ho\n" in done.stdout, "the last one has an end"


@pytest.mark.parametrize("place", ["http://127.0.0.1:{port}", "unix:///nonexistent/sock"])
def test_nobody_listens(place: str) -> None:
    done = client(place.format(port=free_port()), "events")
    assert (done.returncode, done.stdout) == (3, "")
    assert "no manager answers there: " in done.stderr
    assert done.stderr.count("\n") == 1


#: What README's proxy says itself, as a manager would, but without the number of a request.
PROXY_ERROR = (
    b'{"error": "each manager answers this at its own address",'
    b' "code": "endpoint_not_found", "retryable": false}'
)


class _Stranger(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/permits" else 404)
        self.end_headers()
        answers = {"/permits": b'{"a": 1}', "/env": PROXY_ERROR, "/genvm": b"[1]"}
        self.wfile.write(answers.get(self.path.partition("?")[0], b"<html>"))

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""


def test_what_answers_is_no_manager() -> None:
    with HTTPServer(("127.0.0.1", 0), _Stranger) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        place = f"http://127.0.0.1:{server.server_address[1]}"
        for word, problem, status in (
            ("status", "not a GenVM manager", 3),
            ("ps", "not a GenVM manager", 3),
            ("permits", "does not answer as", 3),
            ("env", "each manager answers this at its own address", 1),
        ):
            done = client(place, word)
            assert done.returncode == status, word
            assert problem in done.stderr
        server.shutdown()


def test_wrong_usage() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    cases = {
        ("run",): "message: required, but missing; host: required, but missing",
        ("run", "-"): "body: expected a JSON object, got nothing",
        ("permits", "many"): 'permits: expected an integer, got "many"',
        ("module", "start"): "name one, llm or web",
        ("llm-check",): "give a file with the request, or --module-config",
    }
    running = [(begin(nobody, *words), problem) for words, problem in cases.items()]
    for process, problem in running:
        done = end(process)
        assert (done.returncode, done.stdout) == (2, "")
        assert problem in done.stderr
    done = client("ftp://x", "status")
    assert done.returncode == 2
    assert "GENVM_SERVER: server: expected http://host:port" in done.stderr


# --- ends in the middle ---


def read_line(process: subprocess.Popen[str]) -> str:
    """Return the next line of a command's stdout."""
    assert process.stdout is not None
    fd, line = process.stdout.fileno(), b""
    while not line.endswith(b"\n"):
        assert select.select([fd], [], [], WAIT)[0], f"a line after {line!r}"
        byte = os.read(fd, 1)  # nothing must stay in a buffer, where select does not see it
        assert byte, f"the end after {line!r}"
        line += byte
    return line.decode()


def test_the_manager_dies_in_the_middle(start: Start) -> None:
    daemon = start()
    steps = ("print hello", "sleep 600")
    genvm_id = daemon.run(*steps)
    with (
        started(daemon, "run", *flags(*steps, timestamp=TIMESTAMP), "--wait") as run,
        started(daemon, "logs", "-f", str(genvm_id)) as logs,
        started(daemon, "wait", str(genvm_id)) as wait,
        started(daemon, "events", "--after", "0", "--reconnect", "0") as events,
    ):
        for process in (run, logs):
            assert read_line(process) == "hello\n"
        assert " missed " in read_line(events)
        daemon.wait_log(lambda record: record["message"] == "listening")
        daemon.process.kill()
        for process in (run, logs, wait, events):
            done = end(process)
            assert done.returncode == 3
            assert "the manager went away" in done.stderr or process is wait


def test_the_manager_dies_in_the_middle_of_a_line() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def die() -> None:
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(head + b'40\r\nevent: stdout\ndata: {"text": "ab')

        threading.Thread(target=die, daemon=True).start()
        done = client(f"http://127.0.0.1:{listener.getsockname()[1]}", "logs", "1", "-f")
    assert done.returncode == 3
    assert "the manager went away" in done.stderr
    assert "Traceback" not in done.stderr


def test_events_through_a_restart(root: Root, start: Start) -> None:
    path = root.path / "manager.sock"
    daemon = start(listen=("--socket", str(path)))
    daemon.post("/permits", {"permits": 4})
    with started(daemon, "events", "--after", "0", "--json", "--reconnect", "10m") as events:
        assert json.loads(read_line(events))["event"] == "missed"
        first = json.loads(read_line(events))
        assert (first["event"], first["data"]["permits"]) == ("permits", 4)
        assert daemon.stop() == 0
        again = start(listen=("--socket", str(path)))
        again.post("/permits", {"permits": 5})
        found = json.loads(read_line(events))
        while found["event"] != "permits":
            found = json.loads(read_line(events))
        assert found["data"]["permits"] == 5
        assert found["id"].partition("-")[0] != first["id"].partition("-")[0]


def test_control_c(daemon: Daemon) -> None:
    words = flags("print hello", "sleep 600", timestamp=TIMESTAMP)
    with started(daemon, "run", *words, "--wait") as run:
        assert read_line(run) == "hello\n"
        run.send_signal(signal.SIGINT)
        done = end(run)
    (genvm_id,) = (e["id"] for e in daemon.get("/genvm?state=running")["executions"])
    assert done.returncode == 130
    assert f"execution {genvm_id} goes on; genvm-manager stop {genvm_id} ends it\n" in done.stderr
    assert client(daemon, "stop", str(genvm_id)).returncode == 0


def test_control_c_where_there_are_several(daemon: Daemon, start: Start) -> None:
    """Each execution that goes on is named, with the command that ends it there."""
    managers = [daemon, start()]
    places = [word for each in managers for word in ("--server", url(each))]
    words = flags("print hello", "sleep 600", timestamp=TIMESTAMP)
    with started("", "run", *words, "--wait", *places) as run:
        lines = {read_line(run), read_line(run)}
        assert lines == {f"{url(each)}: hello\n" for each in managers}
        run.send_signal(signal.SIGINT)
        done = end(run)
    assert done.returncode == 130
    for each in managers:
        (genvm_id,) = (e["id"] for e in each.get("/genvm?state=running")["executions"])
        line = f"execution {genvm_id} goes on; genvm-manager stop {genvm_id} --server {url(each)}"
        assert f"{line} ends it\n" in done.stderr
        assert client(None, "stop", str(genvm_id), "--server", url(each)).returncode == 0


def test_a_manager_that_accepts_and_never_answers() -> None:
    """``wait`` keeps the time that it was given; see the units for the other commands."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"http://127.0.0.1:{listener.getsockname()[1]}"
        done = client(place, "wait", "1", "--timeout", "100ms")
    assert (done.returncode, done.stdout) == (7, "")
    assert "no answer within 5.1 s: the manager is stopped or overloaded" in done.stderr


def test_control_c_while_the_file_is_imported(daemon: Daemon) -> None:
    with started(daemon, "events") as events:
        maps = Path(f"/proc/{events.pid}/maps")
        eventually(lambda: "msgspec" in maps.read_text(), what="an import, of which many follow")
        events.send_signal(signal.SIGINT)
        done = end(events)
    assert done.returncode in (-signal.SIGINT, 130), "which is 130 to a shell, too"
    assert (done.stdout, done.stderr) == ("", "")


def test_a_reader_that_has_enough(daemon: Daemon) -> None:
    daemon.post("/permits", {"permits": 8})
    command = shlex.join(own_command("events", "--after", "0"))
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"],
        env={**os.environ, "GENVM_SERVER": url(daemon)},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.stdout.splitlines()[1:] == ["141"], "it ends, although nothing else happens"
    assert done.stderr == ""


# --- on a terminal ---


def test_on_a_terminal(daemon: Daemon) -> None:
    """A contract does not steer it, and who watches is told how far a run is."""
    steps = (f"print-hex {STEERING}0a", "wait-file {}", "exit 0")
    raw = client(daemon, "run", *flags(steps[0], "exit 0", timestamp=TIMESTAMP), "--wait")
    assert raw.stdout == bytes.fromhex(STEERING).decode("utf-8", "replace") + "\n"
    ours, theirs = pty.openpty()
    words = flags(steps[0], "sleep 600", timestamp=TIMESTAMP)
    with started(daemon, "run", *words, "--wait", stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        shown = b""
        while b"deadline in 0:19:" not in shown:
            assert select.select([ours], [], [], WAIT)[0], shown
            shown += os.read(ours, 65536)
        (entry,) = daemon.get("/genvm?state=running")["executions"]
        written = ("logs", str(entry["id"]))
        eventually(lambda: client(daemon, *written).stdout, what="it has said what steers")
        daemon.request("DELETE", f"/genvm/{entry['id']}")
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 65536):
                shown += piece
        assert run.wait(WAIT) == 6
    os.close(ours)
    assert rb"\x1b]0;x\x07" in shown
    assert b"\x1b]" not in shown
    assert shown.endswith(f"execution {entry['id']}: cancelled\r\n".encode())
