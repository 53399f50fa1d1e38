"""What the tests of modules share: a module's process, and an executor that asks it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from genvm_manager import own_command

from .executor_client import HELLO, Client
from .support import WAIT, Host, Root, serving

# --- the process ---


class ModuleProcess:
    """``genvm_manager.py module-process llm``, with the manager's ends of its pipes.

    ``command`` may start another one, to which descriptor 3 is passed on.
    """

    def __init__(
        self,
        config: object,
        *,
        command: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        listener: socket.socket | None = None,
        **setup: object,
    ) -> None:
        made = listener or socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = made.getsockname()[:2]
        self.events: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        code = (
            "import os, sys; fd = int(sys.argv[1]); os.dup2(fd, 3, inheritable=True)\n"
            "if fd != 3: os.close(fd)\n"
            "os.execvp(sys.argv[2], sys.argv[2:])"
        )
        command = command or own_command("module-process", "llm")
        self.process = subprocess.Popen(
            [sys.executable, "-ISc", code, str(made.fileno()), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[made.fileno()],
            env={**os.environ, **(environment or {})},
        )
        if listener is None:
            made.close()
        streams = ((self.process.stdout, self.events), (self.process.stderr, self.records))
        self._threads = [
            threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams
        ]
        for thread in self._threads:
            thread.start()
        self.tell({"config": config, "allow_empty_backends": False, "log_level": "info", **setup})

    @classmethod
    def ready(cls, config: object, **setup: Any) -> ModuleProcess:
        """Return a process that accepts connections."""
        process = cls(config, **setup)
        process.event("ready")
        return process

    def _read(self, stream: Any, into: list[dict[str, Any]]) -> None:
        for line in stream:
            with self._changed:
                into.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def tell(self, message: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def until(self, predicate: Callable[[], Any], what: str) -> Any:
        with self._changed:
            found = self._changed.wait_for(predicate, WAIT)
            assert found, f"no {what}; log: {self.records}"
            return found

    def event(self, name: str) -> dict[str, Any]:
        return cast(
            dict[str, Any],
            self.until(lambda: next((e for e in self.events if e["event"] == name), None), name),
        )

    def logged(self, message: str) -> dict[str, Any]:
        def find() -> dict[str, Any] | None:
            return next((r for r in self.records if r["message"] == message), None)

        return cast(dict[str, Any], self.until(find, message))

    def wait(self) -> int:
        status = self.process.wait(WAIT)
        for thread in self._threads:
            thread.join(WAIT)
        return status

    def connect(self, hello: Any = HELLO, **options: Any) -> Client:
        client = Client(self.address, **options)
        if hello is not None:
            client.send(hello)
        return client

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(WAIT)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


# --- the practice executor ---


def run_executor(root: Root, host: Host, module: str, *extra: str) -> subprocess.Popen[bytes]:
    account = "AAAAAAAAAAAAAAAAAAAAAAAAAAc="
    message = {
        "contract_address": account,
        "sender_address": account,
        "origin_address": account,
        "chain_id": "1",
        "value": None,
        "is_init": False,
    }
    return subprocess.Popen(
        [
            str(root.practice()),
            "--log-fd=1",
            "run",
            *extra,
            "--host-data",
            '{"node_address": "0xaa", "tx_id": "0xbb", "fee": 0.5}',
            "--host",
            host.uri,
            "--message",
            json.dumps(message),
            "--cookie=c77",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "GENVM_LLM_MODULE": module},
    )


def call(root: Root, script: str, module: str, *extra: str) -> tuple[tuple[str, Any], str]:
    """Run a contract's method; returns its outcome and the executor's log."""
    with serving(Host(root.path / f"h{time.monotonic_ns()}", f"on method m\n{script}")) as host:
        host.calls({"method": "m", "args": [], "kwargs": {}})
        process = run_executor(root, host, module, *extra)
        log, _ = process.communicate(timeout=WAIT)
        assert process.returncode == 0
        return host.outcome(), log.decode()
