"""Tests of the variables that POST /env sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

import genvm_manager
from genvm_manager import (
    ARGUMENT_MAX_BYTES,
    ENV_ALLOW,
    ENVIRONMENT_MAX_BYTES,
    MARKER,
    ConfigError,
    EnvironmentRefused,
    RequestVariables,
    Variables,
)

from .support import ThreadlessReactor, outcome, without_spare_threads

STARTED_WITH = {b"PATH": b"/bin", b"OURS": b"from-the-start", b"A_KEY": b"old"}
#: Each of these led to code, certificates, files or hosts that a client chose.
DETOURS = [
    *("OPENSSL_CONF", "OPENSSL_MODULES", "HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "TEMP", "TMP"),
    *("LOCALDOMAIN", "GENVMROOT", "GIO_EXTRA_MODULES", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS"),
    *("XDG_CONFIG_HOME", "REQUESTS_CA_BUNDLE", "DEBUGINFOD_URLS", "OPENSSL_SECRET"),
    *("SSLKEYLOGFILE", "NODE_EXTRA_CA_CERTS", "RES_OPTIONS"),
]
REFUSED = [
    *("LD_PRELOAD", "LD_LIBRARY_PATH", "LD_X_URL", "PATH", "PYTHONPATH", "PYTHONSTARTUP"),
    *("PYTHON_X_KEY", "BASH_ENV", "IFS", "GCONV_PATH", "PYTHONHOME", "LD_AUDIT", "LUA_INIT"),
    *(MARKER, genvm_manager._STARTED_BY, "GENVM_MANAGER_HOST"),
]


def variables(folder: Path = Path("/nowhere"), **changes: Any) -> Variables:
    """Return variables with an environment of their own."""
    return Variables(folder, environ=STARTED_WITH, **changes)


@pytest.mark.parametrize(
    "key",
    ["OPENAIKEY", "A_KEY", "NODE_KEY", "X_TOKEN", "X_SECRET", "X_URL", "GENVM_X", "DEBUG_X"],
)
def test_what_children_get(key: str) -> None:
    ours = variables()
    before = dict(os.environ)
    assert ours.set(key, "new\udcff") is None
    assert ours(key) == "new\udcff"
    assert ours.for_modules == {**STARTED_WITH, key.encode(): b"new\xff"}
    assert os.environ == before


@pytest.mark.parametrize("key", ["A_VARIABLE", "HTTP_PROXY", "https_proxy", "KEY_FROM_ENV", "URLS"])
def test_what_is_for_templates_only(key: str) -> None:
    ours = variables()
    note = ours.set(key, "value")
    assert note is not None
    assert key in note
    assert "env_allow" in note
    assert "value" not in note
    assert ours(key) == "value"
    assert ours.for_modules == STARTED_WITH
    assert variables(allow=(key,)).set(key, "value") is None
    assert variables(allow=("x", key[:2] + "*")).set(key, "value") is None


@pytest.mark.parametrize("key", DETOURS)
def test_what_nobody_can_allow(key: str) -> None:
    ours = variables(allow=("*", key))
    note = ours.set(key, "/evil")
    assert note is not None
    assert "never" in note
    assert ours(key) == "/evil"
    assert ours.for_modules == STARTED_WITH


@pytest.mark.parametrize("key", ["", "A=B", "A\0", *REFUSED])
def test_what_cannot_be_set(key: str) -> None:
    ours = variables(allow=("*", key))
    with pytest.raises(EnvironmentRefused):
        ours.set(key, "/evil")
    assert ours.for_modules == STARTED_WITH
    assert ours("PATH") == "/bin"


def test_the_default_is_that_of_the_settings() -> None:
    assert genvm_manager.Config().env_allow == ENV_ALLOW
    assert genvm_manager.Config().executor_env == ("*",)


def test_executors_get_what_modules_get_or_less() -> None:
    ours = variables()
    ours.set("X_KEY", "new")
    assert ours.for_executors == ours.for_modules == {**STARTED_WITH, b"X_KEY": b"new"}
    ours = variables(executor_env=("PATH", "GENVM_*"))
    assert ours.for_executors == {b"PATH": b"/bin"}
    for key in ("X_KEY", "GENVM_X", "GENVMISH"):
        ours.set(key, "new")
    assert ours.for_executors == {b"PATH": b"/bin", b"GENVM_X": b"new"}
    assert ours.for_modules == {**STARTED_WITH, b"X_KEY": b"new", b"GENVM_X": b"new"}


def test_what_is_set_goes_before_the_environment() -> None:
    ours = variables()
    assert (ours("A_KEY"), ours("OURS"), ours("NOBODYS")) == ("old", "from-the-start", "")
    ours.set("A_KEY", "")
    assert ours("A_KEY") == ""
    assert ours.for_modules[b"A_KEY"] == b""


def test_no_more_than_children_can_have() -> None:
    ours = variables()
    largest = "x" * (ARGUMENT_MAX_BYTES - len("A_KEY="))
    ours.set("A_KEY", largest)
    with pytest.raises(EnvironmentRefused, match=f"value: {ARGUMENT_MAX_BYTES + 1} bytes"):
        ours.set("A_KEY", largest + "x")
    accepted = 0
    with pytest.raises(EnvironmentRefused, match="whole environment"):
        for accepted in range(ENVIRONMENT_MAX_BYTES // 100_000 + 1):
            ours.set(f"FOR_TEMPLATES_{accepted}", "x" * 100_000)
    assert accepted == (ENVIRONMENT_MAX_BYTES - ARGUMENT_MAX_BYTES) // 100_000
    with pytest.raises(EnvironmentRefused, match="1000 variables are set"):
        for number in range(1001):
            ours.set(f"SMALL_{number}", "")
    ours.set("SMALL_0", "changed")
    with pytest.raises(EnvironmentRefused, match="surrogate"):
        ours.set("HALF", "\ud800")
    assert ours("HALF") == ""


# --- requests ---


@pytest.fixture
def reactor(monkeypatch: pytest.MonkeyPatch) -> ThreadlessReactor:
    """Return a reactor whose threads read files, too."""
    without_spare_threads(monkeypatch)
    return ThreadlessReactor()


def usable(ours: Variables, reactor: ThreadlessReactor, *names: str) -> RequestVariables:
    """Return what a request may use that has these names, or any if there are none."""
    asked = outcome(Deferred.fromCoroutine(ours.for_request(reactor, set(names) or None)))
    reactor.work()
    (found,) = asked
    assert isinstance(found, RequestVariables), found
    return found


def test_a_request_may_use_what_was_set_listed_or_stands_in_a_file(
    tmp_path: Path, reactor: ThreadlessReactor
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "genvm-module-llm.yaml").write_text("key: ${ENV[OURS]}\nx: ${ENV[]} ${OTHER}\n")
    (tmp_path / "deep" / "x.lua").write_bytes(b"\xff ${ENV[IN_LUA]}")
    os.mkfifo(tmp_path / "pipe")
    ours = variables(tmp_path, allow=("A_KEY", "P*"))
    ours.set("SET_LATER", "given")
    request = usable(ours, reactor)
    values = [request(name) for name in ("OURS", "IN_LUA", "A_KEY", "SET_LATER", "")]
    assert values == ["from-the-start", "", "old", "given", ""]
    assert request.inserted == {"from-the-start", "old", "given", ""}
    for name in ("PATH", "OTHER", "NOWHERE"):
        with pytest.raises(ConfigError, match=f"{name} may not be used in a request") as caught:
            request(name)
        assert "/bin" not in caught.value.message


def test_a_pattern_opens_nothing_to_requests(reactor: ThreadlessReactor) -> None:
    request = usable(variables(), reactor, "A_KEY")
    with pytest.raises(ConfigError, match="A_KEY may not be used"):
        request("A_KEY")
    assert request.inserted == set()


def test_files_are_read_only_where_that_matters(reactor: ThreadlessReactor) -> None:
    ours = variables()
    ours.set("MINE", "x")
    asked = outcome(Deferred.fromCoroutine(ours.for_request(reactor, {"MINE"})))
    assert isinstance(asked[0], RequestVariables)
    assert reactor.jobs == []
