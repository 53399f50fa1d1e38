"""The manifest's form, which version a moment selects, and the reload."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.logger import LogLevel

from genvm_manager import (
    MANIFEST_MAX_BYTES,
    Config,
    Manifest,
    ManifestError,
    ManifestStore,
    Version,
    VersionNotAvailable,
    parse_manifest,
    parse_timestamp,
)

from .support import PATIENCE, async_test, observing, real_reactor, soon

DAY = "2025-01-{:02}T00:00:00Z"


def at(day: int) -> datetime:
    """Return the start of a day in January 2025."""
    return datetime(2025, 1, day, tzinfo=UTC)


def manifest(**days: int) -> Manifest:
    """Return a manifest; ``v0_2_3=5`` is v0.2.3 from the 5th on."""
    lines = [
        f"  {key.replace('_', '.')}: {{available_after: {DAY.format(day)}}}"
        for key, day in days.items()
    ]
    return parse_manifest("executor_versions:\n" + "\n".join(lines), "m.yaml")


def refused(text: str) -> str:
    """Return the message with which a manifest is refused."""
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, "m.yaml")
    return caught.value.message


# --- resolution ---


@pytest.mark.parametrize(
    ("major", "day", "expected"),
    [
        (0, 1, "v0.1.9"),
        (0, 4, "v0.1.9"),
        (0, 5, "v0.2.4"),  # the very moment counts; a patch has no date of its own
        (0, 9, "v0.2.4"),
        (0, 19, "v0.2.4"),
        (0, 20, "v0.10.0"),  # ten is more than two
        (0, 31, "v0.10.0"),
        (1, 15, "v1.0.0"),
        (1, 31, "v1.0.0"),  # v1.0.0-… of an older date would not matter either
    ],
)
def test_the_highest_version_that_is_available_is_taken(
    major: int, day: int, expected: str
) -> None:
    versions = manifest(v0_10_0=20, v0_2_3=5, v1_0_0=15, v0_2_4=10, v0_1_9=1)
    assert versions.resolve(major, at(day)).key == expected


@pytest.mark.parametrize(("major", "day"), [(1, 14), (2, 31), (7, 1)])
def test_no_version_is_an_error_that_names_what_was_asked_and_what_exists(
    major: int, day: int
) -> None:
    versions = manifest(v0_2_3=5, v1_0_0=15)
    with pytest.raises(VersionNotAvailable) as caught:
        versions.resolve(major, at(day))
    message = caught.value.message
    assert f"major {major} " in message
    assert f"2025-01-{day:02}T00:00:00.000Z" in message
    assert "v0.2.3 (from 2025-01-05T00:00:00.000Z)" in message
    assert "v1.0.0 (from 2025-01-15T00:00:00.000Z)" in message


def test_no_version_at_all_is_an_error_that_says_so() -> None:
    with pytest.raises(VersionNotAvailable, match="no version at all"):
        Manifest().resolve(0, at(1))


def test_the_error_stays_short_however_many_versions_there_are() -> None:
    versions = manifest(**{f"v0_0_{n}": 5 for n in range(1000)})
    with pytest.raises(VersionNotAvailable) as caught:
        versions.resolve(1, at(31))
    assert len(caught.value.message) < 2000
    assert "v0.0.999" in caught.value.message
    assert "and 980 older ones" in caught.value.message


def test_one_microsecond_decides() -> None:
    versions = manifest(v0_2_3=5, v0_3_0=10)
    just_before = at(10) - timedelta(microseconds=1)
    assert versions.resolve(0, just_before).key == "v0.2.3"
    assert versions.resolve(0, at(10)).key == "v0.3.0"


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        ({"v0_1_0": 1, "v0_1_1": 30, "v0_1_2": 31}, "v0.1.2"),
        ({"v0_1_0": 1, "v0_1_2": 30}, "v0.1.0"),  # with a gap
        ({"v0_1_0": 1, "v0_1_1": 30, "v0_1_3": 30}, "v0.1.1"),
        ({"v0_1_0": 1, "v0_2_0": 30, "v0_2_1": 1}, "v0.2.1"),  # no step down
        ({"v0_1_9": 1, "v0_2_0": 30}, "v0.1.9"),  # a minor is no patch
        ({"v0_1_9": 1, "v0_1_10": 30}, "v0.1.10"),
        ({"v0_1_0": 1, "v1_1_1": 1}, "v0.1.0"),
    ],
)
def test_consecutive_patches_replace_a_version_whatever_their_date(
    days: dict[str, int], expected: str
) -> None:
    assert manifest(**days).resolve(0, at(2)).key == expected


def test_the_v_of_a_key_is_optional() -> None:
    versions = parse_manifest("executor_versions: {0.1.0: {available_after: 2025-1-1T0:0:0Z}}", "m")
    assert versions.resolve(0, at(1)).key == "0.1.0"


numbers = st.tuples(*[st.integers(min_value=0, max_value=3)] * 3)


@given(
    st.dictionaries(numbers, st.integers(min_value=1, max_value=6), max_size=12),
    st.integers(min_value=0, max_value=3),
    st.integers(min_value=1, max_value=6),
)
def test_resolution_is_what_the_specification_says(
    days: dict[tuple[int, int, int], int], major: int, day: int
) -> None:
    versions = manifest(**{f"v{a}_{b}_{c}": moment for (a, b, c), moment in days.items()})
    eligible = [key for key, moment in days.items() if key[0] == major and moment <= day]
    if eligible:
        a, b, patch = max(eligible)
        while (a, b, patch + 1) in days:
            patch += 1
        assert versions.resolve(major, at(day)).numbers == (a, b, patch)
    else:
        with pytest.raises(VersionNotAvailable):
            versions.resolve(major, at(day))


def test_versions_are_ordered_by_number() -> None:
    versions = manifest(v0_10_0=1, v0_2_10=1, v0_2_9=1, v1_0_0=1)
    assert [version.key for version in versions.versions] == [
        *("v0.2.9", "v0.2.10", "v0.10.0", "v1.0.0")
    ]
    assert Version((0, 2, 3), "v0.2.3-z", at(9)) <= Version((0, 2, 3), "v0.2.3-a", at(1))


@pytest.mark.parametrize("key", ["v0.2.3-rc1", "v0.2.3-rc.1", "v0.2.3-a-b", "v0.2.3-0"])
def test_a_prerelease_names_the_directory_but_does_not_order(key: str) -> None:
    text = f"executor_versions: {{{key}: {{available_after: {DAY.format(5)}}}}}"
    version = parse_manifest(text, "m.yaml").resolve(0, at(5))
    assert (version.key, version.numbers, version.major) == (key, (0, 2, 3), 0)
    both = (
        f"executor_versions:\n  {key}: {{available_after: {DAY.format(5)}}}\n"
        f"  v0.2.2: {{available_after: {DAY.format(6)}}}"
    )
    assert parse_manifest(both, "m.yaml").resolve(0, at(9)).key == key


@pytest.mark.parametrize(
    ("first", "second"),
    [("v0.2.3", "v0.2.3-rc1"), ("v0.2.3-a", "v0.2.3-b"), ("v0.2.3", "v0.02.3")],
)
def test_equal_numbers_are_refused_with_both_keys_and_the_line(first: str, second: str) -> None:
    message = refused(
        "executor_versions:\n"
        f"  {first}: {{available_after: {DAY.format(1)}}}\n"
        f"  {second}: {{available_after: {DAY.format(2)}}}\n"
    )
    assert message == f"m.yaml:3: {second} has the same numbers as {first}"


# --- the form ---


def test_timestamps_may_stand_without_quotes_and_have_any_zone() -> None:
    text = """
executor_versions:
  v0.1.0: {available_after: 2025-01-01T00:00:00Z}
  v0.2.0: {available_after: "2025-01-02T00:00:00Z"}
  v0.3.0:
    available_after: 2025-01-03T02:00:00.000+02:00
  v0.4.0: {available_after: '2025-01-04T00:00:00Z', sha: 1}
"""
    versions = parse_manifest(text, "m.yaml").versions
    assert [version.available_after for version in versions] == [at(n) for n in (1, 2, 3, 4)]


def test_other_keys_are_ignored_and_json_is_yaml() -> None:
    text = (
        '{"schema": [1], "executor_versions": {"v0.2.3": '
        '{"available_after": "2025-01-01T00:00:00Z", "x": {}}}}'
    )
    (version,) = parse_manifest(text, "m.yaml").versions
    assert (version.key, version.available_after) == ("v0.2.3", at(1))


@pytest.mark.parametrize("value", ["", " null", " {}"])
def test_no_versions_are_a_valid_manifest(value: str) -> None:
    assert parse_manifest(f"executor_versions:{value}", "m.yaml").versions == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m.yaml:1: empty; expected executor_versions"),
        ("# nothing\n", "m.yaml:1: empty; expected executor_versions"),
        ("a: 1\n", "m.yaml:1: executor_versions: required, but missing"),
        ("- a\n", "m.yaml:1: manifest: expected a mapping"),
        ("text\n", "m.yaml:1: manifest: expected a mapping"),
        ("\nexecutor_versions: []\n", "m.yaml:2: executor_versions: expected a mapping"),
        ("executor_versions: 5\n", "m.yaml:1: executor_versions: expected a mapping"),
        ("executor_versions: ''\n", "m.yaml:1: executor_versions: expected a mapping"),
        (
            "executor_versions:\n  v0.2.3: 2025-01-01T00:00:00Z\n",
            "m.yaml:2: v0.2.3: expected a mapping",
        ),
        ("executor_versions:\n  v0.2.3:\n", "m.yaml:2: v0.2.3: expected a mapping"),
        (
            "executor_versions:\n  v0.2.3: {}\n",
            "m.yaml:2: v0.2.3.available_after: expected a timestamp",
        ),
        (
            "executor_versions:\n  v0.2.3:\n    available_after: [2025-01-01T00:00:00Z]\n",
            "m.yaml:3: v0.2.3.available_after: expected a timestamp",
        ),
        (
            "executor_versions:\n  v0.2.3:\n    available_after: 2025-01-01\n",
            "m.yaml:3: v0.2.3.available_after: expected an RFC 3339 timestamp",
        ),
        (
            "executor_versions:\n  v0.2.3:\n    available_after:\n",
            "m.yaml:3: v0.2.3.available_after: expected",
        ),
        (
            "executor_versions:\n  v0.2.3:\n    available_after: 1735689600\n",
            "m.yaml:3: v0.2.3.available_after: expected",
        ),
        (
            "executor_versions:\n  v0.2.3:\n    x: 1\n    available_after: 2025-13-01T00:00:00Z\n",
            "m.yaml:4: v0.2.3.available_after: ",
        ),
        ("a: 1\na: 2\n", 'm.yaml:2: manifest: duplicate key "a"'),
        (
            "executor_versions:\n  v0.2.3: {available_after: 2025-01-01T00:00:00Z}\n"
            "  v0.2.3: {available_after: 2025-01-02T00:00:00Z}\n",
            'm.yaml:3: executor_versions: duplicate key "v0.2.3"',
        ),
        (
            "executor_versions:\n  v0.2.3:\n    available_after: 2025-01-01T00:00:00Z\n"
            "    available_after: 2025-01-02T00:00:00Z\n",
            'm.yaml:4: v0.2.3: duplicate key "available_after"',
        ),
        ("a: 1\nb: [\n", "m.yaml:3: not YAML"),
        ("a: 1\n\tb: 2\n", "m.yaml:2: not YAML"),
        ("a: 1\nb: *gone\n", "m.yaml:2: not YAML"),
        ("a: 1\n---\nb: 1\n", "m.yaml:2: not YAML"),
        ("a: '\x01'\n", "m.yaml: not YAML"),
    ],
)
def test_a_bad_manifest_is_refused_with_line_and_reason(text: str, message: str) -> None:
    assert refused(text).startswith(message)


@pytest.mark.parametrize(
    "key",
    [
        *("vv0.2.3", "v0.2", "v0.2.3.4", "V0.2.3", "v0.2.3-", "v-1.2.3", "v0.2.x", "v0.2.3+b"),
        *("v0.2.3 ", "../v0.2.3", "v0.2.3-a/b", "v0.2.3-\u0661", "v1234567890.0.0", "", "latest"),
        *("v0.2.\u0663", "v\uff10.2.3", "v0.2.3\n"),
    ],
)
def test_what_is_no_version_is_refused_with_its_line(key: str) -> None:
    quoted = '"' + key.replace("\n", "\\n") + '"'
    text = f"executor_versions:\n  {quoted}: {{available_after: {DAY.format(1)}}}\n"
    message = refused(text)
    assert message.startswith("m.yaml:2: ")
    assert "is not a version; expected a key such as v0.2.3" in message


def test_a_key_that_is_no_text_is_refused_with_its_line() -> None:
    text = f"executor_versions:\n  [v0.2.3]: {{available_after: {DAY.format(1)}}}\n"
    assert refused(text).startswith("m.yaml:2: ")


def test_aliases_are_resolved() -> None:
    text = f"""
when: &when {{available_after: {DAY.format(5)}}}
executor_versions:
  v0.2.3: *when
  v0.2.4: *when
"""
    assert [version.available_after for version in parse_manifest(text, "m").versions] == [
        at(5)
    ] * 2


def test_a_bomb_of_aliases_costs_nothing() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 40)]
    lines += ["executor_versions:", f"  v0.2.3: {{available_after: {DAY.format(5)}, x: *a39}}"]
    begin = time.process_time()
    (version,) = parse_manifest("\n".join(lines), "m.yaml").versions
    assert version.key == "v0.2.3"
    assert time.process_time() - begin < 5, "10^40 values are not made"


@pytest.mark.parametrize(
    "text",
    ["executor_versions: &a {v0.2.3: *a}", "executor_versions: &a {v0.2.3: {available_after: *a}}"],
)
def test_a_manifest_that_contains_itself_is_refused(text: str) -> None:
    assert refused(text).startswith("m.yaml:1: v0.2.3")


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused(opening: str) -> None:
    assert refused("a: " + opening * 20_000).startswith("m.yaml")


def test_a_merge_key_is_not_silently_dropped() -> None:
    # PyYAML merges "<<" when it makes values; whoever uses it must not lose a version.
    text = f"""
old: &old
  v0.2.3: {{available_after: {DAY.format(5)}}}
executor_versions:
  <<: *old
  v0.2.4: {{available_after: {DAY.format(6)}}}
"""
    assert 'm.yaml:5: "<<" is not a version' in refused(text)


# --- the store ---


def write(
    path: Path, text: str = f"executor_versions: {{v0.2.3: {{available_after: {DAY.format(5)}}}}}"
) -> None:
    path.write_text(text)


def make_store(path: Path, **settings: Any) -> ManifestStore:
    return ManifestStore(Config(root=path.parent, manifest_path=path, **settings))


def test_a_manifest_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    write(path)
    store = make_store(path)
    store.load()
    assert store.resolve(0, at(6)) == "v0.2.3"
    assert store.problem is None


def test_a_missing_manifest_is_said_and_runs_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "m.yaml")
    store.load()
    assert store.problem is not None
    assert "m.yaml does not exist" in store.problem
    with pytest.raises(VersionNotAvailable):
        store.resolve(0, at(6))


def test_rerouting_needs_no_manifest_and_replaces_any_version(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    store = make_store(path, reroute_to="local-build")
    store.load()
    assert store.resolve(5, at(1)) == "local-build"
    write(path)
    store.load()
    assert store.resolve(0, at(6)) == "local-build"


@pytest.mark.parametrize(("replacement", "major"), [("local-build", 0), ("v3.0.0-dev", 3)])
def test_the_major_of_a_replacement(tmp_path: Path, replacement: str, major: int) -> None:
    """It counts where the manifest has nothing, for runs take place there as well."""
    path = tmp_path / "m.yaml"
    store = make_store(path, reroute_to=replacement)
    store.load()
    assert store.newest_major(at(1)) == major
    write(path, f"executor_versions: {{v7.0.0: {{available_after: {DAY.format(5)}}}}}")
    store.load()
    assert store.newest_major(at(1)) == major
    assert store.newest_major(at(6)) == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"executor_versions: [", "m.yaml:1: not YAML"),
        (b"\n\xff: 1", "m.yaml: not UTF-8 at byte 1"),
        (b"#" * (MANIFEST_MAX_BYTES + 1), f"m.yaml: larger than {MANIFEST_MAX_BYTES} bytes"),
    ],
    ids=["not yaml", "not utf-8", "huge"],
)
def test_a_bad_file_stops_the_start_with_a_reason(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        make_store(path).load()
    assert caught.value.message.startswith(message)


def test_a_folder_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        make_store(tmp_path).load()


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfexecutor_versions: {v0.2.3: {available_after: 2025-01-05T00:00:00Z}}"
    )
    store = make_store(path)
    store.load()
    assert store.resolve(0, at(6)) == "v0.2.3"


@async_test
async def test_executors_that_are_too_new_are_warned_of_at_each_load(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    store = make_store(path)
    lines = [f"  v0.2.{n}: {{available_after: {DAY.format(n)}}}\n" for n in (7, 8, 10)]
    path.write_text("executor_versions:\n" + "".join(lines))
    said: list[dict[str, Any]] = []
    with observing(said.append):
        store.load()
        await store.reload(real_reactor())
        path.write_text("executor_versions:\n" + lines[2])
        await store.reload(real_reactor())
        path.write_text("executor_versions:\n" + lines[0])
        await store.reload(real_reactor())
    warned = [event["text"] for event in said if event["log_level"] is LogLevel.warn]
    found = [text.removeprefix("m.yaml has ").partition(":")[0] for text in warned]
    both = "2 executors newer than v0.2.7, up to v0.2.10"
    assert found == [both, both, "1 executor newer than v0.2.7, up to v0.2.10"]


@async_test
async def test_a_reload_takes_effect(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    store = make_store(path)
    store.load()
    write(path)
    await store.reload(real_reactor())
    assert store.resolve(0, at(6)) == "v0.2.3"
    assert store.problem is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"executor_versions:\n  v0.2: {}", "m.yaml:2: "),
        (
            b"executor_versions:\n  v0.9.9: {available_after: 2025-01-01T00:00:00Z}\n  v0.9.8: {}",
            "m.yaml:3: ",
        ),
        (b"\xff", "m.yaml: not UTF-8"),
        (b"#" * (MANIFEST_MAX_BYTES + 1), "m.yaml: larger than"),
        (None, "m.yaml does not exist"),
    ],
    ids=["wrong key", "half right", "not utf-8", "huge", "gone"],
)
@async_test
async def test_a_bad_reload_changes_nothing(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.yaml"
    write(path)
    store = make_store(path)
    store.load()
    before = store.manifest
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        await store.reload(real_reactor())
    assert caught.value.message.startswith(message)
    assert store.manifest is before
    write(path)
    await store.reload(real_reactor())
    assert store.manifest == before, "and it can be repaired"


@async_test
async def test_a_reload_leaves_the_reactor_alone_and_the_old_manifest_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.yaml"
    write(path)
    store = make_store(path)
    store.load()
    may_read = threading.Event()
    read = store._read

    def hang() -> Manifest:
        assert may_read.wait(PATIENCE)
        return read()

    monkeypatch.setattr(store, "_read", hang)
    reactor = real_reactor()
    first = ensureDeferred(store.reload(reactor))
    second = ensureDeferred(store.reload(reactor))
    turn: Deferred[None] = Deferred()
    reactor.callLater(0, turn.callback, None)
    await turn
    assert not first.called
    assert store.resolve(0, at(6)) == "v0.2.3"
    path.write_text(f"executor_versions: {{v0.2.8: {{available_after: {DAY.format(8)}}}}}")
    may_read.set()
    await soon(first)
    await soon(second)
    assert store.resolve(0, parse_timestamp(DAY.format(30))) == "v0.2.8"
