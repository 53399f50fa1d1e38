"""Settings, their sources and their precedence; what the file needs to be imported."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from packaging.requirements import Requirement

import genvm_manager
from genvm_manager import (
    DEFAULT_PORT,
    GIB,
    LEGACY_SETTINGS,
    MIB,
    SETTINGS,
    Config,
    ConfigError,
    LevelName,
    automatic_permits,
    default_root,
    is_loopback,
    load_config,
    main,
    read_token,
)

from .support import PATIENCE

PROJECT = Path(genvm_manager.__file__).parent
SOURCE = Path(genvm_manager.__file__)


def write_token(path: Path, text: str = "s3cret" * 4, mode: int = 0o600) -> None:
    path.write_text(text)
    path.chmod(mode)


def write_settings(root: Path, text: str) -> Path:
    """Write the configuration file where the manager looks for it."""
    path = root / "config" / "genvm-manager.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(flags: dict[str, str], environ: dict[str, str]) -> str:
    """Return the message with which settings are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(flags, environ)
    return caught.value.message


# --- precedence ---

# Setting: texts for flag, environment and file, and the values that they stand for.
SOURCES: dict[str, tuple[tuple[str, object], tuple[str, object], tuple[str, object]]] = {
    "host": (("127.0.0.2", "127.0.0.2"), ("127.0.0.3", "127.0.0.3"), ("'::1'", "::1")),
    "port": (("1", 1), ("2", 2), ("3", 3)),
    "log_level": (("DEBUG", "debug"), ("Warning", "warn"), ("error", "error")),
    "log_format": (("text", "text"), ("json", "json"), ("text", "text")),
    "permits": (("0", 0), ("5", 5), ("6", 6)),
    "execution_retention": (("10s", 10.0), ("1m", 60.0), ("2h", 7200.0)),
    "shutdown_grace": (("500ms", 0.5), ("2", 2.0), ("1.5", 1.5)),
    "die_with_parent": (("true", True), ("false", False), ("true", True)),
    "env_allow": (("A, B", ("A", "B")), ("C", ("C",)), ("[D, E]", ("D", "E"))),
    "log_file": (
        ("/tmp/a", Path("/tmp/a")),
        ("/tmp/b", Path("/tmp/b")),
        ("/tmp/c", Path("/tmp/c")),
    ),
    "queue_limit": (("7", 7), ("8", 8), ("9", 9)),
    "queue_max_bytes": (("7", 7), ("8", 8), ("9", 9)),
    "executor_env": (("PATH, A*", ("PATH", "A*")), ("B", ("B",)), ("[D, E]", ("D", "E"))),
    "instance": (("0", 0), ("7", 7), ("99", 99)),
    "executor_nice": (("0", 0), ("19", 19), ("10", 10)),
}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_flags_win_over_environment_over_file_over_defaults(name: str, tmp_path: Path) -> None:
    flag, environ, file = SOURCES[name]
    variable = f"GENVM_MANAGER_{name.upper()}"
    root = {"GENVMROOT": str(tmp_path)}

    default = getattr(load_config({}, root), name)
    assert default == attrs.fields_dict(Config)[name].default
    write_settings(tmp_path, f"{name}: {file[0]}\n")
    assert getattr(load_config({}, root), name) == file[1]
    assert getattr(load_config({}, {**root, variable: environ[0]}), name) == environ[1]
    assert getattr(load_config({name: flag[0]}, {**root, variable: environ[0]}), name) == flag[1]


def test_every_setting_is_a_flag_a_variable_and_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    help_text = capsys.readouterr().out
    options = re.split(r"\n  (?=-)", help_text.partition("options:")[2])
    for name in SETTINGS:
        (option,) = (text for text in options if text.startswith(f"--{name.replace('_', '-')} "))
        assert "(default" in option
        # A wrong value shows that the source is read at all.
        assert name.upper() in refused({}, {f"GENVM_MANAGER_{name.upper()}": "\0"})


def test_null_in_the_file_means_the_default(tmp_path: Path) -> None:
    write_settings(tmp_path, "".join(f"{name}: null\n" for name in SETTINGS))
    config = load_config({"root": str(tmp_path)}, {})
    plain = load_config({"root": str(tmp_path), "config": os.devnull}, {})
    assert config == plain
    assert config.permits is None


def test_a_setting_that_other_settings_need_may_come_from_another_source(tmp_path: Path) -> None:
    write_token(tmp_path / "token")
    write_settings(tmp_path, f"auth_token_file: {tmp_path}/token\n")
    config = load_config({"host": "0.0.0.0"}, {"GENVMROOT": str(tmp_path)})
    assert config.auth_token_file == tmp_path / "token"


def test_an_unknown_variable_of_ours_is_said_and_ignored(tmp_path: Path) -> None:
    config = load_config({"root": str(tmp_path)}, {"GENVM_MANAGER_PROT": "1", "OTHER": "2"})
    assert [note for note in config.notes if "GENVM_MANAGER_PROT" in note]
    assert not [note for note in config.notes if "OTHER" in note]


# --- wrong values ---


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("port: 65536", "expected an integer of at most 65535, got 65536"),
        ("port: '3999'", 'expected an integer, got "3999"'),
        ("port: true", "expected an integer, got true"),
        ("permits: -1", "expected an integer of at least 0, got -1"),
        ("permits: 1000001", "expected an integer of at most 1000000, got 1000001"),
        ("permits: 1.5", "expected an integer, got 1.5"),
        ("log_level: loud", 'expected trace, debug, info, warn or error, got "loud"'),
        ("log_level: critical", "expected trace, debug, info, warn or error"),
        ("log_level: 3", "expected trace, debug, info, warn or error, got 3"),
        ("log_format: xml", 'expected auto, json or text, got "xml"'),
        ("die_with_parent: 1", "expected true or false, got 1"),
        ("die_with_parent: 'yes'", 'expected true or false, got "yes"'),
        ("execution_retention: 5x", "expected seconds or a duration"),
        ("shutdown_grace: -1", "expected seconds or a duration"),
        ("queue_limit: many", "expected an integer, got"),
        ("executor_nice: 20", "expected an integer of at most 19, got 20"),
        ("instance: 100", "expected an integer of at most 99, got 100"),
        ("host: ''", "expected a string that is not empty"),
        ("host: 127", "expected a string, got 127"),
        ("log_file: [a]", "expected a string"),
        ("env_allow: PATH", "expected an array"),
        ("env_allow: [1]", "[0]: expected a string, got 1"),
        ("readonly_extra_args: [a, --host=x]", "[1]: --host is set by the manager itself"),
        ("env_allow: [A, PATH]", "[1]: PATH changes what code children load"),
        ("env_allow: [OPENSSL_CONF]", "[0]: OPENSSL_CONF changes what code"),
        ("reroute_to: ${nope}", "unknown variable ${nope}"),
        ("log_levl: info", "unknown key; did you mean log_level?"),
        ("prot: 1", "unknown key; did you mean port?"),
        ("allowed_hosts: [MY.node:3999]", "expected a host alone, got"),
        ("allowed_hosts: ['https://my.node/x']", "write my.node"),
        ("allowed_hosts: ['[::1]:80']", "write ::1"),
        ("allowed_hosts: ['a*.node']", "expected a name, *.name or *"),
        ("allowed_hosts: ['*node.example']", "expected a name, *.name or *"),
        ("allowed_hosts: ['*.*']", "expected a name, *.name or *"),
        ("allowed_hosts: ['*.']", "expected a name, *.name or *"),
    ],
)
def test_a_wrong_line_stops_the_start_naming_file_key_and_reason(
    line: str, reason: str, tmp_path: Path
) -> None:
    path = write_settings(tmp_path, line + "\n")
    message = refused({"root": str(tmp_path)}, {})
    assert message.startswith(f"{path}: {line.partition(':')[0]}: ")
    assert reason in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n", "expected a mapping of settings, got an array"),
        ("just text\n", "expected a mapping of settings, got a string"),
        ("a: [\n", "not YAML"),
        ("a: !!python/object:os.system {}\n", "not YAML"),
        ("host: a\n\thost: b\n", "not YAML"),
        ("? [a]\n: b\n", "not YAML"),
    ],
)
def test_a_file_of_another_form_is_refused_by_its_name(
    text: str, reason: str, tmp_path: Path
) -> None:
    path = write_settings(tmp_path, text)
    message = refused({"root": str(tmp_path)}, {})
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_a_file_that_is_nested_without_end_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write_settings(tmp_path, "host: " + "[" * 20_000)
    assert refused({"root": str(tmp_path)}, {}).startswith(f"{path}: ")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    # One of the two has no effect, and nobody would say which.
    path = write_settings(tmp_path, "permits: 4\npermits: 400\n")
    message = refused({"root": str(tmp_path)}, {})
    assert message == f"{path}: not YAML: line 2: this key appears twice"


def test_bytes_that_are_no_text_are_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    path = write_settings(tmp_path, "")
    path.write_bytes(b"host: \xff\n")
    assert refused({"root": str(tmp_path)}, {}).startswith(f"{path}: not YAML")


@pytest.mark.parametrize(
    ("flags", "environ", "start"),
    [
        ({"port": "x"}, {}, "flag --port: expected an integer"),
        ({"queue_limit": "-1"}, {}, 'flag --queue-limit: expected an integer, got "-1"'),
        ({"queue_limit": "["}, {}, "flag --queue-limit: expected an integer"),
        ({"socket": ""}, {}, "flag --socket: expected a string that is not empty"),
        (
            {},
            {"GENVM_MANAGER_LOG_LEVEL": "loud"},
            "environment variable GENVM_MANAGER_LOG_LEVEL: expected trace",
        ),
        (
            {},
            {"GENVM_MANAGER_PERMITS": "lots"},
            "environment variable GENVM_MANAGER_PERMITS: expected an integer",
        ),
    ],
)
def test_a_wrong_flag_or_variable_is_named(
    flags: dict[str, str], environ: dict[str, str], start: str, tmp_path: Path
) -> None:
    assert refused({"root": str(tmp_path), **flags}, environ).startswith(start)


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    path = write_settings(tmp_path, "permits: x\nprot: 1\n")
    environ = {"GENVMROOT": str(tmp_path), "GENVM_MANAGER_LOG_FORMAT": "xml"}
    message = refused({"port": "x"}, environ)
    for place in (
        "flag --port: ",
        "variable GENVM_MANAGER_LOG_FORMAT: ",
        f"{path}: permits: ",
        f"{path}: prot: ",
    ):
        assert place in message


def test_check_config_says_what_is_wrong_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-config", "--root", str(tmp_path), "--port", "x"]) == 1
    assert capsys.readouterr().err.startswith("genvm-manager: flag --port: ")


def test_check_config_accepts_what_is_right_and_repeats_the_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_settings(tmp_path, "threads: 4\n")
    assert main(["check-config", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "threads has no effect" in out
    assert "configuration is valid" in out


def test_a_flag_without_a_value_means_true(tmp_path: Path) -> None:
    assert main(["check-config", "--root", str(tmp_path), "--die-with-parent"]) == 0
    assert main(["check-config", "--die-with-parent", "--root", str(tmp_path)]) == 0
    assert main(["check-config", "--root", str(tmp_path), "--die-with-parent=maybe"]) == 1


# --- files of earlier managers ---

LEGACY = """\
threads: 4
blocking_threads: 16
log_disable: tracing*,polling*,tungstenite*
log_level: info
manifest_path: ${exeDir}/../data/manifest.yaml
permits: null
"""


def test_a_configuration_of_the_manager_that_we_replace_loads(tmp_path: Path) -> None:
    path = write_settings(tmp_path, LEGACY)
    (tmp_path / "data").mkdir()
    manifest = tmp_path / "data" / "manifest.yaml"
    manifest.write_text("executor_versions:\n")
    config = load_config({"root": str(tmp_path)}, {})
    assert config.manifest_path == manifest
    assert (config.log_level, config.permits) == ("info", None)
    for key in LEGACY_SETTINGS:
        about = [note for note in config.notes if f"{path}: {key} " in note]
        assert len(about) == 1, "each is said once"
    manifest.unlink()
    assert (
        refused({"root": str(tmp_path)}, {}) == f"{path}: manifest_path: {manifest} does not exist"
    )


# --- templates ---


def test_texts_in_the_file_are_expanded(tmp_path: Path) -> None:
    write_settings(
        tmp_path,
        "log_file: ${genvmRoot}/log/${ENV[NAME]}.log\n"
        "auth_token_file: ${exeDir}/token-${genvmVersion}\n",
    )
    (tmp_path / "bin").mkdir()
    write_token(tmp_path / "bin" / f"token-{genvm_manager.__version__}")
    config = load_config({"root": str(tmp_path)}, {"NAME": "n"})
    assert config.log_file == tmp_path / "log" / "n.log"
    assert config.auth_token_file == tmp_path / "bin" / f"token-{genvm_manager.__version__}"


def test_texts_in_a_list_are_expanded(tmp_path: Path) -> None:
    write_settings(tmp_path, 'allowed_hosts: ["${ENV[NAME]}.example", other]\n')
    config = load_config({"root": str(tmp_path)}, {"NAME": "n"})
    assert config.allowed_hosts == ("n.example", "other")


def test_flags_and_variables_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "executor" / "${exeDir}"
    folder.mkdir(parents=True)
    config = load_config({"root": str(tmp_path), "reroute_to": "${exeDir}"}, {})
    assert config.reroute_to == "${exeDir}"


# --- root, configuration file and manifest ---


def test_the_root_is_genvmroot_if_set(tmp_path: Path) -> None:
    file = tmp_path / "bin" / "genvm_manager.py"
    assert default_root({"GENVMROOT": "/some/where/"}, file) == Path("/some/where")
    assert default_root({"GENVMROOT": ""}, file) == tmp_path.resolve()


def test_the_root_is_the_parent_of_bin(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    file = tmp_path / "bin" / "genvm-modules"
    file.touch()
    link = tmp_path / "link"
    link.symlink_to(file)
    assert default_root({}, file) == tmp_path.resolve()
    assert default_root({}, link) == tmp_path.resolve()


def test_the_root_is_else_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_root({}, Path("/opt/lib/genvm_manager.py")) == tmp_path
    assert load_config({}, {}).root == tmp_path


def test_root_has_precedence_like_any_setting(tmp_path: Path) -> None:
    other = tmp_path / "b"
    other.mkdir()
    environ = {"GENVMROOT": "/a", "GENVM_MANAGER_ROOT": str(other)}
    assert load_config({}, environ).root == other
    assert load_config({"root": str(tmp_path)}, environ).root == tmp_path
    assert load_config({}, environ).manifest_path == other / "data/manifest.yaml"


def test_relative_paths_start_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    config = load_config({"root": "r/../s", "socket": "x.sock"}, {})
    assert (config.root, config.socket) == (tmp_path / "s", tmp_path / "x.sock")


def test_with_no_file_the_manager_has_defaults_and_says_so(tmp_path: Path) -> None:
    config = load_config({"root": str(tmp_path)}, {})
    assert (config.host, config.port, DEFAULT_PORT) == ("127.0.0.1", None, 3999)
    assert config.manifest_path == tmp_path / "data" / "manifest.yaml"
    assert (config.queue_limit, config.max_body_bytes) == (1024, 64 * MIB)
    assert (config.execution_retention, config.retention_max_bytes) == (300.0, 256 * MIB)
    assert (config.capture_max_bytes, config.shutdown_grace) == (4 * MIB, 0.7)
    (note,) = config.notes
    assert "no configuration file" in note


@pytest.mark.parametrize(
    "flags", [{"config": "gone.yaml"}, {"manifest_path": "gone.yaml"}, {"reroute_to": "v9"}]
)
def test_a_file_that_is_named_explicitly_must_exist(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (name,) = flags.values()
    assert name in refused({"root": str(tmp_path), **flags}, {})
    ((key, value),) = flags.items()
    variable = {f"GENVM_MANAGER_{key.upper()}": value}
    assert name in refused({"root": str(tmp_path)}, variable)


def test_a_manifest_that_the_file_names_must_exist(tmp_path: Path) -> None:
    write_settings(tmp_path, "manifest_path: ${genvmRoot}/gone.yaml\n")
    assert "gone.yaml does not exist" in refused({"root": str(tmp_path)}, {})


def test_the_configuration_file_may_come_from_flag_or_variable(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"log_file: /{name}\n")
    write_settings(tmp_path, "log_file: /default\n")
    environ = {"GENVMROOT": str(tmp_path), "GENVM_MANAGER_CONFIG": str(tmp_path / "b")}
    assert load_config({}, environ).log_file == Path("/b")
    assert load_config({"config": str(tmp_path / "a")}, environ).log_file == Path("/a")
    assert load_config({}, {"GENVMROOT": str(tmp_path)}).log_file == Path("/default")


def test_a_configuration_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path}: cannot be read" in refused({"config": str(tmp_path)}, {})


# --- listening beyond this machine ---


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_token(host: str, tmp_path: Path) -> None:
    assert is_loopback(host)
    assert load_config({"root": str(tmp_path), "host": host}, {}).host == host


@pytest.mark.parametrize(
    ("flags", "places"),
    [
        ({}, ["tcp:3999:interface=127.0.0.1"]),
        ({"host": "::1", "port": "1"}, [r"tcp:1:interface=\:\:1"]),
        ({"socket": "/run/a=b:c"}, [r"unix:/run/a\=b\:c"]),
        ({"socket": "/s", "port": "0"}, ["tcp:0:interface=127.0.0.1", "unix:/s"]),
        (
            {"listen": "unix:/s,systemd:domain=UNIX:index=0"},
            ["systemd:domain=UNIX:index=0", "unix:/s"],
        ),
        ({"listen": "tcp:1:interface=localhost"}, ["tcp:1:interface=localhost"]),
        (
            {"listen": "unix:/s", "port": "0", "socket": "/t"},
            ["tcp:0:interface=127.0.0.1", "unix:/s", "unix:/t"],
        ),
    ],
)
def test_places_to_listen_at(flags: dict[str, str], places: list[str], tmp_path: Path) -> None:
    """What a setting names takes the place of the port, unless that is named, too."""
    assert [*load_config({"root": str(tmp_path), **flags}, {}).endpoints] == places


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "node.example", "127.0.0.1.nip"])
def test_anything_else_needs_a_token_or_an_explicit_flag(host: str, tmp_path: Path) -> None:
    flags = {"root": str(tmp_path), "host": host}
    message = refused(flags, {})
    assert message.startswith(f"flag --host: {host} is reachable")
    assert "auth_token_file" in message
    assert "--allow-unauthenticated" in message
    assert load_config({**flags, "allow_unauthenticated": "true"}, {}).host == host
    write_token(tmp_path / "t")
    assert load_config({**flags, "auth_token_file": f"{tmp_path}/t"}, {}).host == host
    assert load_config({**flags, "socket": "/s"}, {}).host == host, "no port is listened on"
    assert refused({**flags, "socket": "/s", "port": "0"}, {}).startswith("flag --host: ")


def test_the_token_is_read_without_the_newline(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("  s3cret \n")
    assert read_token(path) == "s3cret"


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe", None])
def test_a_token_file_without_a_token_is_refused_by_its_name(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"auth_token_file: {path}")):
        read_token(path)


@pytest.mark.parametrize(
    ("mode", "is_fine"),
    [(0o600, True), (0o400, True), (0o640, True), (0o644, False), (0o660, False), (0o604, False)],
)
def test_a_token_that_others_can_read_is_refused(mode: int, is_fine: bool, tmp_path: Path) -> None:
    path = tmp_path / "the token"
    write_token(path, mode=mode)
    flags = {"root": str(tmp_path), "auth_token_file": str(path)}
    if is_fine:
        assert load_config(flags, {}).auth_token_file == path
    else:
        message = refused(flags, {})
        assert message.startswith(f"flag --auth-token-file: {path}: others can read it")
        subprocess.run(["sh", "-c", message.partition("run: ")[2]], check=True)
        assert load_config(flags, {}).auth_token_file == path


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "the token"
    write_token(path, "0123456789abcde")
    flags = {"root": str(tmp_path), "auth_token_file": str(path)}
    message = refused(flags, {})
    assert "has 15 characters, fewer than 16; run: printf" in message
    assert "0123456789abcde" not in message
    subprocess.run(["sh", "-c", message.partition("run: ")[2]], check=True)
    assert load_config(flags, {}).auth_token_file == path
    assert len(read_token(path)) == 64
    write_token(path, "0123456789abcdef\n")
    assert load_config(flags, {}).auth_token_file == path


def test_who_types_a_password_for_the_token_has_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(genvm_manager, "FILE_SECONDS", 0.05)
    quick, slow = tmp_path / "quick", tmp_path / "slow"
    for path in (quick, slow):
        os.mkfifo(path)
    with pytest.raises(ConfigError, match="no answer within"):
        read_token(quick)
    quick.write_text("too late")  # lets go of the thread that still reads
    typing = threading.Timer(0.3, slow.write_text, ["s3cret"])
    typing.start()
    assert read_token(slow, is_patient=True) == "s3cret"
    typing.join()


@pytest.mark.parametrize("name", ["..", ".", "../bin", "/usr", "v1/../../bin", "a/"])
def test_a_replacement_for_all_versions_is_a_plain_folder(name: str, tmp_path: Path) -> None:
    for folder in ("executor/v1", "bin", "executor/a"):
        (tmp_path / folder).mkdir(parents=True)
    message = refused({"root": str(tmp_path), "reroute_to": name}, {})
    assert message.startswith("flag --reroute-to: expected a folder's name, got")


# --- log levels ---


def test_log_levels_have_any_letter_case() -> None:
    for text in ("trace", "DEBUG", "Info", " warn ", "error"):
        assert LevelName.parse(text) == text.strip().lower()
    assert LevelName.parse("WARNING") == "warn"


# --- automatic permits ---


def write_tree(root: Path, files: dict[str, str]) -> None:
    """Write a tree of small files, as the kernel shows them."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def meminfo(available: int, swap: int = 0) -> dict[str, str]:
    """Return ``/proc/meminfo`` for some GiB."""
    lines = {"MemTotal": 512, "MemFree": 1, "MemAvailable": available, "SwapFree": swap}
    text = "\n".join(f"{name}:  {size << 20} kB" for name, size in lines.items())
    return {"proc/meminfo": text + "\nHugePages_Total:       0"}


def permits_in(root: Path, files: dict[str, str]) -> int:
    """Return the automatic permits in a machine that consists of some files."""
    write_tree(root, files)
    return automatic_permits(root / "proc", root / "cgroup")


@pytest.mark.parametrize(
    ("available", "swap", "permits"),
    [
        (64, 0, 16),
        (63, 0, 15),
        (62, 2, 16),
        (8, 0, 2),
        (11, 0, 2),
        (12, 0, 3),
        (1, 1, 2),
        (0, 0, 2),
    ],
)
def test_permits_follow_available_memory_and_free_swap(
    available: int, swap: int, permits: int, tmp_path: Path
) -> None:
    assert permits_in(tmp_path, meminfo(available, swap)) == permits


def test_permits_are_two_where_nothing_can_be_read(tmp_path: Path) -> None:
    assert automatic_permits(tmp_path / "none", tmp_path / "none") == 2


def gib(number: int) -> str:
    return str(number * GIB)


V2 = {"proc/self/cgroup": "0::/a/b"}


@pytest.mark.parametrize(
    ("files", "permits"),
    [
        ({"cgroup/a/b/memory.max": gib(20), "cgroup/a/b/memory.current": gib(4)}, 4),
        ({"cgroup/a/b/memory.max": gib(20)}, 5),
        ({"cgroup/a/b/memory.max": "max"}, 25),
        ({"cgroup/a/memory.max": gib(12), "cgroup/a/b/memory.max": gib(40)}, 3),
        ({"cgroup/a/memory.max": gib(40), "cgroup/a/b/memory.max": gib(12)}, 3),
        ({"cgroup/memory.max": gib(16), "cgroup/a/b/memory.max": "max"}, 4),
        ({"cgroup/a/b/memory.max": gib(20), "cgroup/a/b/memory.current": gib(30)}, 2),
        ({"cgroup/a/b/memory.max": gib(1000)}, 25),
        (
            {
                "cgroup/a/b/memory.max": gib(20),
                "cgroup/a/b/memory.current": gib(12),
                "cgroup/a/b/memory.stat": f"anon 1\ninactive_file {gib(8)}\nfile 0",
            },
            4,
        ),
    ],
)
def test_a_control_group_of_version_2_limits_the_permits(
    files: dict[str, str], permits: int, tmp_path: Path
) -> None:
    assert permits_in(tmp_path, {**meminfo(100), **V2, **files}) == permits


@pytest.mark.parametrize(
    ("limit", "permits"), [("0", 3), (gib(8), 5), ("max", 6)], ids=["none", "some", "any"]
)
def test_a_control_group_limits_the_swap(limit: str, permits: int, tmp_path: Path) -> None:
    files = {"cgroup/a/b/memory.swap.max": limit}
    assert permits_in(tmp_path, {**meminfo(12, swap=12), **V2, **files}) == permits


def test_swap_that_the_control_group_uses_does_not_count(tmp_path: Path) -> None:
    files = {"cgroup/a/b/memory.swap.max": gib(8), "cgroup/a/b/memory.swap.current": gib(4)}
    assert permits_in(tmp_path, {**meminfo(12, swap=50), **V2, **files}) == 4


V1 = {"proc/self/cgroup": "11:cpu,cpuacct:/x\n5:hugetlb,memory:/a/b\n1:name=systemd:/y\n0::/z"}


@pytest.mark.parametrize(
    ("files", "permits"),
    [
        ({"a/b/memory.limit_in_bytes": gib(20), "a/b/memory.usage_in_bytes": gib(8)}, 3),
        ({"a/b/memory.limit_in_bytes": "9223372036854771712"}, 25),
        ({"memory.limit_in_bytes": gib(16)}, 4),
    ],
)
def test_a_control_group_of_version_1_limits_the_permits(
    files: dict[str, str], permits: int, tmp_path: Path
) -> None:
    tree = {f"cgroup/memory/{name}": text for name, text in files.items()}
    assert permits_in(tmp_path, {**meminfo(100), **V1, **tree}) == permits


def test_other_controllers_of_version_1_do_not_count(tmp_path: Path) -> None:
    tree = {"cgroup/memory/x/memory.limit_in_bytes": gib(1)}
    assert permits_in(tmp_path, {**meminfo(100), **V1, **tree}) == 25


def test_a_control_group_path_from_outside_a_container_falls_back_to_its_root(
    tmp_path: Path,
) -> None:
    files = {"proc/self/cgroup": "0::/../../docker/abc", "cgroup/memory.max": gib(16)}
    assert permits_in(tmp_path, {**meminfo(100), **files}) == 4


# --- the single file ---


def listed_dependencies() -> list[str]:
    """Return the dependencies in the PEP 723 header of the file."""
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", SOURCE.read_text())
    assert block is not None
    lines = block["content"].splitlines()
    data = tomllib.loads("\n".join(line[2:] if line[1:2] == " " else line[1:] for line in lines))
    assert set(data) == {"requires-python", "dependencies"}
    return [*data["dependencies"], "python" + data["requires-python"]]


def test_the_header_of_the_file_and_the_package_list_the_same_dependencies() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    expected = [*project["dependencies"], "python" + project["requires-python"]]
    assert sorted(listed_dependencies()) == sorted(expected)


def test_the_versions_of_production_are_those_that_the_package_asks_for() -> None:
    text = (PROJECT / "requirements.lock").read_text()
    entries = re.findall(
        r"(?m)^(\S+)==(\S+)(?: ; .*)? \\\n((?:    --hash=sha256:\w{64}.*\n)+)", text
    )
    pinned = {name: version for name, version, _ in entries}
    assert len(pinned) == text.count("=="), "each has its hashes"
    for line in listed_dependencies():
        wanted = Requirement(line)
        if wanted.name != "python":
            assert wanted.specifier.contains(pinned[wanted.name.lower()]), line


def test_all_public_names_exist() -> None:
    assert len(set(genvm_manager.__all__)) == len(genvm_manager.__all__)
    for name in genvm_manager.__all__:
        assert getattr(genvm_manager, name) is not None


def test_the_file_itself_does_not_choose_a_reactor() -> None:
    top_level = ast.parse(SOURCE.read_text()).body
    imported = {
        f"{node.module}.{alias.name}"
        for node in top_level
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert "twisted.internet.defer.Deferred" in imported
    assert "twisted.internet.reactor" not in imported


def bound_names(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement at the top of a file binds, other than imports."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for part in (part for target in targets for part in ast.walk(target)):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id


def test_no_section_binds_a_name_of_another_one() -> None:
    """A second constant of the same name would change the first one, far away."""
    names = [n for node in ast.parse(SOURCE.read_text()).body for n in bound_names(node)]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def closure(requirements: list[str]) -> set[str]:
    """Return the names of everything that is installed with some requirements."""
    found: set[tuple[str, str]] = set()
    names: set[str] = set()
    todo = [
        (item.name, extra)
        for text in requirements
        for item in [Requirement(text)]
        for extra in ("", *item.extras)
    ]
    while todo:
        name, extra = todo.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if (key, extra) in found:
            continue
        found.add((key, extra))
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        names.add(key)
        for text in needs:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(need.name, inner) for inner in ("", *need.extras)]
    return names


def test_the_file_alone_needs_nothing_but_the_listed_packages(tmp_path: Path) -> None:
    shutil.copy(SOURCE, tmp_path / "genvm_manager.py")
    script = (
        "import json, sys\n"
        "before = set(sys.modules)\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import genvm_manager\n"
        "genvm_manager.load_http()\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=2 * PATIENCE,
    )
    loaded = set(json.loads(run.stdout)) - sys.stdlib_module_names - {"genvm_manager"}
    packages = importlib.metadata.packages_distributions()
    allowed = closure([text for text in listed_dependencies() if not text.startswith("python>")])
    assert {"twisted", "klein", "attr", "msgspec", "treq", "yaml"} <= loaded
    for module in loaded & set(packages):
        owners = {re.sub(r"[-_.]+", "-", name).lower() for name in packages[module]}
        assert owners & allowed, f"{module} comes from {owners}, which nobody lists"


@pytest.mark.parametrize(
    ("name", "options", "is_imported"),
    [
        ("genvm_manager.py", [], True),
        ("renamed.py", [], True),
        ("genvm-manager", [], False),
        ("genvm_manager.v2.py", [], False),
        ("genvm_manager.py", ["-X", "utf8"], False),
    ],
)
def test_the_file_runs_whatever_its_name_is(
    tmp_path: Path, name: str, options: list[str], is_imported: bool
) -> None:
    """As a script it imports itself if it can; nobody sees a difference but in its memory."""
    shutil.copy(SOURCE, tmp_path / name)
    arguments = ["check-config", "--root", str(tmp_path), "--port", "with space", "--host", ""]
    run = subprocess.run(
        [sys.executable, *options, name, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": ""},
        capture_output=True,
        check=False,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("genvm-manager: flag --host: expected a string that is not empty")
    assert 'got "with space"' in run.stderr
    assert (tmp_path / "__pycache__").exists() == is_imported


def test_other_unknown_keys_are_said_in_the_log(tmp_path: Path) -> None:
    path = write_settings(tmp_path, "session_limit: 5\n1: 2\nport: 5\n")
    config = load_config({"root": str(tmp_path)}, {})
    assert config.port == 5
    assert config.notes == tuple(
        f"{path}: {key}: unknown key: ignored" for key in ("session_limit", "1")
    )


@pytest.mark.parametrize("text", ["*", "*.node.example", "my.node", "::1", "10.0.0.1", "[FD00::5]"])
def test_hosts_that_may_be_allowed(text: str, tmp_path: Path) -> None:
    config = load_config({"root": str(tmp_path), "allowed_hosts": text}, {})
    assert config.allowed_hosts == (text.strip("[]").lower(),)
