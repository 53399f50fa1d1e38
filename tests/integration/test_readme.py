"""README's examples: every curl command in it works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
from attrs import frozen

from .support import PROJECT, SOURCE, Daemon, Root

README = PROJECT / "README.md"
ADDRESS = "http://127.0.0.1:3999"
BLOCK = re.compile(r"^```(?:sh|console|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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


EXAMPLES = list(examples(README.read_text(encoding="utf-8"))) if README.exists() else []


@pytest.fixture(scope="module")
def readme_daemon() -> Iterator[Daemon]:
    """A daemon on a root made by the command that README names."""
    root = Root()
    folder = root.path / "practice"
    argv = [sys.executable, str(SOURCE)]
    subprocess.run([*argv, "practice-root", str(folder)], check=True, timeout=30)
    daemon = Daemon([*argv, "serve", "--root", str(folder), "--port", "0"])
    daemon.wait_until_listening()
    yield daemon
    daemon.close()
    root.close()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8, f"{README} has {len(EXAMPLES)} curl commands in its shell blocks"
    commands = " ".join(example.command for example in EXAMPLES)
    for path in ("/genvm/run", "/genvm/1", "/status", "/permits", "/log/level", "/env", "/drain"):
        assert f"{ADDRESS}{path}" in commands


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line {example.line}")
def test_example(readme_daemon: Daemon, example: Example) -> None:
    """In the order of the README, on one daemon: later examples may use what earlier ones made."""
    command = example.command.replace(ADDRESS, f"http://{readme_daemon.address}")
    assert command != example.command, f"it is about {ADDRESS}"
    command = command.replace("curl ", r"curl -w '\n%{http_code}' ", 1)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    body, _, code = done.stdout.rpartition("\n")
    reply = json.loads(body)
    assert ("error" in reply) == example.fails, reply
    assert (code == "200") != example.fails
    documented = example.reply.strip()
    if documented.startswith(("{", "[")):
        if "…" not in documented and "..." not in documented:
            assert reply == json.loads(documented)
        missing = [key for key in KEY.findall(documented) if f'"{key}"' not in body]
        assert missing == [], f"documented, but not in {body}"
