"""Fixtures of the integration tests."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from .fake_providers import FakeProviders, Provider
from .support import Daemon, Root, eventually

Start = Callable[..., Daemon]


@pytest.fixture
def root() -> Iterator[Root]:
    """A GenVM root with the practice executor."""
    made = Root()
    made.practice()
    yield made
    made.close()


@pytest.fixture
def start(root: Root) -> Iterator[Start]:
    """Start a daemon for ``root``, with the flags and options of ``Daemon.serve``."""
    started: list[Daemon] = []

    def begin(*flags: str, **options: Any) -> Daemon:
        daemon = Daemon.serve(root, *flags, **options)
        started.append(daemon)
        return daemon

    yield begin
    for daemon in started:
        daemon.close()


def write_certificate(path: Path) -> None:
    """Write a key, and a certificate for secure.test that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "secure.test")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName(
        [x509.DNSName("secure.test"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A certificate for secure.test that is its own authority, and a server's context with it."""
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    write_certificate(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return path, context


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeProviders]:
    """The providers, for all tests of a module."""
    made = FakeProviders(tmp_path_factory.mktemp("certificates"))
    yield made
    made.close()


@pytest.fixture
def provider(fakes: FakeProviders) -> Iterator[Provider]:
    """A provider of one's own, whose gate is open at the end."""
    made = Provider(fakes)
    yield made
    made.open_gate()


@pytest.fixture(scope="module")
def shared_root() -> Iterator[Root]:
    """A GenVM root with the practice executor and the shell, for all tests of a module."""
    made = Root()
    made.practice()
    made.add_shell()
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_daemon(shared_root: Root) -> Iterator[Daemon]:
    """A daemon with 8 permits for all tests of a module."""
    daemon = Daemon.serve(shared_root, "--permits", "8")
    yield daemon
    daemon.close()


@pytest.fixture
def daemon(shared_daemon: Daemon) -> Iterator[Daemon]:
    """The daemon of the module; each test must leave it as it was: idle, with 8 permits."""
    yield shared_daemon
    try:
        assert shared_daemon.get("/status")["draining"] is False
        eventually(lambda: shared_daemon.permits() == IDLE, what="the daemon is idle again")
        eventually(lambda: not shared_daemon.descendants(), what="no process is left")
    finally:
        # A test that failed half-way must not make the next one fail.
        for genvm_id, entry in shared_daemon.get("/status")["executions"].items():
            if entry["state"] != "finished":
                shared_daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")
        shared_daemon.post("/permits", {"permits": 8})
        shared_daemon.post("/undrain")


IDLE = {"permits": 8, "available": 8, "in_use": 0, "waiting": 0}
