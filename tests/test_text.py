"""Timestamps, durations, templates, JSON bodies, request schemas."""

from __future__ import annotations

import json
import tracemalloc
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from attrs import field, frozen
from hypothesis import example, given
from hypothesis import strategies as st

from genvm_manager import (
    MIB,
    AnyObject,
    ConfigError,
    ExecutionMinutes,
    InvalidRequest,
    LevelName,
    NonNegativeInt,
    RunRequest,
    SecretText,
    Timestamp,
    counted,
    expand_template,
    format_timestamp,
    json_of,
    kind_of,
    parse_duration,
    parse_json,
    parse_timestamp,
    read_yaml,
    shown,
    structure,
    timestamp_of,
)

from .support import json_objects, json_values

# --- timestamps ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2025-01-02T03:04:05Z", datetime(2025, 1, 2, 3, 4, 5, 0, UTC)),
        ("2025-01-02t03:04:05z", datetime(2025, 1, 2, 3, 4, 5, 0, UTC)),
        ("2025-01-02 03:04:05Z", datetime(2025, 1, 2, 3, 4, 5, 0, UTC)),
        ("2025-01-02T03:04:05.5Z", datetime(2025, 1, 2, 3, 4, 5, 500_000, UTC)),
        ("2025-01-02T03:04:05.1234567899Z", datetime(2025, 1, 2, 3, 4, 5, 123_456, UTC)),
        ("2025-01-02T03:04:05+02:30", datetime(2025, 1, 2, 0, 34, 5, 0, UTC)),
        ("2025-01-01T00:30:00+01:00", datetime(2024, 12, 31, 23, 30, 0, 0, UTC)),
        ("2025-01-02T03:04:05-23:59", datetime(2025, 1, 3, 3, 3, 5, 0, UTC)),
        ("2025-01-02T03:04:05-00:00", datetime(2025, 1, 2, 3, 4, 5, 0, UTC)),
        ("2016-12-31T23:59:60Z", datetime(2016, 12, 31, 23, 59, 59, 999_999, UTC)),
        ("2024-02-29T00:00:00Z", datetime(2024, 2, 29, 0, 0, 0, 0, UTC)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, 0, 0, 0, 0, UTC)),
        ("9999-12-31T23:59:59.999999Z", datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC)),
    ],
)
def test_a_timestamp_is_an_instant_in_utc(text: str, expected: datetime) -> None:
    moment = parse_timestamp(text)
    assert moment == expected
    assert moment.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2025-01-02",
        "2025-01-02T03:04:05",  # no offset: which instant is that?
        "2025-01-02T03:04Z",
        "2025-1-2T03:04:05Z",
        " 2025-01-02T03:04:05Z",
        "2025-01-02T03:04:05Z\n",
        "2025-01-02T03:04:05.Z",
        "2025-01-02T03:04:05,5Z",
        "2025-01-02T03:04:05+0200",
        "2025-01-02T03:04:05+02",
        "2025-01-02T03:04:05 UTC",
        "+2025-01-02T03:04:05Z",
        "12025-01-02T03:04:05Z",
        "2025-13-02T03:04:05Z",
        "2025-00-02T03:04:05Z",
        "2025-02-29T03:04:05Z",
        "2025-01-02T24:00:00Z",
        "2025-01-02T03:60:00Z",
        "2025-01-02T03:04:61Z",
        "2025-01-02T03:04:05+24:00",
        "2025-01-02T03:04:05+02:60",
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+01:00",  # before the first instant that can be held
        "9999-12-31T23:59:59-01:00",
        "1735689600",
        "now",
    ],
)
def test_what_is_no_timestamp_is_refused_and_shown(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_timestamp(text)
    assert "timestamp" in str(caught.value)
    assert shown(text) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("2025-6-1T0:0:0Z", "2025-06-01 00:00:00 UTC", "2025-06-01 00:00:00 +00:00"),
        *("2025-06-01T00:00:00Z", "2025-6-01t0:00:00.0 -00:00", "2025-06-01T02:00:00+02:00"),
    ],
)
def test_in_json_a_timestamp_may_be_written_more_loosely(text: str) -> None:
    moment = structure({"moment": text}, _Moment).moment
    assert moment == datetime(2025, 6, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "text", ["2025-6-1T0:0:0", "2025-06-01 00:00:00  UTC", "2025-06-01 00:00 UTC", "25-6-1T0:0:0Z"]
)
def test_even_then_it_needs_a_zone_and_a_second(text: str) -> None:
    with pytest.raises(InvalidRequest, match="timestamp"):
        structure({"moment": text}, _Moment)


@pytest.mark.parametrize(
    "text",
    [
        "\uff12\uff10\uff12\uff15-01-02T03:04:05Z",
        "2025-01-02T03:04:0\u0665Z",
        "2025-01-02T03:04:05.\u0665Z",
    ],
)
def test_a_timestamp_has_ascii_digits_only(text: str) -> None:
    # Other implementations refuse these; nodes must agree on which executor runs.
    with pytest.raises(ValueError, match="timestamp"):
        parse_timestamp(text)


@given(
    st.datetimes(timezones=st.just(UTC)),
    st.integers(min_value=-23 * 60 - 59, max_value=23 * 60 + 59),
)
def test_a_timestamp_that_python_writes_is_read_back(moment: datetime, minutes: int) -> None:
    zone = timezone(timedelta(minutes=minutes))
    try:
        text = moment.astimezone(zone).isoformat()
    except OverflowError:
        return
    assert parse_timestamp(text) == moment


@given(st.datetimes(min_value=datetime(1000, 1, 1), timezones=st.just(UTC)))
def test_formatting_keeps_milliseconds(moment: datetime) -> None:
    text = format_timestamp(moment)
    assert len(text) == len("2025-01-01T00:00:00.000Z")
    assert text.endswith("Z")
    assert moment - parse_timestamp(text) == timedelta(microseconds=moment.microsecond % 1000)


def test_formatting_turns_other_zones_into_utc() -> None:
    moment = datetime(2025, 1, 1, 1, 0, 0, 7000, timezone(timedelta(hours=2)))
    assert format_timestamp(moment) == "2024-12-31T23:00:00.007Z"
    assert timestamp_of(1_735_689_600.25) == "2025-01-01T00:00:00.250Z"


# --- durations ---


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (3, 3.0),
        (0.5, 0.5),
        ("500ms", 0.5),
        ("10s", 10.0),
        ("1.5m", 90.0),
        ("2h", 7200.0),
        ("7", 7.0),
        (" 7 s ", 7.0),
    ],
)
def test_durations(value: object, seconds: float) -> None:
    assert parse_duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value",
    [
        *("", "s", "-1s", "+1s", "1e3", "1d", "10 s s", ".5s", "5.", "inf", "nan", "1,5s", "1 S"),
        *(-1, -0.1, float("inf"), float("nan"), 1e12, True, None, [1], {"s": 1}),
    ],
)
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(value)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 13, "9" * 400 + "ms", "1000000000h"])
def test_a_duration_as_text_has_the_same_limit_as_a_number(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


# --- templates ---


def test_templates_know_names_and_variables() -> None:
    text = "${exeDir}/x:${ENV[HOME]}:${ENV[UNSET]}:$exeDir:${ENV[a]}"
    environ = {"HOME": "/h", "a": "low", "UNSET": ""}
    result = expand_template(text, {"exeDir": "/r/bin"}, environ.__getitem__)
    assert result == "/r/bin/x:/h::$exeDir:low"
    assert shown(result, 100) == f'"{text}"', "no message shows what was inserted"


def test_templates_are_expanded_once() -> None:
    result = expand_template("${ENV[A]}${B}", {"B": "${ENV[A]}"}, {"A": "${B}"}.__getitem__)
    assert result == "${B}${ENV[A]}"


@pytest.mark.parametrize("text", ["${nope}", "${}", "${ENV}", "a ${exedir}"])
def test_an_unknown_name_in_a_template_is_an_error_that_lists_the_known(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand_template(text, {"exeDir": "/r/bin", "other": ""}, str)
    assert "exeDir, other" in caught.value.message
    assert text.removeprefix("a ") in caught.value.message


@given(st.text())
def test_text_without_templates_stays(text: str) -> None:
    plain = text.replace("$", "")
    assert expand_template(plain, {}, str) == plain


# --- what is shown of a value ---


@given(st.none() | st.floats() | st.text() | st.lists(st.text() | st.lists(st.integers())))
def test_what_is_shown_is_short(value: object) -> None:
    assert len(shown(value)) <= 60


def test_values_are_shown_as_json() -> None:
    assert shown('a\n"') == '"a\\n\\""'
    assert shown(None) == "null"
    assert shown({"a": [1, True]}) == '{"a": [1, true]}'
    assert shown("x" * 10**6) == '"' + "x" * 58 + "…"


class _Unreachable:
    def __repr__(self) -> str:
        raise AssertionError("all of a large value was rendered, to show 60 characters of it")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param([*range(100_000), _Unreachable()], id="list"),
        pytest.param(dict(enumerate([*range(100_000), _Unreachable()])), id="dict"),
        pytest.param([["x" * 1000] * 1000, _Unreachable()], id="nested"),
    ],
)
def test_showing_a_large_value_does_not_render_all_of_it(value: object) -> None:
    # A body may hold 64 MiB, and its errors are made on the reactor's thread.
    assert len(shown(value)) <= 60


# --- JSON bodies ---

spaces = st.text(" \t\r\n", max_size=3)


@given(json_objects, st.booleans(), st.sampled_from([None, 0, 2, "\t"]), spaces)
@example({"": {"": {}}, "\ud83d\ude00": "\x00"}, True, None, "\n")
def test_any_object_is_read_as_the_standard_library_does(
    data: dict[str, Any], ascii_only: bool, indent: int | str | None, space: str
) -> None:
    text = space + json.dumps(data, ensure_ascii=ascii_only, indent=indent) + space
    try:
        body = text.encode()
    except UnicodeEncodeError:
        return
    assert parse_json(body, AnyObject) == json.loads(body)


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8")))
@example(b'{"a":1,}')
@example(b'{"a" 1}')
@example(b"{,}")
@example(b"{'a':1}")
@example(b'{"a":1} x')
@example(b'{"a":01}')
@example(b'{"a":"\n"}')
@example(b"\xef\xbb\xbf{}")
@example(b'\xa0{"a":1}')
def test_any_bytes_are_accepted_exactly_where_the_standard_library_accepts_them(
    data: bytes,
) -> None:
    try:
        expected = json.loads(data.decode("utf-8"), parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError):
        expected = None
    if isinstance(expected, dict):
        assert parse_json(data, AnyObject) == expected
    else:
        with pytest.raises(InvalidRequest, match=r"^body: "):
            parse_json(data, AnyObject)


json_like = st.lists(
    st.sampled_from([*'{}[]:,"\\ \n', '"a"', '"b"', "1", "-", "0", ".5", "e3", "null", "tru"]),
    max_size=14,
).map("".join)


@given(json_like, json_like)
def test_near_json_is_accepted_exactly_where_the_standard_library_accepts_it(
    inside: str, after: str
) -> None:
    text = '{"k": ' + inside + "}" + after
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    if isinstance(expected, dict):
        assert parse_json(text.encode(), AnyObject) == expected
    else:
        with pytest.raises(InvalidRequest, match=r"^body: "):
            parse_json(text.encode(), AnyObject)


def test_of_two_equal_keys_the_last_counts_as_in_the_standard_library() -> None:
    assert parse_json(b'{"a": 1, "a": {"b": 2}}', AnyObject) == {"a": {"b": 2}}


def text_of_message(body: bytes) -> str:
    return bytes(parse_json(body, _Message).message).decode()


@given(json_objects, st.sampled_from([None, 1]), spaces)
def test_the_text_of_a_message_is_kept_and_nothing_else(
    inner: dict[str, Any], indent: int | None, space: str
) -> None:
    raw = json.dumps(inner, indent=indent)
    text = f'{space}{{"a":{space}1, "message"{space}:{space}{raw}{space}}}{space}'
    assert text_of_message(text.encode()) == raw


def test_the_text_of_a_message_is_kept_byte_for_byte() -> None:
    raw = '{ "v" : 1.10e2, "big": 123456789012345678901234567890,\r\n "a":"\\u00e9é\\/", "a":2 }'
    assert text_of_message(b'{"message": ' + raw.encode() + b"}") == raw


@given(json_like)
def test_a_message_is_accepted_exactly_where_the_standard_library_accepts_it(inside: str) -> None:
    text = '{"message": {"k": ' + inside + "}}"
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    if isinstance(expected, dict) and isinstance(expected.get("message"), dict):
        assert json.loads(text_of_message(text.encode())) == expected["message"]
    else:
        with pytest.raises(InvalidRequest):
            parse_json(text.encode(), _Message)


@given(json_values, st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xDBFF)))
def test_answers_are_json_whatever_they_say(value: Any, halves: str) -> None:
    for answer in (value, {"a": [value, halves]}):
        assert json.loads(json_of(answer)) == answer
    assert json_of({"level": LevelName("debug")}) == b'{"level":"debug"}'
    with pytest.raises(TypeError):
        json_of({"a": object()})


def test_half_a_surrogate_pair_is_not_text() -> None:
    with pytest.raises(InvalidRequest, match="surrogate pair"):
        parse_json(b'{"a": "\\ud800"}', AnyObject)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "body: expected a JSON object, got nothing"),
        (b" \r\n ", "body: expected a JSON object, got nothing"),
        (b"[1]", "body: expected an object, got an array"),
        (b'"text"', "body: expected an object, got a string"),
        (b"null", "body: expected an object, got null"),
        (b'{"a": \xff}', "body: not UTF-8 at byte 6"),
        (b'{"a": NaN}', "body: not JSON: invalid character at line 1 column 7"),
        (b'{"a": [-Infinity]}', "body: not JSON: invalid character at line 1 column 9"),
        (b'{"a": 1\n"b": 2}', "body: not JSON: expected ',' or '}' at line 2 column 1"),
        (
            b'{"a": 1}\n\n x',
            "body: not JSON: trailing characters at line 3 column 3",
        ),
        (b'{"a" 1}', "body: not JSON: expected ':' at line 1 column 6"),
        (b'{"a": 1, b: 2}', "body: not JSON: object keys must be strings at line 1 column 10"),
        (b'{"a": ', "body: not JSON: it ends too early, or has an incomplete surrogate pair"),
    ],
)
def test_a_body_that_is_no_object_is_refused_with_the_place(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(data, AnyObject)
    assert caught.value.message == message


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_deep_nesting_is_an_error_of_the_request(opening: bytes) -> None:
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        parse_json(b'{"a":' + opening * 200_000, AnyObject)


def test_a_number_with_too_many_digits_is_an_error_of_the_request() -> None:
    with pytest.raises(InvalidRequest, match=r"^body: "):
        parse_json(b'{"a": ' + b"9" * 100_000 + b"}", AnyObject)


def test_a_deep_value_that_can_be_read_can_be_refused() -> None:
    # Reading and rendering JSON have different limits of nesting.
    for depth in (int(50 * 1.02**step) for step in range(400)):
        body = b'{"level": ' + b"[" * depth + b"]" * depth + b"}"
        try:
            data = parse_json(body, AnyObject)
        except InvalidRequest:
            break
        with pytest.raises(InvalidRequest, match=r"^level: expected a string"):
            structure(data, _Level)
    else:
        pytest.fail("any nesting is read; a limit was expected")


# --- request schemas ---


@frozen
class _Level:
    level: str


@frozen
class _Message:
    message: msgspec.Raw


@frozen
class _Inner:
    count: NonNegativeInt
    names: list[str] = field(factory=list)


@frozen
class _Outer:
    inner: _Inner
    flag: bool = False
    items: list[_Inner] = field(factory=list)
    grid: list[list[int]] = field(factory=list)
    secret: SecretText = SecretText("")
    minutes: ExecutionMinutes = 1


GOOD_INNER = {"count": 0}


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        ({}, "inner: required, but missing"),
        ({"inner": {}}, "inner.count: required, but missing"),
        ({"inner": {"count": -1}}, "inner.count: expected an integer of at least 0, got -1"),
        ({"inner": {"count": True}}, "inner.count: expected an integer, got true"),
        ({"inner": {"count": 1.0}}, "inner.count: expected an integer, got 1.0"),
        ({"inner": {"count": "1"}}, 'inner.count: expected an integer, got "1"'),
        ({"inner": GOOD_INNER, "flag": "yes"}, 'flag: expected true or false, got "yes"'),
        ({"inner": GOOD_INNER, "flag": 1}, "flag: expected true or false, got 1"),
        ({"inner": GOOD_INNER, "flag": None}, "flag: expected true or false, got null"),
        (
            {"inner": {"count": 1, "names": ["a", 2]}},
            "inner.names[1]: expected a string, got 2",
        ),
        ({"inner": {"count": 1, "names": "abc"}}, "inner.names: expected an array, got a string"),
        ({"inner": {"count": 1, "names": {}}}, "inner.names: expected an array, got an object"),
        ({"inner": GOOD_INNER, "grid": [[1], [2, None]]}, "grid[1][1]: expected an integer"),
        ({"inner": GOOD_INNER, "minutes": 0}, "minutes: expected a number above 0, got 0"),
        ({"inner": GOOD_INNER, "minutes": "5"}, 'minutes: expected a number, got "5"'),
        ({"inner": GOOD_INNER, "minutes": True}, "minutes: expected a number, got true"),
    ],
)
def test_what_is_wrong_in_a_request_is_named_by_its_path(
    data: dict[str, Any], problems: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        structure(data, _Outer)
    assert problems in caught.value.message


@pytest.mark.parametrize("wrong", [5, "text", None, [], True])
def test_an_object_that_is_something_else_is_named_by_its_path(wrong: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        structure({"inner": wrong}, _Outer)
    assert caught.value.message.startswith("inner: expected an object, got ")


def test_what_is_wrong_in_an_object_in_an_array_is_named_by_its_path() -> None:
    data = {"inner": GOOD_INNER, "items": [GOOD_INNER, {"count": "x"}, {}]}
    with pytest.raises(InvalidRequest) as caught:
        structure(data, _Outer)
    assert 'items[1].count: expected an integer, got "x"' in caught.value.message


def test_everything_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        structure({"inner": {"count": -1}, "flag": 3, "minutes": None}, _Outer)
    for path in ("inner.count: ", "flag: ", "minutes: "):
        assert path in caught.value.message
    assert caught.value.message.count("; ") == 2


def test_unknown_keys_are_ignored_and_defaults_hold() -> None:
    result = structure({"inner": {"count": 3, "later": 1}, "newer": {}}, _Outer)
    assert result == _Outer(_Inner(3))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "null"),
        (True, "true or false"),
        (1, "a number"),
        (1.5, "a number"),
        ("x", "a string"),
        ({}, "an object"),
        ([], "an array"),
        (b"", "bytes"),
        (date(2025, 1, 1), "a date"),
        (datetime(2025, 1, 1, tzinfo=UTC), "a date"),
        (set(), "a set"),
    ],
)
def test_values_are_called_what_users_call_them(value: object, kind: str) -> None:
    assert kind_of(value) == kind


def test_a_secret_is_not_shown() -> None:
    with pytest.raises(InvalidRequest) as caught:
        structure({"inner": GOOD_INNER, "secret": ["hunter2hunter2"]}, _Outer)
    assert caught.value.message == "secret: expected a string"


def test_a_path_in_front_is_part_of_every_path() -> None:
    with pytest.raises(InvalidRequest) as caught:
        structure({"inner": {}}, _Outer, path="configs[3]")
    assert caught.value.message == "configs[3].inner.count: required, but missing"


RUN = {
    "major": 0,
    "message": {"a": 1},
    "is_sync": True,
    "capture_output": False,
    "host_data": "{}",
    "timestamp": "2025-06-01T12:00:00+02:00",
    "host": "unix:///tmp/h",
}


def read_run(**changes: object) -> RunRequest:
    data = {key: value for key, value in {**RUN, **changes}.items() if value is not ...}
    return parse_json(json.dumps(data).encode(), RunRequest)


def test_a_run_request_is_read() -> None:
    request = read_run(max_execution_minutes=0.5, extra_args=["--x"])
    assert bytes(request.message) == b'{"a": 1}'
    assert request.timestamp == datetime(2025, 6, 1, 10, 0, 0, 0, UTC)
    assert (request.major, request.is_sync, request.capture_output) == (0, True, False)
    assert (request.max_execution_minutes, request.extra_args) == (0.5, ["--x"])
    assert read_run().max_execution_minutes == 20


def test_a_run_request_does_not_keep_the_whole_body_in_memory() -> None:
    junk = "x" * MIB
    tracemalloc.start()
    try:
        requests = [read_run(unknown=junk) for _ in range(20)]
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(requests) * MIB > 5 * kept


@pytest.mark.parametrize("key", sorted(RUN))
def test_each_required_field_of_a_run_is_required(key: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_run(**{key: ...})
    assert caught.value.message == f"{key}: required, but missing"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("major", -1, "expected an integer of at least 0, got -1"),
        ("major", True, "expected an integer, got true"),
        ("message", "{}", "expected an object, got a string"),
        ("message", None, "expected an object, got null"),
        ("is_sync", "yes", 'expected true or false, got "yes"'),
        ("capture_output", 0, "expected true or false, got 0"),
        ("host_data", {}, "expected a string, got an object"),
        ("timestamp", "yesterday", "expected an RFC 3339 timestamp"),
        ("timestamp", 1735689600, "expected a string, got 1735689600"),
        ("host", None, "expected a string, got null"),
        ("max_execution_minutes", 0, "expected a number above 0, got 0"),
        ("extra_args", "--x", "expected an array, got a string"),
    ],
)
def test_each_field_of_a_run_is_checked(key: str, value: object, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_run(**{key: value})
    assert caught.value.message.startswith(f"{key}: ")
    assert reason in caught.value.message


def test_the_structured_timestamp_type_is_an_instant() -> None:
    assert structure({"moment": "2025-01-01T00:00:00Z"}, _Moment).moment.tzinfo is UTC


@frozen
class _Moment:
    moment: Timestamp


# --- YAML ---

#: Slips in a file with a key in it, and what is said of them.
SLIPS = {
    "key: *{}\n": "line 1: found undefined alias",
    "key: !{} x\n": "line 1: could not determine a constructor for the tag",
    "key: !{}!b x\n": "line 1: found undefined tag handle",
    "a: 1\nkey: b: {}\n": "line 2: mapping values are not allowed here",
    "key:{}\nhost: x\n": "line 2: mapping values are not allowed here",
    'key: "{}\\q"\n': "line 1: found unknown escape character 'q'",
    'key: "{}\n': "line 2: found unexpected end of stream",
    "key: @{}\n": "line 1: found character '@' that cannot start any token",
    "key: &{} x\nb: &{} y\n": "line 2: second occurrence",
    "{}: 1\nb: 2\n{}: 3\n": "line 3: this key appears twice",
    "? [{}]\n: b\n": "line 1: found unhashable key",
    "key: {{{}\n": "line 2: expected ',' or '}}', but got '<stream end>'",
    "- a\nkey: {}\n": "line 2: expected <block end>, but found '?'",
    "%YAML {}\n": "line 1: expected a digit, but found 's'",
    "key: {}\x07\n": "a control character at position ",
    "key: {}\udcff\n": "not UTF-8 at byte ",
    "key: !!int {}\n": "a value that its form or tag does not allow",
    "key: !!float {}\n": "a value that its form or tag does not allow",
    "key: !!bool {}\n": "a value that its form or tag does not allow",
    "key: !!timestamp {}\n": "a value that its form or tag does not allow",
    "key: !!set [{}]\n": "a value that its form or tag does not allow",
    "key: 2025-13-45 # {}\n": "a value that its form or tag does not allow",
    "key: [{}," + "[" * 5000: "nested too deeply",
}


@pytest.mark.parametrize(("text", "problem"), SLIPS.items(), ids=range(len(SLIPS)))
def test_what_is_not_yaml_is_not_shown(text: str, problem: str, tmp_path: Path) -> None:
    secret = "sk-proj-4f9a"
    path = tmp_path / "a.yaml"
    path.write_text(text.replace("{}", secret).replace("{{", "{"), errors="surrogateescape")
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert caught.value.message.startswith("not YAML: " + problem.replace("}}", "}"))
    assert "sk" not in caught.value.message


@pytest.mark.parametrize(("number", "text"), [(0, "0 notes"), (1, "1 note"), (2, "2 notes")])
def test_a_number_with_what_it_counts(number: int, text: str) -> None:
    assert counted(number, "note") == text
