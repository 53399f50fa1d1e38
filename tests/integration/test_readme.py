"""README's examples: every curl command in it works as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from attrs import frozen

from genvm_manager import (
    API_ENDPOINTS,
    CLIENT_COMMANDS,
    SETTINGS,
    Ending,
    ManagerError,
    load_config,
    parse_manifest,
)

from .support import PROJECT, SOURCE, WAIT, Daemon, Root

README = PROJECT / "README.md"
TEXT = README.read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:3999"
BLOCK = re.compile(r"^```(?:sh|console|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
README_ID = "60184327519700"
KEY = re.compile(r'"([A-Za-z_]+)":')


@frozen
class Example:
    """A curl command, and the reply that the comments after it document."""

    line: int
    command: str
    reply: str

    @property
    def fails(self) -> bool:
        """Whether the README says that this one is an error."""
        return self.command.rstrip().endswith("# error")


def is_complete(command: str) -> bool:
    """Tell whether all quotes of a command are closed and it does not go on."""
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return not command.endswith("\\")


def examples(text: str) -> Iterator[Example]:
    """Yield every curl command in the shell blocks of a Markdown text."""
    for block in BLOCK.finditer(text):
        first_line = text[: block.start(1)].count("\n") + 1
        lines = block[1].splitlines()
        at = 0
        while at < len(lines):
            start, command = at, lines[at].removeprefix("$ ")
            at += 1
            while command and not is_complete(command) and at < len(lines):
                command += f"\n{lines[at]}"
                at += 1
            reply = ""
            while at < len(lines) and lines[at].startswith("#"):
                reply += lines[at][1:].strip() + " "
                at += 1
            if command.startswith("curl "):
                yield Example(first_line + start, command, reply)


EXAMPLES = list(examples(TEXT))


@pytest.fixture(scope="module")
def readme_daemon() -> Iterator[Daemon]:
    """A daemon on a root made by the command that README names."""
    root = Root()
    folder = root.path / "practice"
    argv = [sys.executable, str(SOURCE)]
    subprocess.run([*argv, "practice-root", str(folder)], check=True, timeout=2 * WAIT)
    daemon = Daemon([*argv, "serve", "--root", str(folder), "--port", "0"])
    daemon.wait_until_listening()
    yield daemon
    daemon.close()
    root.close()


@pytest.fixture(scope="module")
def run_ids() -> list[str]:
    """The ids that the examples got; README has another one in place of the first."""
    return []


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8, f"{README} has {len(EXAMPLES)} curl commands in its shell blocks"
    commands = " ".join(example.command for example in EXAMPLES)
    for path in ("/genvm/run", "/genvm/$id", "/status", "/permits", "/log/level", "/env", "/drain"):
        assert f"{ADDRESS}{path}" in commands


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line {example.line}")
def test_example(readme_daemon: Daemon, run_ids: list[str], example: Example) -> None:
    """In the order of the README, on one daemon: later examples may use what earlier ones made."""
    command = example.command.replace(ADDRESS, f"http://{readme_daemon.address}")
    assert command != example.command, f"it is about {ADDRESS}"
    command = command.replace("curl ", r"curl -w '\n%{http_code}' ", 1)
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=2 * WAIT,
        check=False,
        env={**os.environ, **({"id": run_ids[0]} if run_ids else {})},
    )
    assert done.returncode == 0, done.stderr
    body, _, code = done.stdout.rpartition("\n")
    reply = json.loads(body)
    assert ("error" in reply) == example.fails, reply
    assert (code == "200") != example.fails
    if "id" in reply:
        run_ids.append(str(reply["id"]))
    documented = example.reply.strip()
    if run_ids:
        documented = documented.replace(README_ID, run_ids[0])
    if documented.startswith(("{", "[")):
        if "…" not in documented and "..." not in documented:
            assert reply == json.loads(documented)
        missing = [key for key in KEY.findall(documented) if f'"{key}"' not in body]
        assert missing == [], f"documented, but not in {body}"


# --- what it lists ---


def yaml_block(beginning: str) -> str:
    """Return the YAML block that begins with this text."""
    (found,) = re.findall(rf"^```yaml\n({re.escape(beginning)}.*?)^```$", TEXT, re.M | re.S)
    return str(found)


def codes_of(kind: type[ManagerError]) -> set[str]:
    """Return the codes of an error and of all that are derived from it."""
    return {kind.code}.union(*(codes_of(child) for child in kind.__subclasses__()))


def test_every_endpoint_is_listed() -> None:
    endpoints = {(each.method, each.path.replace("{genvm_id}", "ID")) for each in API_ENDPOINTS}
    assert len(endpoints) == len(API_ENDPOINTS)
    listed = set(re.findall(r"`(GET|POST|DELETE) (/[^` ]*)`", TEXT))
    assert endpoints <= listed
    assert {path for _, path in listed} == {path for _, path in endpoints}


def test_every_error_is_listed() -> None:
    # These have no way to a client: they stop the start, or become another error or a result.
    inside = {"config_invalid", "calldata_invalid", "host_protocol_error", "provider_error"}
    listed = set(re.findall(r"`([a-z_]+)`", TEXT))
    assert codes_of(ManagerError) - inside <= listed


def test_the_commands_and_exit_statuses_of_the_client() -> None:
    section = TEXT.partition("### From the terminal\n")[2].partition("\n### ")[0]
    commands, statuses = re.findall(r"^\|[-|]+\|\n((?:\|.*\n)+)", section, re.M)
    named = re.findall(
        r"`([a-z-]+)( [^`]*)?`", "".join(row.split(" | ")[0] for row in commands.splitlines())
    )
    assert {name for name, _ in named} == {*CLIENT_COMMANDS}
    for name, rest in named:
        takes = {word for words, _ in CLIENT_COMMANDS[name].arguments for word in words.split()}
        assert {*re.findall(r"--?[a-z-]+", rest)} <= takes
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in statuses.splitlines()]
    assert rows == [[str(ending.value), ending.meaning] for ending in Ending]


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", TEXT)
    assert len(named) > 20
    for path, name in named:
        text = (PROJECT / "tests" / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, f"{path} has no {name}"


def test_every_setting_is_listed() -> None:
    assert set(SETTINGS) <= set(re.findall(r"`([a-z_]+)`", TEXT))


def test_the_configuration_files_load(readme_daemon: Daemon, tmp_path: Path) -> None:
    manifest = tmp_path / "data" / "manifest.yaml"
    manifest.parent.mkdir()
    manifest.write_text(yaml_block("executor_versions:"))
    assert len(parse_manifest(manifest.read_text(), "README").versions) == 2
    path = tmp_path / "settings.yaml"
    path.write_text(yaml_block("# config/genvm-manager.yaml"))
    config = load_config({"config": str(path), "root": str(tmp_path)}, {})
    assert (config.permits, config.execution_retention) == (16, 600)
    settings = yaml.safe_load(yaml_block("# config/genvm-module-llm.yaml"))
    body = {"module_type": "llm", "config": {**settings, "bind_address": "127.0.0.1:0"}}
    assert readme_daemon.post("/module/start", body) == {"result": "module_started"}
    assert readme_daemon.post("/module/stop", body) == {"result": "module_stopped"}
