"""A client that makes up secrets by the thousand: nobody is held up, no live one gets known."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ..integration.conftest import Start
from ..integration.support import (
    SHELL_VERSION,
    WAIT,
    Daemon,
    Root,
    eventually,
    shell,
    watched,
)
from .support import troubles

LINE_CHARACTERS = 4_000_000


@pytest.fixture
def daemon(root: Root, start: Start) -> Daemon:
    """A manager with the shell as an executor."""
    root.add_shell()
    return start()


@contextlib.contextmanager
def silent_provider() -> Iterator[str]:
    """A service that takes connections and says nothing, so that a check of it goes on."""
    with socket.create_server(("127.0.0.1", 0), backlog=2000) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def llm(*keys: str, **changes: Any) -> dict[str, Any]:
    """Return the configuration of an LLM module with as many backends as keys."""
    backend = {"host": "http://127.0.0.1:9", "provider": "openai-compatible", "models": {"m": {}}}
    backends = {f"b{number}": {**backend, "key": key} for number, key in enumerate(keys)}
    return {"bind_address": "127.0.0.1:0", "backends": backends, **changes}


@pytest.mark.parametrize("character", ["x", "k"])
def test_a_long_line_beside_a_thousand_made_up_secrets(daemon: Daemon, character: str) -> None:
    """They are alike, as keys are, and of the very letter that the line is of."""
    keys = [f"sk-made-up-{number:04}-{'k' * 40}" for number in range(1000)]
    line = f"$(head -c {LINE_CHARACTERS} /dev/zero | tr '\\0' {character})"
    said = f"""line="{line}"; for n in 1 2 3; do echo "{keys[917]} $line {keys[918]}" >&3; done"""
    with silent_provider() as host:
        config = {"host": host, "provider": "openai-compatible", "model": "m"}
        configs = [{**config, "key": key} for key in keys]
        checking = daemon.send(
            "POST", "/llm/check", {"configs": configs, "test_prompts": [{"user_message": "hi"}]}
        )
        time_limit = time.monotonic() + WAIT
        quiet = shell(f"echo '{keys[917]}' >&3", capture_output=False)
        while keys[917] in daemon.text or "[redacted]" not in daemon.text:  # until it is known
            assert time.monotonic() < time_limit
            daemon.text = ""
            daemon.result(daemon.run(**quiet))
        said_it = daemon.run(**shell(said, capture_output=False))
        watched(daemon, "long lines", lambda: daemon.result(said_it))
        eventually(lambda: daemon.text.count(character * LINE_CHARACTERS) == 3, what="whole lines")
        assert keys[917] not in daemon.text
        assert keys[918] not in daemon.text
        checking.close()
    # What a request made up is forgotten with it.
    eventually(lambda: daemon.result(daemon.run(**quiet)) and keys[917] in daemon.text)
    assert troubles(daemon) == []


def test_a_refused_restart_with_a_thousand_keys_forgets_no_live_one(daemon: Daemon) -> None:
    live = f"sk-{secrets.token_hex(20)}"
    made_up = [f"sk-{secrets.token_hex(20)}" for _ in range(1000)]
    body = {"module_type": "llm", "config": llm(live)}
    assert daemon.request("POST", "/module/start", body).status == 200
    wrong = llm(*made_up, lua_script_path="my.lua")
    refused = daemon.request("POST", "/module/restart", {"module_type": "llm", "config": wrong})
    assert refused.json["code"] == "module_failed"
    printed = "; ".join(f"echo 'the key is {key}' >&3" for key in (live, made_up[0]))
    daemon.result(daemon.run(**shell(printed, capture_output=False)))
    daemon.wait_log(lambda record: record.get("record") == {"line": f"the key is {made_up[0]}"})
    assert live not in daemon.text + json.dumps(refused.json)
    # And it goes with the module that had it.
    daemon.post("/module/stop", {"module_type": "llm"})
    eventually(lambda: daemon.get("/status")["modules"]["llm"]["draining"] == 0)
    daemon.result(daemon.run(**shell(printed, capture_output=False)))
    daemon.wait_log(lambda record: record.get("record") == {"line": f"the key is {live}"})


@pytest.mark.parametrize("spelled", ['sk-"a"/b\\c', "first line\nsecond line", "sk-é/?&="])
def test_a_variable_with_a_key_is_known_however_it_is_spelled(
    daemon: Daemon, root: Root, spelled: str
) -> None:
    daemon.post("/env", {"key": "T_PROVIDER_KEY", "value": spelled})
    forms = {spelled, json.dumps(spelled)[1:-1], repr(spelled)[1:-1], *spelled.splitlines()}
    script = "cat >&3 <<'END'\n" + "\n".join(forms) + "\nEND\n"
    root.script(script, SHELL_VERSION)
    daemon.result(daemon.run(**shell("", capture_output=False)))
    assert daemon.stop() == 0
    said = [r["record"]["line"] for r in daemon.records if r["message"] == "genvm log"]
    assert len(said) >= len(forms)
    assert set(said) == {"[redacted]"}
