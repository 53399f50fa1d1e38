"""How the manager is started and configured: commands, listeners, refusals to start."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from genvm_manager import main, own_command

from .conftest import Start
from .support import (
    MARKER,
    PARENT,
    PROJECT,
    SOURCE,
    WAIT,
    Daemon,
    Pending,
    Root,
    alive,
    children_of,
    command_of,
    eventually,
    free_port,
    kill,
    processes_with,
    run_body,
    timed,
    within,
)


def command(*words: str, cwd: Path = PROJECT, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end: as ``genvm-manager`` does, or the file of another folder."""
    clean = {key: text for key, text in os.environ.items() if not key.startswith("GENVM")}
    is_ours = cwd == PROJECT
    return subprocess.run(
        own_command(*words) if is_ours else [sys.executable, str(cwd / SOURCE.name), *words],
        capture_output=True,
        text=True,
        timeout=2 * WAIT,
        cwd=cwd,
        env={**clean, **environ},
        check=False,
    )


TWISTD = Path(sys.executable).with_name("twistd")
#: Stands in for Python's module, whose lines go to the one syslog of the machine.
SYSLOG = """\
LOG_PID = 1
def openlog(prefix, options): print("opened", prefix, file=open({path!r}, "a"))
def syslog(line): print(line, file=open({path!r}, "a"))
"""


def runs_an_execution(daemon: Daemon) -> None:
    """Show that a daemon does its main job."""
    assert daemon.get("/status")["executions"] == {}
    result = daemon.result(daemon.run("print it works", "exit 3"))
    assert (result["stdout"], result["exit_code"], result["cause"]) == ("it works\n", 3, "exited")


# --- serve, twistd, manager ---


def test_a_client_of_an_earlier_start_never_meets_the_run_of_another(
    root: Root, start: Start
) -> None:
    seen: list[int] = []
    for _ in range(4):
        daemon = start("--permits", "10")  # not what memory allows
        for old in seen:
            for method in ("GET", "DELETE"):
                reply = daemon.request(method, f"/genvm/{old}")
                assert (reply.status, reply.json["code"]) == (404, "execution_not_found")
        ids = [daemon.run("sleep 600") for _ in range(3)]
        assert ids == sorted(ids)
        assert not seen or ids[0] > seen[-1], "they grow"
        assert ids[-1] < 2**53
        seen += ids
        daemon.signal(signal.SIGKILL)
        daemon.wait()


def has_tls(daemon: Daemon) -> bool:
    """Tell whether what speaks TLS is loaded."""
    return "cryptography" in Path(f"/proc/{daemon.pid}/maps").read_text()


@pytest.mark.parametrize("begins", ["script", "command", "installed"])
def test_serve_over_tcp(root: Root, begins: str) -> None:
    words = ["serve", "--root", str(root.path), "--port", "0"]
    argv = own_command(*words)
    if begins == "script":
        argv = [sys.executable, str(SOURCE), *words]
    elif begins == "installed":
        argv = [str(Path(sys.executable).with_name("genvm-manager")), *words]
    daemon = Daemon(argv)
    try:
        daemon.wait_until_listening()
        assert not has_tls(daemon)
        assert daemon.address.startswith("127.0.0.1:")
        runs_an_execution(daemon)
        assert daemon.stop() == 0
        assert daemon.errors == ""
        for record in daemon.records:
            assert {"time", "level", "message"} <= set(record)
        assert len(daemon.text.splitlines()) == len(daemon.records), "every line is JSON"
    finally:
        daemon.close()


def test_what_nobody_needs_yet_is_not_loaded(start: Start) -> None:
    """TLS takes 12 MiB: it comes with the first server that is asked."""
    daemon = start()
    assert not has_tls(daemon)
    config = {"provider": "openai-compatible", "key": "k", "model": "m"}
    prompts = [{"user_message": "OK?", "temperature": 0.0, "max_tokens": 1}]
    config["host"] = f"https://127.0.0.1:{free_port()}"
    (found,) = daemon.post("/llm/check", {"configs": [config], "test_prompts": prompts})
    assert found["error_kind"] == "connect"
    assert has_tls(daemon)


def test_serve_over_a_unix_socket(root: Root, start: Start) -> None:
    path = root.path / "m.sock"
    daemon = start(listen=("--socket", str(path)))
    assert daemon.address == f"unix://{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    runs_an_execution(daemon)
    assert daemon.stop() == 0
    assert not path.exists()


def test_serve_over_both(root: Root, start: Start) -> None:
    path = root.path / "m.sock"
    daemon = start("--socket", str(path))
    tcp = daemon.wait_log(lambda r: r["message"] == "listening" and "://" not in r["address"])
    boot_ids = set()
    for address in (f"unix://{path}", tcp["address"]):
        daemon.address = address
        boot_ids.add(daemon.get("/status")["boot_id"])
    assert len(boot_ids) == 1


def test_a_stale_socket_is_replaced(root: Root, start: Start) -> None:
    path = root.path / "m.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    daemon = start(listen=("--socket", str(path)))
    runs_an_execution(daemon)


def test_a_stale_socket_of_a_killed_manager_is_replaced(root: Root, start: Start) -> None:
    path = root.path / "m.sock"
    first = start(listen=("--socket", str(path)))
    first.process.kill()
    first.wait()
    second = start(listen=("--socket", str(path)))
    runs_an_execution(second)


def test_a_live_socket_is_refused(root: Root, start: Start) -> None:
    path = root.path / "m.sock"
    first = start(listen=("--socket", str(path)))
    done = command("serve", "--root", str(root.path), "--socket", str(path))
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "--socket" in done.stderr
    assert "Traceback" not in done.stderr
    runs_an_execution(first)


def test_a_file_in_the_place_of_the_socket_is_kept(root: Root) -> None:
    path = root.path / "precious"
    path.write_text("keep me")
    done = command("serve", "--root", str(root.path), "--socket", str(path))
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_text() == "keep me"


@pytest.mark.parametrize("listener", ["tcp", "unix"])
def test_twistd(root: Root, listener: str) -> None:
    path = root.path / "m.sock"
    listen = {} if listener == "tcp" else {"PORT": "", "SOCKET": str(path)}
    daemon = Daemon.twistd(root, PERMITS="3", **listen)
    try:
        daemon.wait_until_listening()
        assert daemon.address.startswith("127.0.0.1:" if listener == "tcp" else "unix://")
        assert daemon.get("/permits")["permits"] == 3
        runs_an_execution(daemon)
        daemon.run("sleep 600")
        daemon.signal(signal.SIGINT if listener == "tcp" else signal.SIGTERM)
        assert daemon.wait() == 0
        assert daemon.descendants() == []
        assert not path.exists()
        assert len(daemon.text.splitlines()) == len(daemon.records), daemon.text
    finally:
        daemon.close()


def test_twistd_in_the_background(root: Root) -> None:
    """It detaches, logs to its file, and takes its executors along even when it is killed."""
    log, pidfile, marker = root.path / "m.log", root.path / "m.pid", f"{MARKER}={uuid.uuid4()}"
    settings = {"ROOT": root.path, "SOCKET": root.path / "m.sock", "LOG_FILE": log}
    environ = {f"GENVM_MANAGER_{name}": str(path) for name, path in settings.items()}
    try:
        subprocess.run(
            [str(TWISTD), f"--pidfile={pidfile}", "-y", "twistd.tac"],
            check=True,
            timeout=2 * WAIT,
            cwd=PROJECT,
            env={**os.environ, **environ, **dict((marker.split("=", 1),))},
        )
        eventually(lambda: log.exists() and '"listening"' in log.read_text(), what="it listens")
        pid = int(pidfile.read_text())
        up = root.path / "up"
        body = run_body("ignore-sigterm", f"touch {up}", "sleep 600")
        reply = Pending(f"unix://{settings['SOCKET']}", "POST", "/genvm/run", body).reply()
        assert reply.json["result"] == "started"
        eventually(up.exists)
        assert len(processes_with(marker)) == 2, "the manager and its executor"
        kill(pid)
        within(1.0, lambda: not processes_with(marker), "kill -9 of twistd in the background")
    finally:
        for pid in processes_with(marker):
            kill(pid)


def test_twistd_with_a_bad_configuration(root: Root) -> None:
    daemon = Daemon.twistd(root, PERMITS="many")
    try:
        assert daemon.wait() == 1
        assert "GENVM_MANAGER_PERMITS" in daemon.text + daemon.errors
        assert '"many"' in daemon.text + daemon.errors
    finally:
        daemon.close()


@pytest.mark.parametrize("option", ["--logfile=m.log", "-lm.log", "--logfile=-", "--syslog"])
def test_twistd_decides_where_the_log_goes(root: Root, tmp_path: Path, option: str) -> None:
    """Its option wins over the setting; the format is ours."""
    spoken, log = tmp_path / "syslog", tmp_path / "m.log"
    (tmp_path / "syslog.py").write_text(SYSLOG.format(path=str(spoken)))
    setting = tmp_path / "setting.log"
    environ = {
        "ROOT": str(root.path),
        "SOCKET": str(root.path / "m.sock"),
        "LOG_FILE": str(setting),
    }
    daemon = Daemon(
        [str(TWISTD), "-noy", str(PROJECT / "twistd.tac"), "--prefix=node", option],
        environ={
            "PYTHONPATH": str(tmp_path),
            **{f"GENVM_MANAGER_{name}": text for name, text in environ.items()},
        },
        cwd=tmp_path,
    )
    try:
        if option == "--logfile=-":
            daemon.wait_until_listening()
            assert not log.exists()
        else:
            file = spoken if option == "--syslog" else log
            eventually(lambda: file.exists() and '"listening"' in file.read_text())
            assert daemon.text == ""
            lines = file.read_text().splitlines()
            if option == "--syslog":
                assert lines.pop(0) == "opened node"
            assert all(json.loads(line)["level"] for line in lines)
        assert not setting.exists()
    finally:
        daemon.close()


def in_the_background(
    root: Root, *options: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Let twistd go into the background; return what reaches whoever starts it."""
    settings = {"ROOT": str(root.path), **settings}
    environ = {f"GENVM_MANAGER_{name}": text for name, text in settings.items()}
    return subprocess.run(
        [str(TWISTD), f"--pidfile={root.path}/m.pid", *options, "-y", "twistd.tac"],
        capture_output=True,
        text=True,
        timeout=2 * WAIT,
        check=False,
        cwd=PROJECT,
        env={**os.environ, **environ},
    )


def test_twistd_in_the_background_says_whole_why_it_does_not_start(root: Root) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = in_the_background(root, f"--logfile={root.path}/m.log", PORT=port)
    assert done.returncode == 1
    assert f"genvm-manager: cannot listen on 127.0.0.1:{port}: " in done.stderr
    assert "choose another --port, --socket or --listen\n" in done.stderr
    root.manifest.write_text("executor_versions:\n  v0.1.0: {available_after: soon}\n" + 50 * "#")
    done = in_the_background(root, f"--logfile={root.path}/m.log", PORT="0")
    assert done.returncode == 1
    assert "genvm-manager: manifest.yaml:2: v0.1.0.available_after: " in done.stderr
    done = in_the_background(root, "--logfile=-", PORT="0")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--logfile=-: a daemon has no stdout" in done.stderr


def test_twistd_with_a_port_in_use(root: Root) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        daemon = Daemon.twistd(root, PORT=port)
        try:
            assert daemon.wait() == 1
            assert f"127.0.0.1:{port}" in daemon.text + daemon.errors
        finally:
            daemon.close()


@pytest.mark.parametrize("step", ["log info up", "ignore-sigterm"])
def test_die_with_parent(root: Root, step: str) -> None:
    """As nodes start it: ``manager --port N --die-with-parent``; then the node is killed.

    An executor that ignores SIGTERM has 0.7 s; the goal is one second for all of them.
    """
    arguments = ["manager", "--port", "0", "--die-with-parent", "--root", str(root.path)]
    arguments += ["--permits", "5"]  # however little memory is left here
    parent = Daemon([sys.executable, "-c", PARENT, sys.executable, str(SOURCE), *arguments])
    manager = guardian = 0
    try:
        parent.wait_until_listening()
        manager = eventually(lambda: children_of(parent.pid))[0]
        assert "--die-with-parent" in command_of(manager)
        guardians = [pid for pid in children_of(manager) if "guard_desc" in command_of(pid)]
        guardian = guardians[0]
        for number in range(5):
            parent.run(step, f"touch {root.path}/{number}", "sleep 600")
        eventually(lambda: all((root.path / str(number)).exists() for number in range(5)))
        parent.process.kill()
        within(1.0, lambda: not parent.descendants(), f"die-with-parent ({step}): all are gone")
        eventually(lambda: not alive(guardian), what="the guardian is gone")
    finally:
        for pid in (manager, guardian):
            if pid:
                kill(pid)
        parent.close()


def test_a_parent_that_ends_before_the_start_is_noticed(root: Root) -> None:
    """It is known since the first lines of the program, which reads its settings later."""
    settings = root.path / "settings"
    os.mkfifo(settings)
    arguments = ["manager", "--port", "0", "--die-with-parent", "--root", str(root.path)]
    argv = [sys.executable, str(SOURCE), *arguments, "--config", str(settings)]
    parent = Daemon([sys.executable, "-c", PARENT, *argv])
    try:
        with settings.open("w") as file:  # once it is opened for reading
            parent.process.kill()
            parent.process.wait()
            assert parent.descendants()
            file.write("{}")
        eventually(lambda: not parent.descendants(), what="it ends at once")
    finally:
        parent.close()


def test_without_die_with_parent_it_lives_on(root: Root) -> None:
    arguments = ["serve", "--port", "0", "--root", str(root.path)]
    parent = Daemon([sys.executable, "-c", PARENT, sys.executable, str(SOURCE), *arguments])
    manager = 0
    try:
        parent.wait_until_listening()
        manager = children_of(parent.pid)[0]
        parent.process.kill()
        parent.process.wait()
        runs_an_execution(parent)
    finally:
        if manager:
            kill(manager, signal.SIGTERM)
            eventually(lambda: not alive(manager))
        parent.close()


# --- refusals to start ---


def test_port_in_use(root: Root) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = command("serve", "--root", str(root.path), "--port", str(port))
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("config", "{pipe}"),
        ("auth-token-file", "{pipe}"),
        ("log-file", "{pipe}"),
        ("listen", "ssl:0:interface=127.0.0.1:privateKey={pipe}"),
        ("listen", "ssl:0:interface=127.0.0.1:privateKey=/dev/null:certKey={pipe}"),
    ],
)
def test_a_file_that_never_answers(root: Root, setting: str, value: str) -> None:
    """A pipe with nobody at its other end does what a dead disk does: it holds whoever opens it."""
    pipe = root.path / "pipe"
    os.mkfifo(pipe)
    pipe.chmod(0o600)
    words = ["--root", str(root.path), "--port", "0", f"--{setting}", value.format(pipe=pipe)]
    done = command("serve", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"genvm-manager: .*{pipe}.* cannot be .*\n", done.stderr)
    assert "no answer within 10 s: it is a pipe" in done.stderr


def test_a_pipe_that_somebody_writes(root: Root) -> None:
    """As ``--config <(...)`` of a shell: what comes in time is read."""
    settings = root.path / "settings"
    os.mkfifo(settings)
    words = ["--root", str(root.path), "--config", str(settings)]
    with subprocess.Popen([sys.executable, str(SOURCE), "check-config", *words]) as process:
        with settings.open("w") as file:  # once it is opened for reading
            file.write("permits: 3\n")
        assert process.wait(WAIT) == 0


@pytest.mark.parametrize(
    "words", [("doctor",), ("check-config",), ("practice-root", "new"), ("demo",)]
)
def test_nobody_reads_what_is_printed(root: Root, words: tuple[str, ...]) -> None:
    more = ["--root", str(root.path)] if words[0] in ("doctor", "check-config") else []
    read_end, write_end = os.pipe()
    os.close(read_end)
    full, why = (
        os.open("/dev/full", os.O_WRONLY),
        "genvm-manager: stdout: No space left on device\n",
    )
    for stdout, said, unbuffered in ((write_end, "", ""), (full, why, ""), (write_end, "", "1")):
        done = subprocess.run(
            [sys.executable, str(SOURCE), *words, *more],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=2 * WAIT,
            cwd=root.path,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered, "TMPDIR": str(root.path)},
            check=False,
        )
        assert (done.returncode, done.stderr) == (141, said)
    assert [*root.path.glob("genvm-demo-*")] == []
    for fd in (full, write_end):
        os.close(fd)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_beyond_loopback_needs_a_token_or_consent(root: Root, host: str) -> None:
    done = command("serve", "--root", str(root.path), "--port", "0", "--host", host)
    assert done.returncode == 1
    assert host in done.stderr
    assert "auth_token_file" in done.stderr
    assert "--allow-unauthenticated" in done.stderr


def test_beyond_loopback_with_consent(start: Start) -> None:
    daemon = start("--host", "0.0.0.0", "--allow-unauthenticated")
    daemon.address = daemon.address.replace("0.0.0.0", "127.0.0.1")
    runs_an_execution(daemon)


BAD_SETTINGS = {
    "permits": ["many", '"many"'],
    "queue_limit": ["true", "true"],
    "max_body_bytes": ["-1", "-1"],
    "capture_max_bytes": ["1.5", "1.5"],
    "retention_max_bytes": ["'10'", '"10"'],
    "port": ["65536", "65536"],
    "log_level": ["loud", '"loud"'],
    "log_format": ["xml", '"xml"'],
    "execution_retention": ["soon", '"soon"'],
    "shutdown_grace": ["-1", "-1"],
    "env_allow": ["PATH", "expected an array"],
    "log_levle": ["info", "unknown key"],
    "die_with_parent": ["maybe", '"maybe"'],
    "root": ["${NOPE}", "NOPE"],
}


@pytest.mark.parametrize("subcommand", ["serve", "check-config"])
def test_bad_settings(root: Root, subcommand: str) -> None:
    """Exit 1 with file, key and reason of everything that is wrong; nothing is started."""
    path = root.path / "config" / "genvm-manager.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, (value, _) in BAD_SETTINGS.items()))
    done = command(subcommand, "--root", str(root.path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    problems = done.stderr.removeprefix("genvm-manager: ").split("; ")
    for key, (_, reason) in BAD_SETTINGS.items():
        (problem,) = [text for text in problems if text.startswith(f"{path}: {key}: ")]
        assert reason in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("permits: 1000001", ["permits", "1000001"]),
        ("manifest_path: /nonexistent/m.yaml", ["manifest_path", "/nonexistent/m.yaml"]),
        ("reroute_to: v9", ["reroute_to", "v9"]),
        ("host: 0.0.0.0", ["host", "auth_token_file"]),
        ("- a\n- b", ["mapping"]),
        ("a: [", ["YAML"]),
        ("just sk-secret", ["mapping"]),
        ("port: 1\nkey: *sk-secret", ["line 2: found undefined alias"]),
        ("port: 1\nkey: [sk-secret", ["line 2: expected ',' or ']'"]),
    ],
)
def test_bad_configuration_file(
    root: Root, capsys: pytest.CaptureFixture[str], text: str, expected: list[str]
) -> None:
    path = root.path / "config" / "genvm-manager.yaml"
    path.write_text(text)
    assert main(["check-config", "--root", str(root.path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in (str(path), *expected):
        assert part in printed.err
    assert "sk-secret" not in printed.err


@pytest.mark.parametrize("subcommand", ["serve", "check-config"])
def test_a_missing_token_file(root: Root, subcommand: str) -> None:
    flags = ["--root", str(root.path), "--auth-token-file", "/nonexistent/token"]
    done = command(subcommand, *flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert "/nonexistent/token" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        (
            ["--permits", "x", "--queue-limit", "-1", "--die-with-parent=perhaps"],
            {"GENVM_MANAGER_PORT": "none"},
            [
                *("--permits", '"x"', "--queue-limit", "-1", "--die-with-parent", "perhaps"),
                *("GENVM_MANAGER_PORT", "none"),
            ],
        ),
        (["--config", "/nonexistent.yaml"], {}, ["/nonexistent.yaml"]),
        (["--manifest-path", "/nonexistent.yaml"], {}, ["manifest", "/nonexistent.yaml"]),
        ([], {"GENVM_MANAGER_CONFIG": "/nonexistent.yaml"}, ["/nonexistent.yaml"]),
    ],
)
def test_bad_flags_and_environment(
    root: Root,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    environ: dict[str, str],
    expected: list[str],
) -> None:
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    assert main(["check-config", "--root", str(root.path), *flags]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in expected:
        assert part in printed.err


@pytest.mark.parametrize("words", [[], ["nonsense"], ["serve", "--nonsense"], ["serve", "--port"]])
def test_bad_command_lines(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage:" in capsys.readouterr().err


def test_a_bad_manifest_stops_the_start(root: Root) -> None:
    root.manifest.write_text("executor_versions:\n  v0.1.0: {available_after: soon}\n")
    for subcommand in ("serve", "check-config"):
        done = command(subcommand, "--root", str(root.path))
        assert done.returncode == 1
        assert "manifest.yaml:2" in done.stderr
        assert "soon" in done.stderr


# --- configuration in force ---


def test_precedence_flag_environment_file(root: Root, start: Start) -> None:
    (root.path / "config" / "genvm-manager.yaml").write_text(
        "permits: 3\nqueue_limit: 0\nlog_level: warn\n"
    )
    environ = {"GENVM_MANAGER_PERMITS": "4", "GENVM_MANAGER_LOG_LEVEL": "info"}
    daemon = start("--permits", "5", environ=environ)
    assert daemon.get("/permits")["permits"] == 5
    assert daemon.post("/log/level", {"level": "info"})["level"] == "info"
    daemon.post("/permits", {"permits": 0})
    assert daemon.request("POST", "/genvm/run", run_body()).json["code"] == "queue_full"


def test_existing_configuration_files_load(root: Root, start: Start) -> None:
    path = root.path / "elsewhere.yaml"
    manifest = root.path / "other-manifest.yaml"
    root.manifest.rename(manifest)
    path.write_text(
        "threads: 4\nblocking_threads: 16\nlog_disable: tracing*,polling*\nlog_level: info\n"
        "manifest_path: ${genvmRoot}/other-manifest.yaml\npermits: null\n"
    )
    daemon = start("--config", str(path))
    for key in ("threads", "blocking_threads", "log_disable"):
        notes = [r for r in daemon.records if f": {key} has no effect" in r["message"]]
        assert len(notes) == 1
    assert daemon.get("/permits")["permits"] >= 2
    runs_an_execution(daemon)


def test_nothing_configured(tmp_path: Path, root: Root, start: Start) -> None:
    """It starts, says in the log and in /status that there is no executor, and refuses runs."""
    root.manifest.unlink()
    daemon = start()
    daemon.wait_log(lambda r: r["level"] == "warn" and "manifest.yaml" in r["message"])
    assert "manifest.yaml" in daemon.get("/status")["manifest"]["problem"]
    reply = daemon.request("POST", "/genvm/run", run_body())
    assert (reply.status, reply.json["code"]) == (500, "version_not_available")
    assert "no version at all" in reply.json["error"]


def test_root_from_the_environment(root: Root) -> None:
    done = command("check-config", GENVMROOT=str(root.path))
    assert done.returncode == 0
    assert done.stdout.endswith("1 executor version\n")


def test_root_is_the_parent_of_bin(root: Root) -> None:
    (root.path / "bin").mkdir()
    shutil.copy(SOURCE, root.path / "bin")
    done = command("check-config", cwd=root.path / "bin")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("1 executor version\n")


def test_text_log(root: Root) -> None:
    argv = [sys.executable, str(SOURCE), "serve", "--port", "0", "--root", str(root.path)]
    daemon = Daemon([*argv, "--log-format", "text"])
    try:
        eventually(lambda: "listening" in daemon.text)
        assert daemon.stop() == 0
        assert not daemon.records
        assert " info  listening" in daemon.text
    finally:
        daemon.close()


def test_log_file(root: Root, start: Start) -> None:
    path = root.path / "log" / "manager.log"
    path.parent.mkdir()
    argv = [sys.executable, str(SOURCE), "serve", "--root", str(root.path)]
    socket_path = root.path / "m.sock"
    daemon = Daemon([*argv, "--socket", str(socket_path), "--log-file", str(path)])
    try:
        eventually(lambda: path.exists() and "listening" in path.read_text())
        daemon.address = f"unix://{socket_path}"
        runs_an_execution(daemon)
        assert daemon.stop() == 0
        messages = [json.loads(line)["message"] for line in path.read_text().splitlines()]
        assert "execution finished" in messages
        assert "stopped" in messages
        assert daemon.text == ""
    finally:
        daemon.close()


# --- check-config, demo, the file alone ---


def test_check_config(root: Root) -> None:
    done = command("check-config", "--root", str(root.path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "configuration is valid; 1 executor version\n" in done.stdout


def test_strict_check_config_fails_where_there_is_a_note(root: Root) -> None:
    path = root.path / "config" / "genvm-manager.yaml"
    path.write_text("port: 4000\n")
    done = command("check-config", "--strict", "--root", str(root.path))
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text("threads: 4\n")
    assert command("check-config", "--root", str(root.path)).returncode == 0
    done = command("check-config", "--root", str(root.path), "--strict")
    assert (done.returncode, done.stdout) == (1, "")
    assert "threads has no effect" in done.stderr


@pytest.mark.parametrize("subcommand", ["serve", "check-config"])
@pytest.mark.parametrize("source", ["--root", "GENVM_MANAGER_ROOT", "GENVMROOT", "the file"])
def test_a_root_that_is_named_must_exist(tmp_path: Path, subcommand: str, source: str) -> None:
    gone, settings = tmp_path / "gone", tmp_path / "settings.yaml"
    settings.write_text(f"root: {gone}\n" if source == "the file" else "")
    words = [subcommand, "--config", str(settings)]
    if source.startswith("GENVM"):
        done = command(*words, cwd=PROJECT, **{source: str(gone)})
    else:
        done = command(*words, *(["--root", str(gone)] if source == "--root" else []))
    assert (done.returncode, done.stdout) == (1, "")
    origin = f"{settings}: root" if source == "the file" else source
    assert f"{origin}: {gone} is not a folder; name " in done.stderr


# --- first minutes ---


@pytest.mark.parametrize("name", ["genvm_manager.py", "genvm-manager"])
def test_an_older_python_is_told_in_one_sentence(tmp_path: Path, name: str) -> None:
    """The file compiles there; the check is its first statement that needs more than that."""
    ast.parse(SOURCE.read_text(), feature_version=(3, 8))
    shutil.copy(SOURCE, tmp_path / name)
    program = tmp_path / "older.py"
    program.write_text(
        "import runpy, sys\n"
        "sys.version_info = (3, 10, 4, 'final', 0)\n"
        f"sys.argv = [{name!r}, 'serve', '--root', 'a b']\n"
        "sys.orig_argv = [sys.executable, *sys.argv]\n"
        f"runpy.run_path({name!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=2 * WAIT,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "needs Python 3.11 or newer" in done.stderr
    assert " is 3.10.4;" in done.stderr
    assert done.stderr.endswith(f"uv run {tmp_path / name} serve --root 'a b'\n")


def test_a_python_without_the_packages_is_told_in_one_sentence() -> None:
    argv = [sys.executable, "-I", "-S", str(SOURCE), "check-config"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=2 * WAIT)
    done = run(argv, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "needs OpenSSL, attrs, klein, " in done.stderr
    assert done.stderr.endswith(f"uv run {SOURCE} check-config\n")
    code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import genvm_manager"
    done = run([sys.executable, "-I", "-S", "-c", code], check=False)
    assert done.stderr.splitlines()[-1].startswith("ImportError: genvm-manager needs OpenSSL, ")


def test_a_practice_root_says_what_it_is_and_what_to_do_next(tmp_path: Path) -> None:
    folder = tmp_path / "a root"
    done = command("practice-root", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    made, advice = done.stdout.splitlines()
    assert made.startswith(f"made {folder}: ")
    assert "practice executor" in made
    daemon = Daemon([*shlex.split(advice.partition(": ")[2]), "--port", "0"])
    try:
        daemon.wait_until_listening()
        runs_an_execution(daemon)
    finally:
        daemon.close()


@pytest.mark.parametrize("listener", ["tcp", "unix"])
def test_on_a_terminal_serve_says_where_it_listens_and_how_to_try_that(
    root: Root, listener: str
) -> None:
    token = root.path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    listen = ["--port", "0"] if listener == "tcp" else ["--socket", str(root.path / "m.sock")]
    argv = [sys.executable, str(SOURCE), "serve", "--root", str(root.path), *listen]
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            [*argv, "--auth-token-file", str(token)], stdout=subprocess.DEVNULL, stderr=theirs
        )
        os.close(theirs)
        try:
            line = terminal.read(4096).decode()
            while "\n" not in line:
                line += terminal.read(4096).decode()
            said, _, advice = line.partition("; try: ")
            assert said.startswith("listening on ")
            assert "Ctrl-C" in said
            done = subprocess.run(
                ["sh", "-c", advice.strip()],
                capture_output=True,
                text=True,
                timeout=2 * WAIT,
                check=False,
            )
            assert json.loads(done.stdout)["executions"] == {}, done.stderr
            process.send_signal(signal.SIGINT)
            assert process.wait(WAIT) == 0
        finally:
            process.kill()
            process.wait()


def test_demo() -> None:
    begin = time.monotonic()
    done = command("demo")
    timed("demo", time.monotonic() - begin, 10.0)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("> POST /genvm/run") == 2
    last = done.stdout.splitlines()[-1]
    assert last.startswith("The contract returned:")
    assert "Hello" in last
    assert "world" in last


def test_the_file_alone(tmp_path: Path) -> None:
    """Copied into an empty folder it checks its configuration and runs the demo."""
    shutil.copy(SOURCE, tmp_path)
    checked = command("check-config", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "does not exist" in checked.stdout
    demo = command("demo", cwd=tmp_path)
    assert demo.returncode == 0, demo.stderr
    assert "The contract returned:" in demo.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == [SOURCE.name]


def test_reroute(root: Root, start: Start) -> None:
    """The version directory is replaced; it needs no manifest entry."""
    root.practice("local-build")
    root.write_manifest({})
    daemon = start("--reroute-to", "local-build")
    genvm_id = daemon.run("exit 0", major=7)
    assert daemon.get("/status")["executions"][str(genvm_id)]["version"] == "local-build"
    assert daemon.result(genvm_id)["version"] == "local-build"
