"""The version that a contract states, and the writes that deploy it.

How code is inspected in threads (section 2.11) is here too; the rest of it is in ``integration``.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import json
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import wasmtime
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred

import genvm_manager
from genvm_manager import (
    CODE_SLOT,
    INLINE_CODE_BYTES,
    Config,
    ContractOperations,
    InvalidRequest,
    Manifest,
    ManifestStore,
    Version,
    deployment_writes,
    stated_major,
    stated_version,
)

from .support import PATIENCE, async_test, outcome, real_reactor, soon

NEWEST = 7
"""The newest major in these tests; contracts that state a version state 1."""
NOTHING = NEWEST
"""What a contract gets whose code executors refuse, or whose version has no number."""
UNSTATED = 0
"""The major of text or WebAssembly that states no version: it stands for v0.1.0."""
HANG = 20.0
"""Seconds of CPU time that no input may take; what is slow here takes a fraction of one."""
MIB = 1 << 20


def bounded(action: Callable[[], int]) -> tuple[int, int]:
    """Return what an action returns, and the most memory that it had at a time."""
    tracemalloc.start()
    try:
        start = time.process_time()
        value = action()
        assert time.process_time() - start < HANG
        return value, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- text ---


@pytest.mark.parametrize(
    ("code", "major"),
    [
        # The three comment marks, with and without white space.
        (b"// v1.2.3\nfn main() {}\n", 1),
        (b"# v1.2.3\nimport this\n", 1),
        (b"-- v1.2.3\nreturn 1\n", 1),
        (b"//v1.2.3", 1),
        (b"#v1.2.3", 1),
        (b"--v1.2.3", 1),
        (b"# \t  v1.2.3 \t \nx", 1),
        ("#\N{NO-BREAK SPACE}v1.2.3\n".encode(), 1),
        ("# \N{IDEOGRAPHIC SPACE}\tv1.2.3\n".encode(), 1),
        # No comment, or not where it counts.
        (b"", NOTHING),
        (b"\n", NOTHING),
        (b"v1.2.3\n", NOTHING),
        (b"import this\n# v1.2.3\n", NOTHING),
        (b"\n# v1.2.3\n", NOTHING),
        (b" # v1.2.3\n", NOTHING),
        (b"#", UNSTATED),
        (b"#\nv1.2.3\n", UNSTATED),
        (b"/* v1.2.3 */\n", NOTHING),
        (b"; v1.2.3\n", NOTHING),
        (b"- v1.2.3\n", NOTHING),
        # The first mark of the file is the mark: what follows it is no other one.
        (b"## v1.2.3\n", UNSTATED),
        (b"#// v1.2.3\n", UNSTATED),
        (b"/// v1.2.3\n", UNSTATED),
        (b"--- v1.2.3\n", UNSTATED),
        (b"#!/usr/bin/env python3\n# v1.2.3\n", UNSTATED),
        # What may be stated.
        (b"# v0.1.0", 0),
        (b"# v1.*.*", 1),
        (b"# v1.", 1),
        (b"# v2.0.0-rc1\n", 2),
        (b"# v1.2.3 and more\n", 1),
        (b"# v001.2.3", 1),
        (b"# v7.0.0", 7),
        (b"# v*.*.*\n", NOTHING),
        (b"# v1\n", 1),
        (b"# v\n", NOTHING),
        (b"# v.1.2\n", NOTHING),
        (b"# v1x.2.3\n", NOTHING),
        (b"# v-1.2.3\n", NOTHING),
        (b"# v 1.2.3\n", NOTHING),
        (b"# V1.2.3\n", UNSTATED),
        (b"# version 1.2.3\n", NOTHING),
        (b"# 1.2.3\n", UNSTATED),
        ("# v\N{ARABIC-INDIC DIGIT ONE}.2.3".encode(), NOTHING),
        # Above the newest.
        (b"# v8.0.0\n", NEWEST),
        (b"# v99999999999999999999999999.0.0\n", NEWEST),
        # Line ends and encodings.
        (b"# v1.2.3\r\nimport this\r\n", 1),
        (b"\xef\xbb\xbf# v1.2.3\n", NOTHING),
        ("# v1.2.3".encode("utf-16"), NOTHING),
        (b"# v1.2.3 \xff\n", NOTHING),
        (b"# v1.2.3\nprint('\xff')\n", NOTHING),
        (b"# v1.2.3\nprint('\xc3", NOTHING),
        ("# v1.2.3 ü\nprint('ü')\n".encode(), 1),
        (b"# v1.2.3\n\0\0\0", 1),
    ],
)
def test_text(code: bytes, major: int) -> None:
    assert stated_major(code, NEWEST) == major


@pytest.mark.parametrize(
    ("text", "newest", "major"),
    [("v0.1.0", 0, 0), ("v1.0.0", 0, 0), ("v9.0.0", 12, 9), ("v12.0.0", 12, 12), ("v13.0", 12, 12)],
)
def test_never_above_the_newest(text: str, newest: int, major: int) -> None:
    assert stated_major(f"# {text}\n".encode(), newest) == major


@pytest.mark.parametrize("at", [1 << 16, (1 << 16) + 1, 3 << 16])
def test_text_is_read_in_steps_that_cut_no_character(at: int) -> None:
    head = b"# v1.2.3\n"
    code = head + b"x" * (at - len(head) - 1) + "é".encode() * 3
    assert stated_major(code, NEWEST) == 1
    assert stated_major(code[:-1], NEWEST) == NOTHING


# --- WebAssembly, from its binary format ---

HEADER = b"\0asm\x01\0\0\0"
NAME = b"genvm.version"


def uleb(number: int, width: int = 1) -> bytes:
    """Return an unsigned LEB128 number in at least ``width`` bytes."""
    groups = [number & 0x7F]
    while (number := number >> 7) or len(groups) < width:
        groups.append(number & 0x7F)
    return bytes(group | 0x80 for group in groups[:-1]) + bytes(groups[-1:])


def section(kind: int, payload: bytes, size: bytes | None = None) -> bytes:
    """Return a section; ``size`` replaces its size field."""
    return bytes((kind,)) + (uleb(len(payload)) if size is None else size) + payload


def custom(name: bytes, content: bytes) -> bytes:
    """Return a custom section."""
    return section(0, uleb(len(name)) + name + content)


def module(*sections: bytes) -> bytes:
    """Return a module of these sections."""
    return HEADER + b"".join(sections)


def stating(text: bytes) -> bytes:
    """Return the custom section that states a version."""
    return custom(NAME, text)


# (module (func (export "f") (result i32) (i32.const 7)))
PROGRAM = (
    section(1, b"\x01\x60\x00\x01\x7f"),
    section(3, b"\x01\x00"),
    section(7, b"\x01\x01f\x00\x00"),
    section(10, b"\x01\x04\x00\x41\x07\x0b"),
)
STATES_1 = stating(b"v1.2.3")


@pytest.mark.parametrize(
    ("code", "major"),
    [
        pytest.param(module(STATES_1, *PROGRAM), 1, id="first"),
        pytest.param(module(*PROGRAM, STATES_1), 1, id="last"),
        pytest.param(module(*PROGRAM[:2], STATES_1, *PROGRAM[2:]), 1, id="in between"),
        pytest.param(module(STATES_1), 1, id="alone"),
        pytest.param(module(), UNSTATED, id="no section"),
        pytest.param(module(*PROGRAM), UNSTATED, id="absent"),
        pytest.param(module(custom(b"name", b"v1.2.3"), *PROGRAM), UNSTATED, id="another name"),
        pytest.param(module(custom(b"name", b"\xff"), STATES_1), 1, id="after another"),
        pytest.param(module(custom(b"genvm.versions", b"v1.2")), UNSTATED, id="a longer name"),
        pytest.param(module(custom(b"genvm.versio", b"nv1.2")), UNSTATED, id="a shorter name"),
        pytest.param(module(custom(b"", NAME + b"v1.2.3")), UNSTATED, id="no name"),
        pytest.param(module(section(11, STATES_1)), UNSTATED, id="inside another section"),
        pytest.param(module(section(1, STATES_1[2:])), UNSTATED, id="not custom"),
        pytest.param(module(STATES_1, stating(b"v2.0.0")), 1, id="duplicated"),
        pytest.param(module(stating(b"v2.0.0"), STATES_1), 2, id="duplicated, swapped"),
        pytest.param(module(stating(b""), STATES_1), NOTHING, id="duplicated, the first empty"),
        pytest.param(module(stating(b"\xff"), STATES_1), UNSTATED, id="duplicated, not UTF-8"),
        pytest.param(module(stating(b"v1.2.3\xff")), UNSTATED, id="not UTF-8"),
        pytest.param(module(stating(b"v*.*.*")), NOTHING, id="any"),
        pytest.param(module(stating(b"v8.0.0")), NEWEST, id="above the newest"),
        pytest.param(module(stating(b"v2.0.0-rc1")), 2, id="prerelease"),
        # Sizes.
        pytest.param(module(section(0, STATES_1[2:], uleb(19, 5))), 1, id="a size of five bytes"),
        pytest.param(
            module(section(0, uleb(13, 3) + NAME + b"v1.2.3")), 1, id="a name size of three bytes"
        ),
        pytest.param(module(section(0, STATES_1[2:], uleb(21))), UNSTATED, id="a size too large"),
        pytest.param(
            module(section(0, STATES_1[2:], b"\xff\xff\xff\xff\x0f")),
            UNSTATED,
            id="a size of 4 GiB",
        ),
        pytest.param(
            module(section(0, STATES_1[2:], b"\xff\xff\xff\xff\x7f")), UNSTATED, id="beyond 32 bits"
        ),
        pytest.param(
            module(section(0, STATES_1[2:], uleb(20, 6))), UNSTATED, id="a size of six bytes"
        ),
        pytest.param(module(section(0, STATES_1[2:], uleb(13))), UNSTATED, id="a size too small"),
        pytest.param(module(section(0, b"\x7f" + NAME)), UNSTATED, id="a name beyond its section"),
        pytest.param(
            module(section(0, b"\xff\xff\xff\xff\x0f" + NAME)), UNSTATED, id="a name of 4 GiB"
        ),
        pytest.param(
            module(section(0, b""), STATES_1), UNSTATED, id="a custom section without name"
        ),
        pytest.param(module(section(0, b"\x80"), STATES_1), UNSTATED, id="a name size cut short"),
        pytest.param(module(section(1, b"", uleb(99)), STATES_1), UNSTATED, id="another one's lie"),
        pytest.param(module() + b"\x00", UNSTATED, id="an id and nothing more"),
        pytest.param(module() + b"\x00\x80", UNSTATED, id="a size cut short"),
        pytest.param(module(STATES_1) + b"\x01\xff", 1, id="garbage after it"),
        pytest.param(module(section(99, b"x"), STATES_1), 1, id="a section of a kind to come"),
        # What is no module of version 1.
        pytest.param(HEADER[:7] + STATES_1, UNSTATED, id="a header cut short"),
        pytest.param(b"\0asm\x02\0\0\0" + STATES_1, NOTHING, id="version 2"),
        pytest.param(b"\0asm\x0d\0\x01\0" + STATES_1, NOTHING, id="a component"),
        pytest.param(b" " + module(STATES_1), NOTHING, id="not at the start"),
    ],
)
def test_webassembly(code: bytes, major: int) -> None:
    assert stated_major(code, NEWEST) == major


def test_the_modules_of_the_table_are_modules() -> None:
    """The bytes above are what an engine takes for WebAssembly, and those that lie are not."""
    engine = wasmtime.Engine()
    for good in (module(STATES_1, *PROGRAM), module(*PROGRAM, STATES_1)):
        wasmtime.Module.validate(engine, good)
    with pytest.raises(wasmtime.WasmtimeError):
        wasmtime.Module.validate(engine, module(section(0, STATES_1[2:], uleb(21))))


def test_the_text_of_the_section_is_taken_as_it_is() -> None:
    text = "v1.2.3, größer ✓\n"
    assert stated_version(module(*PROGRAM, stating(text.encode()))) == text


@pytest.mark.parametrize("place", ["before first", "after last", "after func"])
def test_webassembly_from_an_assembler(place: str) -> None:
    source = (
        f'(module (@custom "{NAME.decode()}" ({place}) "v1.2.3") (memory 1)'
        ' (func (export "f") (result i32) i32.const 7) (data (i32.const 0) "\\00asm"))'
    )
    assert stated_version(bytes(wasmtime.wat2wasm(source))) == "v1.2.3"


def real_modules() -> list[Path]:
    """Return the modules that the package quickjs-rs ships: QuickJS, compiled by rustc."""
    files = importlib.metadata.files("quickjs-rs") or ()
    return [Path(str(file.locate())) for file in files if file.name.endswith(".wasm")]


def test_real_modules() -> None:
    modules = real_modules()
    assert modules, "the package quickjs-rs ships no module any more: take another one"
    for path in modules:
        code = path.read_bytes()
        assert len(code) > 100_000
        assert stated_version(code) == "v0.1.0"
        for stated in (code + STATES_1, HEADER + STATES_1 + code[len(HEADER) :]):
            wasmtime.Module.validate(wasmtime.Engine(), stated)
            assert stated_version(stated) == "v1.2.3"


# --- zip archives ---

WASM_IN_ZIP = module(*PROGRAM, stating(b"v3.0.0"))


def zipped(
    content: bytes | None = b"v1.2.3\n",
    *,
    name: str = "version",
    method: int = zipfile.ZIP_STORED,
    comment: bytes = b"",
    prefix: bytes = b"",
    zip64: bool = False,
    beside: int | None = None,
) -> bytes:
    """Return an archive of a contract, with ``content`` in a member."""
    file = io.BytesIO(prefix)
    file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file, "a", method) as archive:
        archive.writestr("runner.json", b"{}")
        archive.writestr("contract.wasm", WASM_IN_ZIP, beside)
        if content is not None:
            with archive.open(name, "w", force_zip64=zip64) as member:
                member.write(content)
        archive.comment = comment
    return file.getvalue()


def patched(code: bytes, mark: bytes, offset: int, data: bytes) -> bytes:
    """Return an archive with ``data`` at an offset from the last ``mark``."""
    at = code.rindex(mark) + offset
    return code[:at] + data + code[at + len(data) :]


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def with_zip64_end(code: bytes) -> bytes:
    """Return an archive whose directory is described by a zip64 record (APPNOTE 4.3.14, 4.3.15)."""
    at = code.rindex(END)
    count, size, start = code[at + 10 : at + 12], code[at + 12 : at + 16], code[at + 16 : at + 20]
    longs = b"".join(field.ljust(8, b"\0") for field in (count, count, size, start))
    record = b"PK\x06\x06" + (44).to_bytes(8, "little") + b"\x2d\0\x2d\0" + bytes(8) + longs
    locator = b"PK\x06\x07" + bytes(4) + at.to_bytes(8, "little") + (1).to_bytes(4, "little")
    return code[:at] + record + locator + END + bytes(4) + b"\xff" * 12 + b"\0\0"


@pytest.mark.parametrize(
    ("code", "major"),
    [
        pytest.param(zipped(method=zipfile.ZIP_DEFLATED), NOTHING, id="deflated"),
        pytest.param(zipped(), 1, id="stored"),
        pytest.param(zipped(b"v1.2.3"), 1, id="no newline"),
        pytest.param(zipped(b"v1.2.3\r\n"), 1, id="CRLF"),
        pytest.param(zipped(b"v2.0.0-rc1"), 2, id="prerelease"),
        pytest.param(zipped(b"v8.0.0"), NEWEST, id="above the newest"),
        pytest.param(zipped(b"v*.*.*"), NOTHING, id="any"),
        pytest.param(zipped(b""), NOTHING, id="empty"),
        pytest.param(zipped(b"\xffv1.2.3"), NOTHING, id="not UTF-8 at the start"),
        pytest.param(zipped(b"v1.2.3\xff"), NOTHING, id="not UTF-8"),
        pytest.param(zipped(b"v1." + "é".encode() * 1000), 1, id="long, of wide characters"),
        pytest.param(zipped(b"v1.x" + "é".encode() * 1000), 1, id="long, of wide characters, odd"),
        pytest.param(zipped(None), NOTHING, id="absent"),
        pytest.param(zipped(name="Version"), NOTHING, id="another case"),
        pytest.param(zipped(name="src/version"), NOTHING, id="in a folder"),
        pytest.param(zipped(b"", name="version/"), NOTHING, id="a folder"),
        pytest.param(zipped(comment=b"v2.0.0 " * 100), 1, id="with a comment"),
        pytest.param(zipped(prefix=b"# v2.0.0\n"), 1, id="after text that states another"),
        pytest.param(zipped(prefix=module(stating(b"v2.0.0"))), 1, id="after WebAssembly"),
        pytest.param(zipped(zip64=True), 1, id="a zip64 member"),
        pytest.param(with_zip64_end(zipped()), 1, id="a zip64 directory"),
        pytest.param(zipped(beside=zipfile.ZIP_DEFLATED), NOTHING, id="beside a deflated one"),
        pytest.param(zipped(method=zipfile.ZIP_BZIP2), NOTHING, id="bzip2"),
        pytest.param(zipped(method=zipfile.ZIP_LZMA), NOTHING, id="lzma"),
        # Broken archives.
        pytest.param(zipped()[:-1], NOTHING, id="one byte is missing"),
        pytest.param(zipped()[:-22], NOTHING, id="the last record is missing"),
        pytest.param(zipped()[: len(zipped()) // 2], NOTHING, id="half is missing"),
        pytest.param(LOCAL, NOTHING, id="a mark and nothing more"),
        pytest.param(END + bytes(18), NOTHING, id="no member"),
        pytest.param(patched(zipped(), CENTRAL, 8, b"\x01"), NOTHING, id="encrypted"),
        pytest.param(patched(zipped(), CENTRAL, 10, b"\x63"), NOTHING, id="an unknown method"),
        pytest.param(patched(zipped(), CENTRAL, 16, b"\0\0\0\0"), 1, id="a wrong checksum"),
        pytest.param(patched(zipped(), LOCAL, 37, b"\xff" * 6), NOTHING, id="corrupted"),
        # Directories that lie.
        pytest.param(patched(zipped(), END, 12, b"\xff" * 4), NOTHING, id="a huge directory"),
        pytest.param(patched(zipped(), END, 12, b"\0\0\0\x01"), NOTHING, id="a large directory"),
        pytest.param(patched(zipped(), END, 12, bytes(4)), NOTHING, id="an empty directory"),
        pytest.param(patched(zipped(), END, 16, b"\xff" * 4), NOTHING, id="one far away"),
        pytest.param(patched(zipped(), CENTRAL, 42, b"\xff" * 4), NOTHING, id="a member far away"),
        pytest.param(patched(zipped(), CENTRAL, 42, bytes(4)), NOTHING, id="another's place"),
        pytest.param(
            patched(with_zip64_end(zipped()), b"PK\x06\x07", 16, b"\x02"),
            NOTHING,
            id="several disks",
        ),
        pytest.param(
            patched(with_zip64_end(zipped()), b"PK\x06\x06", 40, b"\xff" * 8),
            NOTHING,
            id="a huge zip64 directory",
        ),
    ],
)
def test_zip(code: bytes, major: int) -> None:
    assert stated_major(code, NEWEST) == major


def test_the_archives_of_the_table_are_archives() -> None:
    for code in (zipped(zip64=True), with_zip64_end(zipped()), zipped(prefix=b"# v2.0.0\n")):
        with zipfile.ZipFile(io.BytesIO(code)) as archive:
            assert archive.read("version") == b"v1.2.3\n"


@pytest.mark.parametrize(
    ("code", "major"),
    [
        (b"# v1.2.3\nMAGIC = 'PK\x05\x06'\n" + b"#" * 40, 1),
        (b"# v1.2.3\nMAGIC = 'PK\x05\x06'\n" + b"#" * 40 + b"\n" * 70_000, 1),
        (module(STATES_1, section(11, END + b"#" * 40)), 1),
    ],
    ids=["text", "text, far from its end", "WebAssembly"],
)
def test_a_zip_mark_makes_no_zip(code: bytes, major: int) -> None:
    """A program that reads archives has the mark among its data, and no library opens it."""
    with pytest.raises((zipfile.BadZipFile, ValueError)):
        zipfile.ZipFile(io.BytesIO(code))
    assert stated_major(code, NEWEST) == major


@pytest.mark.parametrize(
    ("method", "major"),
    [
        (zipfile.ZIP_DEFLATED, NOTHING),
        (zipfile.ZIP_BZIP2, NOTHING),
        (zipfile.ZIP_LZMA, NOTHING),
    ],
    ids=["deflated", "bzip2", "lzma"],
)
def test_a_zip_bomb_is_not_unpacked(method: int, major: int) -> None:
    piece = bytes(MIB)
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", method, compresslevel=1) as archive,
        archive.open("version", "w", force_zip64=True) as member,
    ):
        member.write(b"v1.2.3\n")
        for _ in range(24):
            member.write(piece)
    code = file.getvalue()
    assert len(code) < MIB
    found, memory = bounded(lambda: stated_major(code, NEWEST))
    assert found == major
    assert memory < MIB


@pytest.mark.parametrize("count", [10_000, 200_000])
def test_an_archive_of_many_members(count: int) -> None:
    """The memory of a directory is bounded, whether it is read to the end or not."""
    entry = CENTRAL + bytes(24) + (1).to_bytes(2, "little") + bytes(16) + b"a"
    size = (count * len(entry)).to_bytes(4, "little")
    code = entry * count + END + bytes(4) + b"\xff" * 4 + size + bytes(6)
    found, memory = bounded(lambda: stated_major(code, NEWEST))
    assert found == NOTHING
    assert memory < 32 * MIB


def test_a_directory_is_bounded_wherever_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later versions of Python find zip64 records in places where this one does not look."""
    count = 200_000
    entry = CENTRAL + bytes(24) + (1).to_bytes(2, "little") + bytes(16) + b"a"
    library: Any = zipfile
    find_record = library._EndRecData

    def find_another_record(file: io.BytesIO) -> list[Any]:
        record: list[Any] = find_record(file)
        record[library._ECD_SIZE] = count * len(entry)
        return record

    monkeypatch.setattr(library, "_EndRecData", find_another_record)
    code = entry * count + END + bytes(18)
    found, memory = bounded(lambda: stated_major(code, NEWEST))
    assert found == NOTHING
    assert memory < 32 * MIB


# --- hostile input ---

LARGE = 16 * MIB
"""Far more than what is not linear could take."""


@pytest.mark.parametrize(
    ("make", "major"),
    [
        (lambda: bytes(LARGE), NOTHING),
        (lambda: b"PK" * (LARGE // 2), NOTHING),
        (lambda: END * (LARGE // 4), NOTHING),
        (lambda: LOCAL + bytes(LARGE), NOTHING),
        (lambda: b"#" * LARGE, UNSTATED),
        (lambda: b"#" + b" " * LARGE + b"v1.2.3", 1),
        (lambda: b"#" + b" " * LARGE, UNSTATED),
        (lambda: b"# v" + b"1" * LARGE, NOTHING),
        (lambda: b"# v1." + b"\n" * LARGE, 1),
        (lambda: b"# v1." + "é".encode() * (LARGE // 2), 1),
        (lambda: b"# v1." + b"x" * LARGE + b"\xff", NOTHING),
        (lambda: HEADER + b"\x00" + b"\x80" * LARGE, UNSTATED),
        (lambda: HEADER + b"\x80" * LARGE, UNSTATED),
        (lambda: HEADER + b"\x00" * LARGE, UNSTATED),
        (lambda: module(stating(b"v" + b"9" * LARGE + b".0.0")), NEWEST),
        (lambda: module(stating(b"v" + b"0" * LARGE + b"1.0.0")), 1),
        (lambda: module(stating(b"v1." + b"\xff" * LARGE)), UNSTATED),
        (lambda: module(section(0, uleb(LARGE) + b"n" * LARGE), STATES_1), 1),
    ],
    ids=[
        "zeros",
        "half zip marks",
        "zip ends",
        "a zip's start",
        "comment marks",
        "spaces before a version",
        "spaces",
        "digits",
        "lines",
        "wide characters",
        "not UTF-8 at the end",
        "an endless LEB128",
        "an endless LEB128 of unknown kind",
        "nameless custom sections",
        "a huge major",
        "a huge number of zeros",
        "a huge section that is not UTF-8",
        "a huge name",
    ],
)
def test_large_hostile_input(make: Callable[[], bytes], major: int) -> None:
    code = make()
    found, memory = bounded(lambda: stated_major(code, NEWEST))
    assert found == major
    assert memory < 4 * LARGE


@pytest.mark.parametrize(
    "piece",
    [section(11, b""), custom(b"", b""), section(11, b"x")],
    ids=["empty", "empty custom", "tiny"],
)
def test_many_sections(piece: bytes) -> None:
    """That nobody has to wait for such a module is shown in ``tests/integration``."""
    code = HEADER + piece * (MIB // len(piece))
    start = time.process_time()
    assert stated_major(code, NEWEST) == UNSTATED
    assert time.process_time() - start < HANG


@pytest.mark.parametrize("count", [13, 100, 1000])
def test_sections_of_a_real_number(count: int) -> None:
    code = module(*[custom(b"name", bytes(i)) for i in range(count)], STATES_1)
    assert stated_major(code, NEWEST) == 1


SMALL_ZIP = zipped()
PIECES = st.sampled_from(
    [
        *(LOCAL, CENTRAL, END, b"PK\x06\x06", b"PK\x06\x07"),
        *(HEADER, b"\x0d" + NAME, STATES_1, b"\0", b"\xff" * 4),
        *(SMALL_ZIP, SMALL_ZIP[:-22], SMALL_ZIP[-22:]),
        *(b"# v1.2.3\n", b"//", b"--"),
    ]
)
ASSEMBLED = st.lists(st.one_of(PIECES, st.binary(max_size=8)), max_size=8).map(b"".join)


@st.composite
def damaged_archives(draw: st.DrawFn) -> bytes:
    """Return an archive with some bytes changed, cut out or put in."""
    code = draw(st.sampled_from([SMALL_ZIP, with_zip64_end(SMALL_ZIP), zipped(comment=b"c" * 30)]))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(code)))
        code = code[:at] + draw(st.binary(max_size=4)) + code[at + draw(st.integers(0, 8)) :]
    return code


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(),
        st.binary().map(HEADER.__add__),
        st.binary().map(b"# v".__add__),
        st.text().map(lambda text: f"# v{text}".encode()),
        ASSEMBLED,
        ASSEMBLED.map(HEADER.__add__),
        damaged_archives(),
    ),
    st.integers(0, 20),
)
@example(b"# v" + b"9" * 5000 + b".", 3)
@example(b"PK\x06\x07" + bytes(12) + b"\x02\0\0\0" + END + bytes(18), 3)
@example(module(stating(b"v" + b"9" * 5000 + b".")), 3)
def test_any_bytes_have_an_answer(code: bytes, newest: int) -> None:
    assert 0 <= stated_major(code, newest) <= newest


@settings(deadline=None)
@given(st.integers(0, 10**30), st.text(alphabet="0123456789.-rc", max_size=20))
def test_what_is_stated_is_found_in_every_form(major: int, rest: str) -> None:
    text = f"v{major}.{rest}".encode()
    for code in (b"// " + text, zipped(text), module(*PROGRAM, stating(text))):
        assert stated_major(code, NEWEST) == min(major, NEWEST)


CASES = json.loads(Path(__file__).with_name("version-cases.json").read_bytes())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_what_a_real_executor_says(case: dict[str, Any]) -> None:
    """GenVM v0.2.7's ``parse-version-pattern`` was asked; its newest major was 2."""
    code = zlib.decompress(base64.b64decode(case["zlib_base64"]))
    assert (stated_version(code) is None) == case["refused_by_executor"]
    assert stated_major(code, 2) == case["major_with_newest_2"]


# --- deployment writes ---


def test_the_code_slot() -> None:
    """As computed by OpenSSL: ``openssl dgst -sha3-256`` of 32 zero bytes and 01 00 00 00."""
    assert hashlib.sha3_256(bytes(32) + b"\x01\0\0\0").digest() == CODE_SLOT
    assert CODE_SLOT.hex() == "e1ae23412792df6b6a98fb7c9839701fb8b02b6fc7ed022810f78346494685e7"


@pytest.mark.parametrize("code", [b"x", b"# v0.1.0\n", bytes(range(256)) * 300])
def test_deployment_writes(code: bytes) -> None:
    assert deployment_writes(code) == [
        (CODE_SLOT + b"\0\0\0\0", len(code).to_bytes(4, "little")),
        (CODE_SLOT + b"\x04\0\0\0", code),
    ]


def test_deployment_writes_do_not_copy_the_code() -> None:
    code = bytes(20 * MIB)
    _, memory = bounded(lambda: len(deployment_writes(code)))
    assert memory < MIB


def test_no_code_cannot_be_deployed() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        deployment_writes(b"")


@pytest.mark.skipif(sys.maxsize < 1 << 40, reason="needs a 64-bit address space")
def test_code_that_fits_in_no_slot() -> None:
    code = bytes(1 << 32)  # zero pages, which cost nothing until they are read
    with pytest.raises(InvalidRequest, match="slot"):
        deployment_writes(code)


# --- in threads ---


class CountingPool:
    """The reactor and its thread pool, with a count of what the pool was asked to do."""

    def __init__(self) -> None:
        self.asked = 0

    def getThreadPool(self) -> CountingPool:
        return self

    def callInThreadWithCallback(self, *work: Any) -> None:
        self.asked += 1
        real_reactor().getThreadPool().callInThreadWithCallback(*work)

    def callFromThread(self, *work: Any) -> None:
        real_reactor().callFromThread(*work)


@async_test
async def test_a_client_that_leaves_frees_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients come and leave, one thread inspects code."""
    go = threading.Event()

    def inspect(code: bytes, newest: int) -> int:
        assert go.wait(PATIENCE)
        return code[0]

    monkeypatch.setattr(genvm_manager, "stated_major", inspect)
    pool, store = CountingPool(), ManifestStore(Config())
    moment = datetime(2025, 6, 1, tzinfo=UTC)
    store.manifest = Manifest((Version((7, 0, 0), "v7.0.0", moment),))
    nobody: Any = None
    contracts = ContractOperations(Config(), pool, store, nobody, nobody, nobody)

    def major(code: bytes) -> Deferred[int]:
        return Deferred.fromCoroutine(contracts.major(code * (INLINE_CODE_BYTES + 1), moment))

    first, second, third = major(b"1"), major(b"2"), major(b"3")
    gone = [outcome(first), outcome(second)]
    first.cancel()
    second.cancel()
    assert [type(error) for (error,) in gone] == [CancelledError, CancelledError]
    assert pool.asked == 1
    go.set()
    assert await soon(third) == ord("3")
    assert pool.asked == 2
