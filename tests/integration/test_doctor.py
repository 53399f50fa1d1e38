"""What the doctor finds, as a process: on a sound root, and with all that may be wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .conftest import Start
from .support import MARKER, SOURCE, VERSION, WAIT, Root, processes_with

SECRET = "sk-that-nobody-must-see"


def doctor(
    *words: str, source: Path = SOURCE, prepare: Callable[[], None] | None = None, **environ: str
) -> tuple[int, str]:
    """Run the doctor to its end; return its status and what it printed."""
    clean = {key: text for key, text in os.environ.items() if not key.startswith("GENVM")}
    marker = f"{time.monotonic_ns()}"
    done = subprocess.run(
        [sys.executable, str(source), "doctor", *words],
        capture_output=True,
        text=True,
        timeout=2 * WAIT,
        env={**clean, MARKER: marker, **environ},
        preexec_fn=prepare,
        check=False,
    )
    assert done.stderr == ""
    assert processes_with(f"{MARKER}={marker}") == [], "nothing is left behind"
    return done.returncode, done.stdout


def findings(
    *words: str, source: Path = SOURCE, prepare: Callable[[], None] | None = None, **environ: str
) -> dict[str, list[tuple[str, str]]]:
    """Return level and text of all that is found, by check; the status fits the levels."""
    status, text = doctor(*words, "--json", source=source, prepare=prepare, **environ)
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in json.loads(text):
        found.setdefault(finding["check"], []).append((finding["level"], finding["text"]))
    levels = {level for all_of_one in found.values() for level, _ in all_of_one}
    assert levels <= {"ok", "note", "warning", "error"}
    assert status == (2 if "error" in levels else 1 if "warning" in levels else 0)
    return found


def has(found: Sequence[tuple[str, str]], level: str, *parts: str) -> bool:
    """Tell whether one of some findings has this level and these words."""
    return any(one == level and all(part in text for part in parts) for one, text in found)


def bad(found: dict[str, list[tuple[str, str]]], *checks: str) -> list[tuple[str, str]]:
    """Return what is worse than a note in some checks."""
    return [item for check in checks for item in found[check] if item[0] in ("warning", "error")]


def test_a_sound_installation(root: Root) -> None:
    """Only what this machine itself is short of may be a warning."""
    config = root.path / "config"
    (config / "genvm-manager.yaml").write_text("permits: 0\nport: 0\nstart_modules: [web]\n")
    (config / "genvm-module-web.yaml").write_text("bind_address: 127.0.0.1:0\n")
    found = findings("--root", str(root.path))
    assert bad(found, *(set(found) - {"limits", "temporary folder"})) == []
    assert has(found["versions"], "ok", f"executor {VERSION} answers")
    assert has(found["packages"], "ok", "Python 3.", "twisted 2", "klein 2")
    assert ("ok", "1 executor version") in found["manifest"]
    assert has(found["llm module"], "note", "POST /module/start")
    assert has(found["limits"], "note", "0 permits")
    _, text = doctor("--root", str(root.path))
    assert f"ok       versions: executor {VERSION} answers\n" in text
    assert re.fullmatch(r"\d+ errors?, \d+ warnings?, \d+ notes?", text.splitlines()[-1])


def test_executors_that_do_not_run_and_files_that_nobody_writes(root: Root) -> None:
    """Each is named with its reason, nothing hangs, and no finding hides another."""
    program = Path("/proc/self/exe").resolve().read_bytes()
    loader = re.findall(rb"/lib[\w./-]*/ld-[\w.-]+\0", program)[0]
    versions: dict[str, bytes | None] = {
        "v0.1.1": None,
        "v0.1.2": b"#!/bin/sh\n",
        "v0.1.3": program[:18] + bytes((program[18] ^ 0xFF,)) + program[19:],
        "v0.1.4": b"#!/nonexistent/sh\n",
        "v0.1.5": program.replace(loader, b"/nonexistent".ljust(len(loader), b"\0")),
        "v0.1.6": b"#!/bin/sh\nexit 2\n",
        "v0.1.7": b"#!/bin/sh\nsleep 600 & exec sleep 600\n",
        "v0.2.8": b"neither ELF nor script",
    }
    for version, content in versions.items():
        if content is not None:
            root.script("", version).write_bytes(content)
    (root.path / "executor/v0.1.2/bin/genvm").chmod(0o644)
    times = dict.fromkeys((VERSION, *versions), "2025-01-01T00:00:00Z")
    root.write_manifest({**times, "v0.3.0": "2999-01-01T00:00:00Z"})
    settings = root.path / "settings"
    for pipe in (settings, root.path / "config" / "genvm-module-llm.yaml"):
        os.mkfifo(pipe)
    found = findings("--root", str(root.path), "--config", str(settings))
    for check in ("settings", "llm module"):
        assert has(found[check], "error", "no answer within 10 s", "pipe")
    seen = found["versions"]
    assert has(seen, "ok", f"executor {VERSION} answers")
    assert has(seen, "note", "v0.1.1/bin/genvm does not exist", "install")
    assert has(seen, "warning", "v0.3.0/bin/genvm does not exist")
    assert has(seen, "error", "v0.1.2/bin/genvm cannot be executed", "chmod +x ")
    assert has(seen, "error", "executor v0.1.3 ", "not an executable of this machine")
    for version in ("v0.1.4", "v0.1.5"):
        assert has(seen, "error", f"executor {version} ", "the interpreter or loader", "not found")
    assert has(seen, "error", "executor v0.1.6 ", "exit code 2", "| " + str(root.path))
    assert has(seen, "error", "executor v0.1.7 ", "did not name a version within 10 s")
    assert has(seen, "error", "executor v0.2.8 ", "not an executable of this machine")
    assert has(found["manifest"], "warning", "newer than v0.2.7")
    assert has(found["manifest"], "note", "before v0.3.0 (from 2999-01-01")


def test_beside_a_running_manager_and_with_secrets(root: Root, start: Start) -> None:
    """It says who has a port; what is secret stays so, whatever is wrong with it."""
    token = root.path / "token"
    token.write_text(SECRET)
    token.chmod(0o600)
    daemon = start("--auth-token-file", str(token))
    port = daemon.address.rpartition(":")[2]
    config = root.path / "config"
    (config / "genvm-module-llm.yaml").write_text(
        "backends:\n  one: {host: http://127.0.0.1, provider: ollama, models: {m: {}},"
        f" key: {SECRET}-2}}\ntimeout: ${{ENV[SOME_KEY]}}\n"
    )
    common = ["--root", str(root.path), "--port", port]
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        web = {"bind_address": f"127.0.0.1:{taken}", "webdriver_host": "chromium", "odd": 1}
        (config / "genvm-module-web.yaml").write_text(json.dumps(web))
        found = findings(
            *common, "--auth-token-file", str(token), PATH="/nonexistent", SOME_KEY=f"{SECRET}-3"
        )
        (note,) = found["address"]
        assert note[0] == "note"
        owner = f"a manager that requires a token, process {daemon.pid}, "
        assert note[1].startswith(owner)
        assert f" has 127.0.0.1:{port}; " in note[1]
        assert "choose another --port" in note[1]
        assert has(found["llm module"], "warning", "timeout: expected seconds", "[redacted]")
        assert has(found["web module"], "warning", "no Chromium is installed")
        assert SECRET not in str(found)
        web.pop("webdriver_host")
        (config / "genvm-module-web.yaml").write_text(json.dumps(web))
        found = findings(*common, "--start-modules=llm,web", "--auth-token-file", str(token))
        # What listens there may be anybody: it is asked who it is, without the token.
        request = other.accept()[0].recv(4096)
        assert request.startswith(b"GET / ")
        assert SECRET.encode() not in request
        assert has(found["llm module"], "note", "not set here: SOME_KEY")
        assert has(found["web module"], "warning", "odd: unknown key")
        owner = f"process {os.getpid()}, "
        assert has(found["web module"], "error", owner, f" has 127.0.0.1:{taken}; ", "bind_address")
        assert SECRET not in str(found)


def test_what_a_machine_is_short_of(tmp_path: Path) -> None:
    """A copy that asks for other packages and comes from the future, in a narrow place."""
    source = tmp_path / "manager.py"
    shutil.copy(SOURCE, source)
    text = source.read_text()
    header = text.replace(
        '#     "attrs>=23.2"', '#     "attrs>=99",\n#     "no-such-package>=1"', 1
    )
    assert header != text
    source.write_text(header)
    os.utime(source, (future := time.time() + 1e6, future))
    folder = tmp_path / ("long" * 30)
    folder.mkdir()

    def narrow() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    gone = tmp_path / "gone"
    words = ["--root", str(gone), "--permits", "1000000"]
    found = findings(*words, source=source, prepare=narrow, TMPDIR=str(folder))
    assert has(found["settings"], "error", f"flag --root: {gone} is not a folder")
    assert has(found["manifest"], "error", "does not exist", f"name them in {gone}/data/manifest")
    assert has(found["packages"], "error", "attrs 2", "is too old: pip install 'attrs>=99'")
    assert has(found["packages"], "error", "no-such-package is not installed: pip install ")
    assert has(found["clock"], "error", "before this program was written")
    assert has(found["temporary folder"], "error", str(folder), "TMPDIR")
    assert has(found["limits"], "warning", "1024 descriptors are few", "LimitNOFILE")
    (tmp_path / "gone" / "data").mkdir(parents=True)
    (tmp_path / "gone" / "data" / "manifest.yaml").write_text("executor_versions: {x: 1}\n")
    found = findings(*words, "--log-file", str(tmp_path / "none" / "log"))
    assert has(found["manifest"], "error", "manifest.yaml:1: ")
    assert has(found["settings"], "error", "log_file: ", "cannot be written")
    assert has(found["limits"], "warning", "1000000 permits", "lower permits")


def test_each_place_to_listen_at(root: Root, start: Start) -> None:
    """It listens there for a moment, as a manager would, and leaves nothing behind."""
    path = root.path / "m.sock"
    listen = f"unix:{root.path}/no/m.sock,ssl:0:privateKey=/nonexistent,systemd:domain=UNIX:index=0"
    words = ["--root", str(root.path), "--socket", str(path), "--listen", listen]
    found = findings(*words, "--allow-unauthenticated")["address"]
    assert has(found, "ok", f"unix:{path} is free")
    assert has(found, "error", "/no/m.sock", "No such file")
    assert has(found, "error", "/nonexistent cannot be read")
    assert has(found, "note", "systemd:domain=UNIX:index=0: only a process")
    assert not path.exists()
    pipe = root.path / "pipe"
    os.mkfifo(pipe)
    words = ["--root", str(root.path), "--port", "0", "--permits", "0"]
    hanging = findings(*words, "--listen", f"ssl:0:privateKey={pipe}", "--allow-unauthenticated")
    (ok, hung) = sorted(hanging["address"], reverse=True)
    assert (ok[0], hung[0]) == ("ok", "error")
    assert hung[1].startswith(f"ssl:0:privateKey={pipe}: no answer within 10 s: a file is a pipe")
    assert has(hanging["versions"], "ok", f"executor {VERSION} answers"), "others go on"
    start(listen=("--socket", str(path)))
    found = findings("--root", str(root.path), "--socket", str(path))["address"]
    assert has(found, "note", f"cannot listen on {path}: ", "in use")
    assert path.exists()


def test_what_others_wrote_does_not_steer_a_terminal(root: Root) -> None:
    """Names of files and commands of other processes may hold anything."""
    command = [sys.executable, str(SOURCE), "doctor", "--root", f"{root.path}/\x1b[2J"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=2 * WAIT)
    assert r"\x1b[2J" in done.stdout
    assert "\x1b" not in done.stdout
