"""Name servers that never answer, and files that hang."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from twisted.internet.address import IPv6Address
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.error import DNSLookupError
from twisted.internet.protocol import Factory, Protocol

from genvm_manager import ResourcesExhausted, SpareResolver, SpareThreads, own_command

from ..integration.conftest import Start
from ..integration.support import SOURCE, WAIT, Daemon, Root, eventually, timed, with_constants
from ..support import async_test, real_reactor

FACTORY: Any = Factory.forProtocol(Protocol)
#: An address of this machine at which a name server would be asked.
NAME_SERVER = "127.53.53.53"
SILENT_LOOKUPS = 60


@async_test
async def test_work_that_hangs_ends_for_those_who_wait() -> None:
    go = threading.Event()
    threads = SpareThreads(2)
    try:
        for _ in range(2):
            with pytest.raises(DeferredTimeout):
                await threads.run(real_reactor(), 0.05, go.wait, 60)
        with pytest.raises(ResourcesExhausted):
            await threads.run(real_reactor(), 5, int)
    finally:
        go.set()
    eventually(lambda: not any(t.name == "spare" for t in threading.enumerate()))


@async_test
async def test_what_the_work_returns_or_raises() -> None:
    threads = SpareThreads(1)
    for _ in range(3):
        assert await threads.run(real_reactor(), 30, "{}-{}".format, 1, 2) == "1-2"
        with pytest.raises(ZeroDivisionError):
            await threads.run(real_reactor(), 30, divmod, 1, 0)


@async_test
async def test_the_resolver_finds_names_and_literals() -> None:
    class Resolving:
        """The reactor with our resolver."""

        nameResolver = SpareResolver(real_reactor())

        def __getattr__(self, name: str) -> object:
            return getattr(real_reactor(), name)

    port = real_reactor().listenTCP(0, Factory.forProtocol(Protocol), interface="127.0.0.1")
    try:
        for name in ("localhost", "127.0.0.1"):
            endpoint = HostnameEndpoint(Resolving(), name, port.getHost().port, 10)
            protocol = await endpoint.connect(FACTORY)
            protocol.transport.loseConnection()
        with pytest.raises(DNSLookupError):
            endpoint = HostnameEndpoint(Resolving(), "no-such-name.invalid", 1, 10)
            await endpoint.connect(FACTORY)
    finally:
        await port.stopListening()


def test_a_link_local_address_keeps_its_interface() -> None:
    class Receiver:
        found: ClassVar[list[object]] = []

        def resolutionBegan(self, resolution: object) -> None:
            pass

        def addressResolved(self, address: object) -> None:
            self.found.append(address)

        def resolutionComplete(self) -> None:
            self.found.append("complete")

    SpareResolver(real_reactor()).resolveHostName(Receiver(), "fe80::1%lo", 80)
    assert Receiver.found == [IPv6Address("TCP", "fe80::1%lo", 80), "complete"]


@contextlib.contextmanager
def silent_names(root: Root, tmp_path: Path, lookup_seconds: float) -> Iterator[Daemon]:
    """A daemon whose name server takes questions and never answers.

    The system's resolver gives up after 150 s, our own lookups after ``lookup_seconds``.
    """
    settings = tmp_path / "resolv.conf"
    settings.write_text(f"nameserver {NAME_SERVER}\noptions timeout:30 attempts:5\n")
    words = own_command("serve", "--root", str(root.path), "--port", "0")
    words = with_constants(words, {"LOOKUP_SECONDS": lookup_seconds})
    mount = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # another run may be there
        server.bind((NAME_SERVER, 53))
        daemon = Daemon(["unshare", "--mount", "sh", "-c", mount, str(settings), *words])
        try:
            daemon.wait_until_listening()
            yield daemon
        finally:
            daemon.close()


def can_mount() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not can_mount(),
    reason="another name server needs a mount namespace, which root can make",
)


@needs_namespaces
def test_silent_name_servers_hold_up_nothing_else(root: Root, tmp_path: Path) -> None:
    with silent_names(root, tmp_path, 60.0) as daemon:
        body: dict[str, Any] = {
            "configs": [
                {"host": f"http://silent{n}.example", "provider": "ollama", "model": "m"}
                for n in range(20)
            ],
            "test_prompts": [{"user_message": "hi"}],
        }
        for _ in range(SILENT_LOOKUPS // 20):
            pending = daemon.send("POST", "/llm/check", body)
            eventually(lambda: threads_of(daemon) > 10, what="names are looked up")
            pending.close()
        begin = time.monotonic()
        daemon.post("/manifest/reload")
        large = b"# v0.1.0\n" + b"#" * 5_000_000
        headers = {"Deployment-Timestamp": "2025-06-01T00:00:00Z"}
        reply = daemon.request("POST", "/contract/detect-version", large, headers)
        assert reply.json == {"specified_major": 0}
        local = {**body["configs"][0], "host": "http://localhost:9"}
        reply = daemon.request("POST", "/llm/check", {**body, "configs": [local]})
        assert reply.json[0]["error_kind"] == "connect"
        timed("reload, detection and a check beside silent names", time.monotonic() - begin, 1.0)
        begin = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        timed("SIGTERM beside silent names", time.monotonic() - begin, 1.0)


def threads_of(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/task"))


@needs_namespaces
def test_a_silent_name_server_is_an_error_of_its_pair(root: Root, tmp_path: Path) -> None:
    with silent_names(root, tmp_path, 2.0) as daemon:
        config = {"host": "http://silent.example", "provider": "ollama", "model": "m"}
        body = {"configs": [config], "test_prompts": [{"user_message": "hi"}]}
        reply = daemon.request("POST", "/llm/check", body)  # for less than the resolver waits
        assert reply.json[0]["error_kind"] == "dns"


def test_a_manifest_that_is_a_pipe_is_refused(root: Root, start: Start) -> None:
    daemon = start()
    root.manifest.unlink()
    os.mkfifo(root.manifest)
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(daemon.request, "POST", "/manifest/reload") for _ in range(3)]
        for reply in replies:
            assert reply.result(WAIT).json["code"] == "manifest_invalid"
    assert "not a regular file" in daemon.get("/status")["manifest"]["problem"]
    assert daemon.result(daemon.run("exit 0"))["exit_code"] == 0, "the old one stays"
    assert daemon.stop() == 0
    run = subprocess.run(
        [sys.executable, str(SOURCE), "serve", "--root", str(root.path), "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * WAIT,
    )
    assert (run.returncode, "not a regular file" in run.stderr) == (1, True)


def test_a_bad_manifest_at_sighup_is_shown_until_a_good_one_comes(root: Root, start: Start) -> None:
    daemon = start()
    assert daemon.get("/status")["manifest"]["problem"] is None
    good = root.manifest.read_text()
    root.manifest.write_text("executor_versions: [\n")
    daemon.signal(signal.SIGHUP)
    eventually(lambda: daemon.get("/status")["manifest"]["problem"], what="the problem is shown")
    assert "not YAML" in daemon.get("/status")["manifest"]["problem"]
    root.manifest.write_text(good)
    daemon.post("/manifest/reload")
    assert daemon.get("/status")["manifest"]["problem"] is None
