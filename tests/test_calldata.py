"""Calldata."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genvm_manager
from genvm_manager import (
    CALLDATA_MAX_VALUES,
    Address,
    CalldataError,
    CalldataValue,
    decode_calldata,
    encode_calldata,
)

VECTORS: list[tuple[CalldataValue, str]] = [
    (-17, "8201"),
    (2**64, "81808080808080808010"),
    (-(2**64), "faffffffffffffffff0f"),
    ("héllo", "3468c3a96c6c6f"),
    ({"b": 1, "a": [], "aa": b""}, "1e01610502616103016209"),
    (
        {"Ok": {"data": "hi", "consumed_gen": 0}},
        "0e024f6b160c636f6e73756d65645f67656e010464617461146869",
    ),
    (
        {"cookie": "c1", "host_data": {"node_address": "0xaa", "tx_id": "0xbb"}},
        "1606636f6f6b696514633109686f73745f64617461160c6e6f64655f6164647265737324307861"
        "610574785f69642430786262",
    ),
    (None, "00"),
    (False, "08"),
    (True, "10"),
    (Address(bytes(range(20))), "18" + bytes(range(20)).hex()),
    (0, "01"),
    (-1, "02"),
    (b"\x00\xff", "1300ff"),
]

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(1 << 600), max_value=1 << 600)
    | st.binary()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(min_size=20, max_size=20).map(Address),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=5)
    ),
    max_leaves=30,
)


def typed(value: Any) -> Any:
    """Return ``value`` with its types spelled out, for 1 == True and Address == bytes."""
    if isinstance(value, list):
        return [typed(item) for item in value]
    if isinstance(value, dict):
        return [(key, typed(item)) for key, item in sorted(value.items())]
    return type(value).__name__, value


@pytest.mark.parametrize(("value", "wire"), VECTORS)
def test_vector(value: CalldataValue, wire: str) -> None:
    assert encode_calldata(value).hex() == wire
    assert typed(decode_calldata(bytes.fromhex(wire))) == typed(value)


@given(VALUES)
def test_round_trip(value: Any) -> None:
    assert typed(decode_calldata(encode_calldata(value))) == typed(value)


@given(st.integers(min_value=0, max_value=1 << 2000))
def test_integers_match_a_simple_definition(number: int) -> None:
    groups, rest = [], number << 3 | 1
    while rest >= 0x80:
        groups.append(rest & 0x7F | 0x80)
        rest >>= 7
    assert encode_calldata(number) == bytes([*groups, rest])


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_any_bytes_decode_canonically_or_are_refused(data: bytes) -> None:
    try:
        value = decode_calldata(data)
    except CalldataError:
        return
    assert encode_calldata(value) == data


@given(VALUES, st.data())
def test_every_truncation_is_refused(value: Any, data: st.DataObject) -> None:
    wire = encode_calldata(value)
    cut = data.draw(st.integers(0, len(wire) - 1))
    with pytest.raises(CalldataError, match=r"byte \d+"):
        decode_calldata(wire[:cut])


@pytest.mark.parametrize(
    ("wire", "problem"),
    [
        ("", "byte 0: the bytes end"),
        ("80", "byte 0: the bytes end inside a number"),
        ("8100", "byte 0: a number with a redundant zero"),
        ("818000", "byte 0: a number with a redundant zero"),
        ("07", "byte 0: an unknown type"),
        ("0f", "byte 0: an unknown type"),
        ("20", "byte 0: an unknown type"),
        ("8001", "byte 0: an unknown type"),
        ("1800", "byte 1: the bytes end"),
        ("0000", "byte 1: 1 bytes after"),
        ("0dff", "byte 1: the bytes end"),
        ("0d07", "byte 1: an unknown type"),
        ("0cff", "byte 1: invalid UTF-8"),
        ("1461ff", "byte 2: invalid UTF-8"),
        ("1ceda080", "byte 1: invalid UTF-8"),
        ("14c080", "byte 1: invalid UTF-8"),
        ("0e01ff00", "byte 2: invalid UTF-8"),
        ("1601620001610000", "byte 4: map keys"),
        ("16016100016100", "byte 4: map keys"),
        ("0e810061", "byte 1: a number with a redundant zero"),
        ("fdffffffff0f00", "byte 0: more entries"),
        ("feffffffff0f00", "byte 0: more entries"),
        ("fbffffffff0f00", "byte 6: the bytes end"),
    ],
)
def test_malformed_bytes_name_the_offset(wire: str, problem: str) -> None:
    with pytest.raises(CalldataError) as caught:
        decode_calldata(bytes.fromhex(wire))
    assert problem in caught.value.message


def test_keys_are_ordered_by_code_point_not_by_utf16() -> None:
    # U+10000 sorts before U+FFFF in UTF-16 and after it by code points and in UTF-8.
    wire = encode_calldata({"\U00010000": 1, "\uffff": 2, "a": 3})
    assert wire.index("\uffff".encode()) < wire.index("\U00010000".encode())
    assert decode_calldata(wire) == {"a": 3, "\uffff": 2, "\U00010000": 1}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (1.5, "value: a fraction"),
        ({"a": [1, {"b": 0.5}]}, "value['a'][1]['b']: a fraction"),
        ((1, 2), "value: a tuple"),
        (bytearray(b"x"), "value: a bytearray"),
        ({1: 2}, "value: map keys are strings, not a number"),
        ({None: 2, "a": 1}, "value: map keys are strings, not null"),
        (["ok", "\ud800"], "value[1]: character 0 is a lone surrogate"),
        ({"x\udfff": 1}, "value['x\\udfff']: character 1 is a lone surrogate"),
    ],
)
def test_values_without_a_form_name_their_path(value: Any, problem: str) -> None:
    with pytest.raises(CalldataError) as caught:
        encode_calldata(value)
    assert problem in caught.value.message
    caught.value.message.encode()


def test_bools_are_not_integers() -> None:
    assert [encode_calldata(v).hex() for v in (True, 1, False, 0)] == ["10", "09", "08", "01"]
    assert decode_calldata(b"\x10") is True


@pytest.mark.parametrize("length", [0, 19, 21])
def test_an_address_has_twenty_bytes(length: int) -> None:
    with pytest.raises(CalldataError, match=f"not {length}"):
        Address(bytes(length))


def nested_list(depth: int) -> CalldataValue:
    value: CalldataValue = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_depth_limit_is_exact_and_the_same_both_ways() -> None:
    good, bad = nested_list(128), nested_list(129)
    wire = encode_calldata(good)
    assert wire == b"\x0d" * 127 + b"\x05"
    assert decode_calldata(wire) == good
    with pytest.raises(CalldataError, match="nested more than 128"):
        encode_calldata(bad)
    with pytest.raises(CalldataError, match="byte 128: nested"):
        decode_calldata(b"\x0d" + wire)


def test_no_depth_reaches_the_recursion_limit() -> None:
    with pytest.raises(CalldataError, match="nested more than 128"):
        encode_calldata(nested_list(20_000))
    with pytest.raises(CalldataError, match="byte 128: nested"):
        decode_calldata(b"\x0d" * 1_000_000 + b"\x05")


def test_a_value_that_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(CalldataError, match="nested more than 128"):
        encode_calldata(value)


def test_number_of_values_is_limited() -> None:
    wire = encode_calldata([None] * (CALLDATA_MAX_VALUES - 1))
    assert decode_calldata(wire) == [None] * (CALLDATA_MAX_VALUES - 1)
    wire = encode_calldata([None] * CALLDATA_MAX_VALUES)
    with pytest.raises(CalldataError, match=f"byte {len(wire) - 1}: more values"):
        decode_calldata(wire)


def test_huge_lengths_allocate_nothing() -> None:
    hostile = [
        (b"\xfb\xff\xff\xff\xff\xff\xff\x7f", "end inside a value"),
        (b"\xfc\xff\xff\xff\xff\xff\xff\x7f", "end inside a value"),
        (b"\xfd\xff\xff\xff\xff\xff\xff\x7f", "more entries"),
        (b"\xfe\xff\xff\xff\xff\xff\xff\x7f", "more entries"),
    ]
    tracemalloc.start()
    try:
        for wire, problem in hostile:
            with pytest.raises(CalldataError, match=problem):
                decode_calldata(wire)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_an_endless_number_costs_linear_time_and_memory() -> None:
    # Shifting byte by byte takes minutes for 8 MiB; folding takes a fraction of a second.
    size = 8 * 1024 * 1024
    began = time.process_time()
    with pytest.raises(CalldataError, match="end inside a number"):
        decode_calldata(b"\xff" * size)
    tracemalloc.start()
    try:
        number = decode_calldata(b"\xf9" + b"\xff" * (size - 2) + b"\x01")
        assert tracemalloc.get_traced_memory()[1] < 12 * size
    finally:
        tracemalloc.stop()
    assert isinstance(number, int)
    assert number.bit_length() == 7 * (size - 1) + 1 - 3
    assert encode_calldata(number) == b"\xf9" + b"\xff" * (size - 2) + b"\x01"
    assert time.process_time() - began < 10


def test_many_empty_containers_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genvm_manager, "CALLDATA_MAX_VALUES", 10_000)
    hostile = b"\x85\x80\x80\x10" + b"\x05" * (4 * 1024 * 1024)
    tracemalloc.start()
    try:
        with pytest.raises(CalldataError, match="more values"):
            decode_calldata(hostile)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
