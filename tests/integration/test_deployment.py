"""What the manager and a service manager have to do with each other: sockets, TLS, signals, units.

systemd itself does not run here. Its side is played as it documents it: sockets from descriptor 3
on, datagrams to ``NOTIFY_SOCKET``; and its own ``systemd-analyze`` judges README's unit.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genvm_manager import __version__, own_command

from .conftest import Start, write_certificate
from .support import PROJECT, SOURCE, WAIT, Daemon, Root, eventually, run_body, shell

TEXT = (PROJECT / "README.md").read_text(encoding="utf-8")
LOOPBACK = ":interface=127.0.0.1"
TOKEN, NEXT_TOKEN = "first-token-of-the-manager", "second-token-of-the-manager"


def command(root: Root, *flags: str) -> list[str]:
    return own_command("serve", "--root", str(root.path), *flags)


def addresses(daemon: Daemon) -> list[str]:
    return [record["address"] for record in daemon.records if record["message"] == "listening"]


# --- listen ---


def test_several_places_and_none_that_nobody_asked_for(root: Root, start: Start) -> None:
    own, shared = root.path / "a:b=c", root.path / "shared"
    escaped = str(own).replace(":", r"\:").replace("=", r"\=")
    places = f"unix:{escaped},tcp:0{LOOPBACK},unix:{shared}:mode=660"
    daemon = start(listen=("--listen", places))
    daemon.wait_log(lambda record: record.get("address") == f"unix://{shared}")
    tcp, *unix = addresses(daemon)
    assert unix == [f"unix://{own}", f"unix://{shared}"]
    assert tcp.startswith("127.0.0.1:") and not tcp.endswith(":3999")
    assert stat.S_IMODE(own.stat().st_mode) == 0o600, "as the setting socket has it"
    assert stat.S_IMODE(shared.stat().st_mode) == 0o660
    for daemon.address in (tcp, *unix):
        assert daemon.get("/livez") == {"result": "alive"}
    assert daemon.stop() == 0
    assert [own.exists(), shared.exists()] == [False, False]


def test_of_managers_at_one_endpoint_one_serves(root: Root) -> None:
    path = root.path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    daemons = [Daemon(command(root, "--listen", f"unix:{path}")) for _ in range(3)]
    try:
        eventually(
            lambda: [daemon.process.poll() for daemon in daemons].count(None) == 1,
            what="all but one end",
        )
        (survivor,) = (daemon for daemon in daemons if daemon.process.poll() is None)
        survivor.wait_until_listening()
        assert survivor.get("/livez") == {"result": "alive"}
        for other in daemons:
            if other is not survivor:
                assert other.process.returncode == 1
                assert f"cannot listen on {path}" in other.errors
        assert survivor.stop() == 0
        assert not path.exists()
    finally:
        for daemon in daemons:
            daemon.close()


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("systemd:domain=UNIX:index=0", "start the .socket unit"),
        ("systemd:domain=UNIX:name=web", "start the .socket unit"),
        ("systemd:domian=UNIX", "domian"),
        ("ssl:0:privateKey={root}/none.pem" + LOOPBACK, "/none.pem cannot be read: No such file"),
        ("ssl:0:privateKey={root}/data/manifest.yaml" + LOOPBACK, "that keys are PEM files"),
        ("ssl:0" + LOOPBACK, "expected tcp:PORT"),
        ("tcp:70000" + LOOPBACK, "expected tcp:PORT"),
        ("tcp:{taken}" + LOOPBACK, "cannot listen on 127.0.0.1:{taken}"),
        ("unix:{root}/gone/s", "No such file or directory"),
        ("unix:{root}/s\\", "expected tcp:PORT"),
        ("stdio:", "expected tcp:PORT"),
        ("tcp:0", "every address is reachable from other machines; set auth_token_file"),
    ],
)
def test_a_place_that_cannot_be(root: Root, endpoint: str, said: str) -> None:
    """It ends before it serves anywhere, says what to do, and leaves nothing behind."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"root": root.path, "taken": taken.getsockname()[1]}
        done = subprocess.run(
            command(root, "--listen", f"unix:{root.path}/first,{endpoint.format(**names)}"),
            capture_output=True,
            text=True,
            timeout=2 * WAIT,
            check=False,
        )
    assert done.returncode == 1
    assert said.format(**names) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (root.path / "first").exists()


# --- sockets of systemd ---

LAUNCH = """
import os, sys
fds, names = sys.argv[1].split(","), sys.argv[2]
for number, fd in enumerate(fds, 3):
    os.dup2(int(fd), number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names)
os.execv(sys.argv[3], sys.argv[3:])
"""


@contextlib.contextmanager
def activated(root: Root, sockets: dict[str, socket.socket], *flags: str) -> Iterator[Daemon]:
    """A manager that gets sockets as systemd hands them over."""
    # High ones: none is overwritten before it has its place.
    fds = [fcntl.fcntl(item, fcntl.F_DUPFD, 100) for item in sockets.values()]
    launch = [sys.executable, "-c", LAUNCH, ",".join(map(str, fds)), ":".join(sockets)]
    # As a script, which replaces itself: the sockets stay open meanwhile, and its pid is the same.
    script = [sys.executable, str(SOURCE), "serve", "--root", str(root.path)]
    daemon = Daemon([*launch, *script, *flags], pass_fds=fds)
    try:
        for fd in fds:
            os.close(fd)
        yield daemon
    finally:
        daemon.close()


def test_sockets_of_systemd_outlive_the_manager(root: Root) -> None:
    """Who connects meanwhile waits; the file of a socket keeps its mode and stays."""
    path = root.path / "s"
    tcp = socket.create_server(("127.0.0.1", 0))
    with tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        path.chmod(0o640)
        unix.listen()
        places = "systemd:domain=UNIX:name=api,systemd:domain=INET:index=0"
        sockets = {"web": tcp, "api": unix}
        waiting = socket.create_connection(tcp.getsockname())
        waiting.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(2):
            with activated(root, sockets, "--listen", places) as daemon:
                with waiting:
                    waiting.settimeout(2 * WAIT)
                    assert waiting.recv(15) == b"HTTP/1.1 200 OK"
                expected = {f"unix://{path}", f"127.0.0.1:{tcp.getsockname()[1]}"}
                daemon.wait_log(lambda record: record.get("address", "").startswith("unix"))
                assert {*addresses(daemon)} == expected
                daemon.address = f"unix://{path}"
                environment = daemon.result(daemon.run("exit 0"))
                assert environment["exit_code"] == 0
                assert daemon.stop() == 0
            assert stat.S_IMODE(path.stat().st_mode) == 0o640
            waiting = socket.create_connection(tcp.getsockname())
            waiting.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        waiting.close()


def test_a_socket_of_systemd_that_others_reach_needs_a_token(root: Root) -> None:
    with socket.create_server(("0.0.0.0", 0)) as tcp:  # the account needs no right for that
        flags = ("--listen", "systemd:domain=INET:index=0")
        with activated(root, {"web": tcp}, *flags) as daemon:
            assert daemon.wait() == 1
            assert "0.0.0.0 is reachable from other machines; set auth_token_file" in daemon.errors
        with activated(root, {"web": tcp}, *flags, "--allow-unauthenticated") as daemon:
            daemon.wait_until_listening()
            daemon.address = f"127.0.0.1:{tcp.getsockname()[1]}"
            assert daemon.get("/livez") == {"result": "alive"}


# --- TLS ---


def served_certificate(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=2 * WAIT)


def test_tls(start: Start, tmp_path: Path) -> None:
    """It serves what a port serves; SIGHUP takes a new certificate, and no broken one."""
    pair = tmp_path / "pair.pem"
    write_certificate(pair)
    trusting = ssl.create_default_context(cafile=str(pair))
    trusting.set_alpn_protocols(["h2", "http/1.1"])
    daemon = start(listen=("--listen", f"ssl:0:privateKey={pair}{LOOPBACK}"))
    assert daemon.address.startswith("https://127.0.0.1:")
    port = daemon.address.rpartition(":")[2]
    connection = http.client.HTTPSConnection(
        "127.0.0.1", int(port), context=trusting, timeout=2 * WAIT
    )
    for _ in range(2):
        connection.request("POST", "/genvm/run", json.dumps(run_body("print fine")))
        answer = json.load(connection.getresponse())
        connection.request("GET", f"/genvm/{answer['id']}?wait=30s")
        assert json.load(connection.getresponse())["status"]["stdout"] == "fine\n"
    assert isinstance(connection.sock, ssl.SSLSocket)
    assert connection.sock.selected_alpn_protocol() != "h2"
    connection.request("GET", "/status", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 403
    connection.close()

    first = served_certificate(int(port))
    pair.write_text("no key")
    daemon.signal(signal.SIGHUP)
    daemon.wait_log(lambda record: "that keys are PEM files" in record["message"])
    assert served_certificate(int(port)) == first
    write_certificate(pair)
    daemon.signal(signal.SIGHUP)
    eventually(lambda: served_certificate(int(port)) != first, what="the new certificate")
    with socket.create_connection(("127.0.0.1", int(port)), 45) as plain:
        plain.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert not plain.recv(100).startswith(b"HTTP"), "nothing in the clear"
    assert daemon.stop() == 0


def test_a_stranger_that_does_not_close_its_side_of_tls(start: Start, tmp_path: Path) -> None:
    """Refused, it is hung up on, although TLS would wait for its goodbye."""
    pair, token = tmp_path / "pair.pem", tmp_path / "token"
    write_certificate(pair)
    token.write_text(TOKEN)
    token.chmod(0o600)
    place = f"ssl:0:privateKey={pair}{LOOPBACK}"
    daemon = start("--auth-token-file", str(token), listen=("--listen", place))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=str(pair))
    tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    port = int(daemon.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 45) as bare:

        def until_done(step: Callable[[], Any]) -> Any:
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    done = step()
                    bare.sendall(outgoing.read())
                    return done
                bare.sendall(outgoing.read())
                incoming.write(bare.recv(1 << 16))

        until_done(tls.do_handshake)
        until_done(lambda: tls.write(b"POST /permits HTTP/1.1\r\nContent-Length: 9\r\n\r\n"))
        assert until_done(lambda: tls.read(12)) == b"HTTP/1.1 401"
        # What follows is read and not answered: no more than the end of the connection.
        with contextlib.suppress(ConnectionResetError):
            while bare.recv(1 << 16):
                pass


# --- what systemd hears ---


class Ear:
    """The socket in ``NOTIFY_SOCKET``, at a path or at an abstract address."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.heard: list[dict[str, str]] = []

    def next(self, timeout: float = WAIT) -> dict[str, str]:
        """Return the next datagram."""
        self.socket.settimeout(timeout)
        lines = self.socket.recv(4096).decode().splitlines()
        self.heard.append(dict(line.split("=", 1) for line in lines))
        return self.heard[-1]

    def until(self, name: str) -> dict[str, str]:
        """Return the next datagram that has a name."""
        while name not in (facts := self.next()):
            pass
        return facts


@pytest.fixture(params=["path", "abstract"])
def ear(request: pytest.FixtureRequest, root: Root) -> Iterator[Ear]:
    made = Ear(f"@{root.path}" if request.param == "abstract" else f"{root.path}/notify")
    yield made
    made.socket.close()


def test_what_systemd_hears(root: Root, ear: Ear) -> None:
    root.add_shell()
    daemon = Daemon(
        command(root, "--port", "0", "--shutdown-grace", "3s"),
        environ={**ear.environ, "WATCHDOG_USEC": "1000000"},
    )
    try:
        ready = ear.until("READY")
        address = ready["STATUS"].rpartition(" ")[2]
        daemon.address = address
        assert daemon.get("/livez") == {"result": "alive"}, "it listens by then"
        assert ear.until("WATCHDOG")["WATCHDOG"] == "1"
        assert daemon.result(daemon.run(**shell("env")))["stdout"].count("GENVM") > 0
        environment = daemon.result(daemon.run(**shell("env")))["stdout"]
        assert not re.search("^(NOTIFY|WATCHDOG|LISTEN)_", environment, re.M)

        daemon.signal(signal.SIGSTOP)
        stat_file = Path(f"/proc/{daemon.pid}/stat")
        eventually(lambda: stat_file.read_text().rpartition(") ")[2].startswith("T"))
        with contextlib.suppress(BlockingIOError):
            while ear.next(0):
                pass
        with pytest.raises(TimeoutError):
            ear.next(1.5)
        daemon.signal(signal.SIGCONT)
        ear.until("WATCHDOG")

        before = time.monotonic_ns() // 1000
        daemon.signal(signal.SIGHUP)
        reloading = ear.until("RELOADING")
        assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert ear.until("READY")["READY"] == "1"
        daemon.signal(signal.SIGTERM)
        assert int(ear.until("STOPPING")["EXTEND_TIMEOUT_USEC"]) > 3_000_000
        assert daemon.wait() == 0
    finally:
        daemon.close()


def test_signs_of_life_go_on_while_it_ends(root: Root, start: Start) -> None:
    ear = Ear(f"{root.path}/notify")
    with ear.socket:
        environ = {**ear.environ, "WATCHDOG_USEC": "200000"}
        daemon = start("--shutdown-grace", "60s", environ=environ)
        runs = root.path / "runs"
        daemon.run("ignore-sigterm", f"touch {runs}", "sleep 600")
        eventually(runs.exists)
        daemon.signal(signal.SIGTERM)
        ear.until("STOPPING")
        for _ in range(3):
            assert ear.until("WATCHDOG")["STATUS"].endswith("; listening on nothing")
        daemon.signal(signal.SIGTERM)  # the second one ends what is left
        assert daemon.wait() == 0
        assert not [record for record in daemon.records if record["level"] == "critical"]


def test_a_watchdog_of_another_process_gets_no_signs_of_life(root: Root, start: Start) -> None:
    ear = Ear(f"{root.path}/notify")
    with ear.socket:
        daemon = start(environ={**ear.environ, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"})
        ear.until("READY")
        daemon.result(daemon.run("sleep 0.5"))
        daemon.signal(signal.SIGHUP)
        ear.until("READY")
        assert not any("WATCHDOG" in facts for facts in ear.heard)


def test_nobody_hears_it(root: Root, start: Start) -> None:
    environ = {"NOTIFY_SOCKET": f"{root.path}/nobody", "WATCHDOG_USEC": "soon"}
    daemon = start(environ=environ)
    assert daemon.result(daemon.run("exit 0"))["exit_code"] == 0
    assert daemon.stop() == 0


# --- signals and the log file ---


def test_what_a_reload_takes(root: Root, start: Start) -> None:
    """Level, token and manifest, each although another is wrong; an old token stays masked."""
    settings, token = root.path / "config" / "genvm-manager.yaml", root.path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    daemon = start("--auth-token-file", str(token))

    def answer(path: str, key: str = NEXT_TOKEN) -> Any:
        return daemon.request("GET", path, headers={"Authorization": f"Bearer {key}"}).json

    def reload() -> None:
        before = daemon.text.count('"reloaded"')
        daemon.signal(signal.SIGHUP)
        eventually(lambda: daemon.text.count('"reloaded"') > before, what="a reload")

    assert answer("/log/level", TOKEN) == {"level": "info"}
    settings.write_text("log_level: debug\npermits: 3\n")
    token.write_text(NEXT_TOKEN)
    root.add_shell()
    reload()
    assert answer("/log/level") == {"level": "debug"}
    assert answer("/log/level", TOKEN)["code"] == "unauthorized"
    assert len(answer("/versions")["versions"]) == 2
    daemon.wait_log(lambda record: record["message"].endswith("after a restart: permits"))

    assert answer(f"/{TOKEN}/{NEXT_TOKEN}")["code"] == "endpoint_not_found"
    daemon.wait_log(lambda record: "[redacted]/[redacted]" in json.dumps(record))
    assert not re.search(f"{TOKEN}|{NEXT_TOKEN}", daemon.text)

    settings.write_text("permits: [")
    token.write_text("short")
    root.write_manifest({"v0.1.0": "2025-01-01T00:00:00Z"})
    reload()
    assert answer("/log/level") == {"level": "debug"}
    assert len(answer("/versions")["versions"]) == 1
    errors = [r["message"].split(":")[0] for r in daemon.records if r["level"] == "error"]
    assert errors == ["settings", "token"]
    settings.write_text("log_level: warn")
    root.manifest.write_text("executor_versions: 7")
    token.unlink()
    daemon.signal(signal.SIGHUP)
    eventually(lambda: answer("/log/level") == {"level": "warn"}, what="the level of the file")
    assert len(answer("/versions")["versions"]) == 1
    assert daemon.stop() == 0


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("how", ["copytruncate", "create", "nocreate"])
def test_logrotate(root: Root, how: str) -> None:
    """The log file survives what logrotate does with it, without a signal."""
    logrotate = shutil.which("logrotate") or "/usr/sbin/logrotate"
    if not Path(logrotate).exists():
        assert not os.environ.get("GENVM_REQUIRE_LOGROTATE"), "logrotate is not installed"
        pytest.skip("Debian's package logrotate is not installed")
    path, rules = root.path / "m.log", root.path / "rules"
    rules.write_text(f"{path} {{\n rotate 3\n {how}\n}}\n")
    rules.chmod(0o644)
    daemon = Daemon(
        command(root, "--listen", f"unix:{root.path}/s", "--log-file", str(path)), read_log=False
    )
    try:
        eventually(lambda: "listening" in text_of(path), what="it listens")
        daemon.address = f"unix://{root.path}/s"
        ids = []
        for _ in range(3):
            ids.append(daemon.run("exit 0"))
            daemon.result(ids[-1])
            eventually(lambda: f'"genvm_id": {ids[-1]}' in text_of(path), what="its line")
            words = [logrotate, "--force", "--state", f"{root.path}/state", str(rules)]
            subprocess.run(words, check=True, timeout=2 * WAIT)
        assert daemon.stop() == 0
        files = [path, *(root.path / f"m.log.{number}" for number in (1, 2, 3))]
        records = [
            json.loads(line)
            for file in reversed(files)
            if file.exists()
            for line in file.read_text().splitlines()
        ]
        finished = [r["genvm_id"] for r in records if r["message"] == "execution finished"]
        assert finished == ids, "each line once, in order, and no gap between them"
        assert records[-1]["message"] == "stopped"
    finally:
        daemon.close()


# --- README's unit and container, the release ---


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


def units() -> dict[str, str]:
    """Return README's whole units by their names."""
    named = (re.match(r"# /etc/systemd/system/([\w/.-]+)", text) for text in blocks("ini"))
    return {found[1]: found.string for found in named if found and "/" not in found[1]}


def test_the_units_are_what_systemd_understands(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        assert not os.environ.get("GENVM_REQUIRE_SYSTEMD"), "systemd-analyze is not installed"
        pytest.skip("Debian's package systemd is not installed")
    assert set(units()) == {"genvm-manager.service", "genvm-manager.socket"}
    for name, text in units().items():
        ours = text.replace("/opt/genvm-manager/.venv/bin/python", sys.executable)
        (tmp_path / name).write_text(ours)

    def judged(*words: str) -> str:
        done = subprocess.run(
            [analyze, *words], capture_output=True, text=True, timeout=2 * WAIT, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "genvm-manager" not in done.stderr, done.stderr
        return done.stdout

    judged("verify", *(str(tmp_path / name) for name in units()))
    said = judged("security", "--offline=true", str(tmp_path / "genvm-manager.service"))
    exposure = re.search(r"Overall exposure level .*: ([\d.]+)", said)
    assert exposure is not None and float(exposure[1]) <= 4.5


def test_the_commands_of_the_unit(root: Root, start: Start) -> None:
    """They do what the unit means, on a manager with the token that it gives it."""
    token = root.path / "token"
    token.write_text(TOKEN)
    token.chmod(0o440)  # as systemd leaves it
    found = re.findall(r"^(Exec\w+)=-?\S+/python \S+/genvm_manager.py (.*)$", TEXT, re.M)
    commands = {name: words.split() for name, words in found}
    assert commands["ExecStart"] == ["serve"]
    assert commands["ExecStartPre"] == ["check-config"]
    daemon = start("--auth-token-file", str(token))
    words = [
        word.replace("${CREDENTIALS_DIRECTORY}", str(root.path)) for word in commands["ExecStop"]
    ]
    draining = [sys.executable, str(SOURCE), *words, "--server", f"http://{daemon.address}"]
    subprocess.run(draining, check=True, timeout=2 * WAIT, stdout=subprocess.DEVNULL)
    reply = daemon.request("GET", "/status", headers={"Authorization": f"Bearer {TOKEN}"})
    assert reply.json["draining"] is True


def test_the_container_has_what_it_needs(root: Root, tmp_path: Path) -> None:
    """Its files are those of the project, its commands run, and its health check holds."""
    (text,) = blocks("dockerfile")
    lines = [line.split(" ", 1) for line in text.replace("\\\n", " ").splitlines()]
    steps = {kind: rest.strip() for kind, rest in lines}
    *sources, _ = steps["COPY"].split()
    for name in sources:
        shutil.copy(PROJECT / name, tmp_path)
    assert (
        "--require-hashes -r requirements.lock" in text
        and "--hash=" in (tmp_path / "requirements.lock").read_text()
    )
    compiling = steps["RUN"].partition("&&")[2].split()
    assert compiling[:3] == ["python", "-m", "compileall"]
    subprocess.run([sys.executable, *compiling[1:]], cwd=tmp_path, check=True, timeout=2 * WAIT)
    assert list(tmp_path.glob("__pycache__/genvm_manager.*.pyc"))

    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    program, *serving = json.loads(steps["CMD"].replace("/run/secrets/token", str(token)))
    probe_program, *probing = json.loads(steps["HEALTHCHECK"].partition("CMD ")[2])
    assert program == probe_program == "python"
    variable, _, _ = steps["ENV"].partition("=")
    daemon = Daemon(
        [sys.executable, *serving, "--port", "0"], environ={variable: str(root.path)}, cwd=tmp_path
    )
    try:
        daemon.wait_until_listening()
        port = daemon.address.rpartition(":")[2]
        probe = [sys.executable, *(word.replace("3999", port) for word in probing)]
        assert subprocess.run(probe, timeout=2 * WAIT, check=False).returncode == 0
        assert daemon.stop() == 0
        gone = subprocess.run(probe, timeout=2 * WAIT, check=False, stderr=subprocess.DEVNULL)
        assert gone.returncode != 0
    finally:
        daemon.close()


def test_one_version_everywhere() -> None:
    changes = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", changes, re.M)
    assert released[0] == __version__
    assert len({*released}) == len(released)
    said = subprocess.run(
        [sys.executable, str(SOURCE), "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == __version__
    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = { attr = "genvm_manager.__version__" }' in project
