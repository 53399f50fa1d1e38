"""What a log line holds, which lines pass, and that writing them never blocks."""

from __future__ import annotations

import fcntl
import json
import os
import random
import secrets
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.logger import ILogObserver, Logger, LogLevel
from twisted.python.failure import Failure

from genvm_manager import (
    LOG_BACKLOG_BYTES,
    LOG_LEVELS,
    MIB,
    Config,
    ConfigError,
    LevelName,
    LogForwarder,
    LogObserver,
    LogWriter,
    ManagerError,
    Redactor,
    event_level,
)

from .support import PATIENCE, observing


def logger_to(observer: LogObserver) -> Logger:
    """Return a logger whose events reach one observer only."""
    return Logger("test", observer=cast(ILogObserver, observer))


class Log:
    """An observer, and what it wrote."""

    def __init__(self, **settings: Any) -> None:
        self.written = bytearray()
        self.observer = LogObserver(Config(**settings), self.written.extend)
        self.logger = logger_to(self.observer)

    @property
    def lines(self) -> list[str]:
        """Every line so far."""
        text = self.written.decode()
        assert text == "" or text.endswith("\n")
        return text.splitlines()

    @property
    def records(self) -> list[dict[str, Any]]:
        """Every line so far as the JSON object that it must be."""
        return [json.loads(line, parse_constant=_refuse) for line in self.lines]

    @property
    def record(self) -> dict[str, Any]:
        """The only line."""
        (record,) = self.records
        return record


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


# --- the form of a line ---


def test_a_line_is_a_json_object_with_time_level_message_and_fields() -> None:
    log = Log()
    log.observer(
        {
            "log_time": 1_735_689_600.25,
            "log_level": LogLevel.warn,
            "log_format": "{n} files",
            "log_namespace": "genvm_manager.X",
            "n": 3,
            "genvm_id": 7,
            "ok": True,
            "none": None,
            "nested": {"a": [1, "x"]},
        }
    )
    assert log.record == {
        "time": "2025-01-01T00:00:00.250Z",
        "level": "warn",
        "message": "3 files",
        "n": 3,
        "genvm_id": 7,
        "ok": True,
        "none": None,
        "nested": {"a": [1, "x"]},
    }


@given(st.sampled_from(["json", "text"]), st.text())
@example("text", "a\x85b")
def test_any_text_is_one_line_of_the_log(log_format: str, text: str) -> None:
    log = Log(log_format=log_format)
    log.logger.info("{text}", text=text)
    assert len(log.written.decode().splitlines()) == 1
    if log_format == "json":
        assert log.record["message"] == text


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\u2028b", "\x1b[31mred", "a\x00b"])
def test_text_from_others_cannot_forge_a_line_for_people(text: str) -> None:
    # An executor chooses its messages: a newline must not start a line that looks like ours.
    log = Log(log_format="text")
    log.logger.info("{text}", text=text)
    assert len(log.written.decode().splitlines()) == 1
    assert b"\x1b" not in log.written


def test_braces_in_text_are_only_text() -> None:
    log = Log()
    for text in ("{", "}", "{}", "{missing}", "{text!r}", "{0}", "{text.__class__}"):
        log.logger.info("{text}", text=text)
    assert [record["message"] for record in log.records] == [
        *("{", "}", "{}", "{missing}", "{text!r}", "{0}", "{text.__class__}")
    ]


def test_a_line_for_people_holds_the_same() -> None:
    log = Log(log_format="text")
    log.observer(
        {
            "log_time": 1_735_689_600.0,
            "log_level": LogLevel.error,
            "log_format": "no {what}",
            "what": "luck",
            "genvm_id": 7,
        }
    )
    assert log.lines == ['2025-01-01T00:00:00.000Z error no luck what="luck" genvm_id=7']


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_text_that_utf8_cannot_hold_is_logged_all_the_same(log_format: str) -> None:
    log = Log(log_format=log_format)
    log.logger.info("{text}", text="half \ud800 a pair é")
    (line,) = log.lines
    assert "half" in line
    assert "ud800" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_a_number_that_json_does_not_have_leaves_the_line_json(value: object) -> None:
    log = Log()
    log.logger.info("x", value=value)
    assert log.record["message"] == "x"


@pytest.mark.parametrize(
    "value",
    [{1: 2, None: 3}, {("a", 1): 2}, [Path("/x")], {"a": b"x"}, object(), b"bytes", (1, 2)],
)
def test_any_value_of_a_field_leaves_the_line_json(value: object) -> None:
    log = Log()
    log.logger.info("x", value=value)
    assert log.record["message"] == "x"


def test_a_field_cannot_replace_level_time_or_message() -> None:
    log = Log()
    event = {"log_format": "said", "log_time": 0.0, "log_level": LogLevel.info}
    log.observer({**event, "level": "evil", "time": "never", "message": "other"})
    record = log.record
    assert record["level"] == "info"
    assert record["message"] == "said"
    assert record["time"].endswith("Z")


def test_a_failure_is_logged_with_its_traceback() -> None:
    for log_format in ("json", "text"):
        log = Log(log_format=log_format)
        try:
            raise ValueError("the reason")
        except ValueError:
            log.logger.failure("it {what}", what="broke")
        text = log.written.decode()
        assert "it broke" in text
        assert "ValueError: the reason" in text
        assert "test_logging.py" in text
    assert Log().written == b""


# --- levels ---

EVENTS: dict[str, dict[str, Any]] = {
    "trace": {"level_name": "trace"},
    "debug": {"log_level": LogLevel.debug},
    "info": {"log_level": LogLevel.info},
    "warn": {"log_level": LogLevel.warn},
    "error": {"log_level": LogLevel.error},
    "critical": {"log_level": LogLevel.critical},
}


def levels_that_pass(log: Log) -> set[str]:
    """Log one event of each level and return which were written."""
    log.written.clear()
    for name, event in EVENTS.items():
        log.observer({"log_format": name, "log_time": 0.0, **event})
    for record in log.records:
        assert record["level"] == record["message"]
    return {record["level"] for record in log.records}


@pytest.mark.parametrize("level", ["trace", "debug", "info", "warn", "error"])
def test_a_level_lets_itself_and_what_is_above_pass(level: str) -> None:
    log = Log(log_level=level)
    names = list(EVENTS)
    expected = set(names[names.index(level) :])
    assert levels_that_pass(log) == expected
    assert {name for name in EVENTS if log.observer.enabled(name)} == expected


def test_the_level_can_change_at_any_time() -> None:
    log = Log(log_level="error")
    assert levels_that_pass(log) == {"error", "critical"}
    log.observer.set_level("trace")
    assert levels_that_pass(log) == set(EVENTS)
    log.observer.set_level("warn")
    assert levels_that_pass(log) == {"warn", "error", "critical"}
    assert log.observer.level == "warn"


@pytest.mark.parametrize("written", ["trace", "Debug", "INFO", "warn", "Warning", "error"])
def test_lines_of_an_executor_pass_by_their_own_level(written: str) -> None:
    name = LevelName.parse(written)
    line = json.dumps({"level": written, "message": "m {brace}", "x": 1}).encode() + b"\n"
    for threshold in ("trace", "debug", "info", "warn", "error"):
        log = Log(log_level=threshold)
        with observing(log.observer):
            LogForwarder(7).add(3, line)
        if LOG_LEVELS[name] >= LOG_LEVELS[threshold]:
            record = log.record
            assert (record["level"], record["message"]) == (name, "m {brace}")
            assert (record["genvm_id"], record["record"]) == (7, {"x": 1})
        else:
            assert log.written == b""


@pytest.mark.parametrize(
    ("line", "level", "message"),
    [
        (b"plain text", "info", "genvm log"),
        (b'{"message": "m"}', "info", "m"),
        (b'{"level": "loud", "message": "m"}', "info", "m"),
        (b'{"level": null}', "info", "genvm log"),
        (b'{"level": "error", "message": {"a": 1}}', "error", '{"a": 1}'),
        (b'{"level": "warn", "message": NaN}', "info", "genvm log"),
        (b"\xff\xfe", "info", "genvm log"),
        (b"[1]", "info", "genvm log"),
    ],
)
def test_odd_lines_of_an_executor_are_forwarded_too(line: bytes, level: str, message: str) -> None:
    log = Log(log_level="trace")
    with observing(log.observer):
        forwarder = LogForwarder(1)
        forwarder.add(3, b"\n  \n" + line)
        assert log.written == b"", "the line is not complete yet, and empty ones say nothing"
        forwarder.end()
    assert (log.record["level"], log.record["message"]) == (level, message)


def test_the_chatter_of_the_framework_is_for_debugging() -> None:
    assert event_level({"log_level": LogLevel.info, "log_namespace": "twisted.web.http"}) == "debug"
    assert event_level({"log_level": LogLevel.info, "log_namespace": "genvm_manager"}) == "info"
    assert event_level({"log_level": LogLevel.warn, "log_namespace": "twisted.x"}) == "warn"
    assert event_level({}) == "info"
    assert event_level({"level_name": "whatever"}) == "info"


# --- redaction ---


def test_secrets_that_take_long_to_spell_hold_up_nobody() -> None:
    """Much of one owner is known as it is, and by its lines; only the first as others spell it."""
    redactor = Redactor()
    many = [("é/" * 8000) + str(n) for n in range(100)]
    begin = time.process_time()
    redactor.keep("request", ["a first+one", *many, "one line\nmore of it"])
    assert time.process_time() - begin < 1.0, "4.5 s before"
    assert many[50][:100] not in redactor.scrub(f"<{many[50]}>")
    assert redactor.scrub("a%20first%2Bone more of it") == "[redacted] [redacted]"


SECRETS = ["hunter2hunter2", 'quo"te\\slash', "umläut-sécret", "line\nbreak-secret", "{braces}x"]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_secret_is_masked_wherever_it_stands(secret: str, log_format: str) -> None:
    log = Log(log_format=log_format)
    log.observer.redactor.keep("secret", [secret])
    log.logger.info("says {text}", text=f"<{secret}>")
    log.logger.info("x", field=f"<{secret}>")
    log.logger.info("x", nested={"a": [f"<{secret}>", {"b": secret}]})
    log.logger.info("x", nested={f"<{secret}>": 1})
    try:
        raise ValueError(f"<{secret}>")
    except ValueError:
        log.logger.failure("failed")
    text = log.written.decode()
    for form in (secret, json.dumps(secret)[1:-1], json.dumps(json.dumps(secret))[3:-3]):
        assert form not in text
    assert text.count(Redactor.MASK) >= 6
    if log_format == "json":
        assert len(log.records) == 5


def test_the_longest_of_overlapping_secrets_is_masked_whole() -> None:
    redactor = Redactor()
    redactor.keep("secrets", ["secret-one", "secret-one-and-two", "secret-one"])
    assert redactor.scrub("a secret-one-and-two b secret-one c") == "a [redacted] b [redacted] c"


def test_short_texts_are_no_secrets() -> None:
    redactor = Redactor()
    redactor.keep("short", ["", "x" * (Redactor.SHORTEST - 1)])
    assert redactor.scrub("xxxxxx") == "xxxxxx"
    redactor.keep("longer", ["x" * Redactor.SHORTEST])
    assert redactor.scrub("xxxxxx").startswith(Redactor.MASK)


@pytest.mark.parametrize("length", [4, 5, 6, 7, 8, 13, 14, 15, 16, 23, 200])
def test_a_secret_is_found_at_every_place(length: int) -> None:
    redactor = Redactor()
    made_up = [f"{number:04}{'abcdefghij' * 20}"[:length] for number in range(200)]
    redactor.keep("made up", made_up)
    for before in range(20):
        head, secret, end = "-" * before, made_up[before], "-" * (before % 3)
        assert redactor.scrub(head + secret + end) == head + Redactor.MASK + end
        another = head + secret[:-1] + "!" + end
        assert redactor.scrub(another) == another


def test_texts_of_secrets_as_a_plain_search_finds_them() -> None:
    """By chance, from few letters, so that they overlap and hold one another."""
    rng = random.Random(12)
    for _ in range(300):
        found = ["".join(rng.choices("ab", k=rng.randint(4, 20))) for _ in range(5)]
        text = "".join(rng.choices("ab", k=rng.randint(0, 200)))
        redactor = Redactor()
        redactor.keep("secrets", found)
        hidden = [False] * len(text)
        for secret in found:
            for at in range(len(text)):
                if text.startswith(secret, at):
                    hidden[at : at + len(secret)] = [True] * len(secret)
        left = redactor.scrub(text).replace(Redactor.MASK, "")
        assert left == "".join(c for c, gone in zip(text, hidden, strict=True) if not gone)


SPELLED = 'sk-"quoted"/é\\+= %'


@pytest.mark.parametrize(
    "spell",
    [
        str,
        repr,
        json.dumps,
        lambda text: json.dumps(text, ensure_ascii=False),
        lambda text: json.dumps(text).replace("/", "\\/"),
        quote,
        quote_plus,
        lambda text: quote(text, safe=""),
    ],
)
def test_a_secret_is_known_however_it_is_spelled(spell: Callable[[str], str]) -> None:
    redactor = Redactor()
    redactor.keep("secret", [SPELLED])
    said = spell(SPELLED)
    left = redactor.scrub(f"<{said}>").strip("<>\"'")
    assert left == Redactor.MASK


def test_each_line_of_a_secret_is_one() -> None:
    redactor = Redactor()
    redactor.keep("key", ["-----BEGIN KEY-----\r\n  bGluZSAx\nbGluZS+y\n"])
    assert redactor.scrub("bGluZSAx, bGluZS%2By") == f"{Redactor.MASK}, {Redactor.MASK}"


def test_a_secret_goes_with_its_last_owner() -> None:
    redactor = Redactor()
    redactor.keep("one", ["shared-secret", "secret of one"])
    redactor.keep("two", ["shared-secret"])
    redactor.keep("one", ["another of one"])
    text = "shared-secret, secret of one, another of one"
    assert redactor.scrub(text) == "[redacted], secret of one, [redacted]"
    redactor.drop("two")
    redactor.drop("two")
    assert redactor.scrub(text) == "shared-secret, secret of one, [redacted]"
    with (
        redactor.keeping("a request", ["shared-secret"]),
        pytest.raises(ManagerError) as caught,
        redactor.keeping("a part of it", ["secret of one"]),
    ):
        raise ManagerError(text)
    assert caught.value.message == "[redacted], [redacted], [redacted]"
    assert redactor.scrub(text) == "shared-secret, secret of one, [redacted]"


KEYS = {
    "random": [secrets.token_urlsafe(40) for _ in range(2000)],
    "alike": [f"sk-{number:04}-{'x' * 40}" for number in range(2000)],
    "short": [secrets.token_hex(3) for _ in range(2000)],
    "one within another": ["x" * length for length in range(4, 1000)],
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_megabytes_take_milliseconds_whatever_is_secret(keys: list[str]) -> None:
    redactor = Redactor()
    redactor.keep("made up", keys)
    for text in ("x" * 4_000_000, "sk-xx 0123456789 " * 250_000, ",".join(keys * 30)[:4_000_000]):
        begin = time.thread_time()
        redactor.scrub(text)
        assert time.thread_time() - begin < 2.0, "the goal is 0.1 s"
    begin = time.thread_time()
    redactor.drop("made up")
    assert time.thread_time() - begin < 2.0, "the goal is 0.02 s"
    assert redactor.scrub(keys[0]) == keys[0]


def test_many_secrets_are_known_without_much_work() -> None:
    # They come from requests, and this happens on the reactor's thread.
    redactor = Redactor()
    begin = time.process_time()
    for number in range(300):
        redactor.keep(number, [f"a-secret-with-the-number-{number:06}"])
        redactor.scrub("a line without a secret " * 5)
    assert time.process_time() - begin < 1
    assert redactor.scrub("a-secret-with-the-number-000299") == Redactor.MASK


def test_a_secret_of_digits_does_not_break_lines_that_hold_the_number() -> None:
    log = Log()
    log.observer.redactor.keep("number", ["12345678"])
    log.logger.info("x", nested={"n": 12345678, "s": "12345678"})
    assert "12345678" not in log.record["nested"].values()


# --- the writer ---


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Return a pipe that nobody reads unless the test does."""
    reader, writer = os.pipe()
    # The smallest that the kernel gives, so that it is full after one page.
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    for fd in (reader, writer):
        os.close(fd)


def write_all(fd: int) -> Callable[[bytes], object]:
    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    return write


def drain(reader: int, until: Callable[[bytes], bool], count: int = 0) -> bytes:
    """Read until the last 4 KiB satisfy a condition and there are some bytes in all."""
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1 << 20)
    data = bytearray()
    while len(data) < count or not until(bytes(data[-4096:])):
        ready, _, _ = select.select([reader], [], [], PATIENCE)
        assert ready, f"nothing more came after {bytes(data[-200:])!r}"
        data += os.read(reader, 1 << 20)
    return bytes(data)


def anything(_: bytes) -> bool:
    return True


def within_patience(work: Callable[[], object], unblock: Callable[[], object]) -> bool:
    """Tell whether some work ends by itself; if not, unblock it so that the test can end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not thread.is_alive():
        return True
    unblock()
    thread.join(PATIENCE)
    return False


def test_before_the_start_lines_are_written_at_once() -> None:
    written: list[bytes] = []
    writer = LogWriter(written.append, 1.0)
    writer.put(b"a\n")
    writer.put(b"b\n")
    assert written == [b"a\n", b"b\n"]


def test_lines_keep_their_order_across_start_and_stop(pipe: tuple[int, int]) -> None:
    reader, fd = pipe
    writer = LogWriter(write_all(fd), PATIENCE)
    writer.put(b"before\n")
    writer.start()
    lines = [b"%d\n" % number for number in range(500)]
    for line in lines:
        writer.put(line)
    writer.stop()
    writer.put(b"after\n")
    expected = b"".join([b"before\n", *lines, b"after\n"])
    assert drain(reader, anything, len(expected)) == expected


def test_the_caller_never_waits_for_a_reader(pipe: tuple[int, int]) -> None:
    reader, fd = pipe
    writer = LogWriter(write_all(fd), 0.01)
    writer.start()
    line = b"x" * 999 + b"\n"
    total = 3 * LOG_BACKLOG_BYTES // len(line)

    def fill() -> None:
        for _ in range(total):
            writer.put(line)

    assert within_patience(fill, lambda: drain(reader, anything, 4 * MIB))
    # Once somebody reads, what waited arrives, and the numbers of lines that did not.
    data, kept, dropped = b"", 0, 0
    while kept + dropped < total:
        data += drain(reader, lambda data: b"dropped" in data and data.endswith(b"\n"))
        kept = data.count(line)
        notes = [json.loads(text) for text in data.splitlines() if b"dropped" in text]
        dropped = sum(note["dropped"] for note in notes)
    assert kept + dropped == total
    assert {note["level"] for note in notes} == {"warn"}
    assert LOG_BACKLOG_BYTES - 4096 <= kept * len(line) <= 2 * LOG_BACKLOG_BYTES


def test_the_note_on_dropped_lines_is_a_line_like_any_other(pipe: tuple[int, int]) -> None:
    reader, fd = pipe
    writer = LogWriter(write_all(fd), 0.01)
    writer.start()
    for _ in range(9):
        writer.put(b"x" * (MIB - 1) + b"\n")
    data = drain(reader, lambda data: b"dropped" in data and data.endswith(b"\n"))
    (note,) = [json.loads(text) for text in data.splitlines() if b"dropped" in text]
    assert {"time", "level", "message", "dropped"} <= set(note)


def test_one_very_long_line_is_written_or_reported_at_once(pipe: tuple[int, int]) -> None:
    # An executor's log line may have 12 MiB.
    reader, fd = pipe
    writer = LogWriter(write_all(fd), 0.01)
    writer.start()
    writer.put(b"x" * (LOG_BACKLOG_BYTES + 1) + b"\n")
    assert drain(reader, lambda data: data.endswith(b"\n"))


def test_stopping_does_not_wait_for_a_reader(pipe: tuple[int, int]) -> None:
    reader, fd = pipe
    writer = LogWriter(write_all(fd), 0.01)
    writer.start()
    writer.put(b"x" * 100_000 + b"\n")
    assert within_patience(writer.stop, lambda: drain(reader, anything, 100_001))
    drain(reader, anything, 100_001)


def test_a_line_after_the_stop_does_not_wait_for_a_reader(pipe: tuple[int, int]) -> None:
    # The reactor logs after us while it shuts down; that must not hold the process for ever.
    reader, fd = pipe
    writer = LogWriter(write_all(fd), 0.01)
    writer.start()
    writer.put(b"x" * 100_000 + b"\n")
    writer.stop()
    assert within_patience(
        lambda: writer.put(b"late\n"), lambda: drain(reader, lambda data: b"late" in data)
    )


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    tried: list[bytes] = []

    def broken(data: bytes) -> None:
        tried.append(data)
        raise BrokenPipeError

    writer = LogWriter(broken, PATIENCE)
    writer.put(b"a\n")
    writer.start()
    writer.put(b"b\n")
    writer.stop()
    writer.put(b"c\n")
    assert [data for data in tried if b"dropped" not in data] == [b"a\n", b"b\n", b"c\n"]
    told = json.loads(next(data for data in tried if b"dropped" in data))
    assert told["dropped"] == 2


def test_stdout_is_the_default(capfd: pytest.CaptureFixture[str]) -> None:
    observer = LogObserver(Config())
    logger_to(observer).info("to {where}", where="stdout")
    assert json.loads(capfd.readouterr().out)["message"] == "to stdout"


# --- files ---


def test_a_file_is_rotated_and_old_ones_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "m.log"
    config = Config(log_file=path, log_file_max_bytes=1000, log_file_backups=2)
    logger = logger_to(LogObserver(config))
    for number in range(100):
        logger.info("number {number}", number=number)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.log", "m.log.1", "m.log.2"]
    kept = [
        json.loads(line)["number"]
        for name in ("m.log.2", "m.log.1", "m.log")
        for line in (tmp_path / name).read_text().splitlines()
    ]
    assert kept == list(range(100 - len(kept), 100)), "whole lines, in order, the newest"
    assert all(file.stat().st_size < 2000 for file in tmp_path.iterdir())


def test_no_backups_means_that_none_are_kept(tmp_path: Path) -> None:
    config = Config(log_file=tmp_path / "m.log", log_file_max_bytes=1000, log_file_backups=0)
    logger = logger_to(LogObserver(config))
    for number in range(100):
        logger.info("number {number}", number=number)
    assert [file.name for file in tmp_path.iterdir()] == ["m.log"]


def test_a_size_of_zero_means_no_rotation(tmp_path: Path) -> None:
    config = Config(log_file=tmp_path / "m.log", log_file_max_bytes=0)
    logger = logger_to(LogObserver(config))
    for number in range(100):
        logger.info("number {number}", number=number)
    assert len((tmp_path / "m.log").read_text().splitlines()) == 100


def test_an_existing_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "m.log"
    path.write_text("old\n")
    logger_to(LogObserver(Config(log_file=path))).info("new")
    first, second = path.read_text().splitlines()
    assert first == "old"
    assert json.loads(second)["message"] == "new"


def test_a_file_is_not_for_everybody(tmp_path: Path) -> None:
    LogObserver(Config(log_file=tmp_path / "m.log"))
    assert (tmp_path / "m.log").stat().st_mode & 0o007 == 0


@pytest.mark.parametrize("name", ["gone/m.log", "."])
def test_a_file_that_cannot_be_opened_is_an_error_of_the_configuration(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^log_file: "):
        LogObserver(Config(log_file=tmp_path / name))


def test_the_observer_can_move_to_a_file(tmp_path: Path) -> None:
    log = Log()
    log.logger.info("one")
    log.observer.use_file(tmp_path / "m.log")
    log.logger.info("two")
    assert log.record["message"] == "one"
    assert json.loads((tmp_path / "m.log").read_text())["message"] == "two"


def test_a_failure_without_a_traceback_is_logged() -> None:
    log = Log()
    log.logger.failure("failed", Failure(ValueError("x")))
    assert "ValueError" in log.record["traceback"]
