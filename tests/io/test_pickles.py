"""Restricted unpickling, and JSON: plain data are read, damaged files refused, and no code runs."""

import datetime
import decimal
import json
import os
import pickle
import random
import re
import subprocess
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crislit.data.refer_build import build_index
from crislit.data.refer_index import ReferIndex
from crislit.errors import InputError
from crislit.io import pickles
from crislit.io.files import read_json
from crislit.io.pickles import load_pickle
from tests.refer_data import one_ref, python2_pickle, write_set

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
# The same examples on every run, and no failure on a busy machine.
relaxed = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def open_set(root: Path) -> ReferIndex:
    return ReferIndex.open(root, "refcoco", "refs(unc).p")


# -- Plain data


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickles_of_every_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    refs, _ = one_ref()
    refs[0]["sentences"][0]["sent"] = "café 左"
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(refs, protocol))
    assert load_pickle(path) == refs


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_kinds_of_plain_data_are_read(protocol: int, tmp_path: Path) -> None:
    numbers = [0, -1, 2**40, -(2**80), 1.5, float("inf")]
    containers = [(), (1,), (1, (2, 3)), {}, {"a": [1]}]
    value = [None, True, False, *numbers, "é", b"\xe9\x00", *containers]
    path = tmp_path / "plain.p"
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_pickle(path) == value


@pytest.mark.parametrize("protocol", [0, 2])
def test_byte_strings_of_python_2_are_read_as_latin_1(protocol: int, tmp_path: Path) -> None:
    refs, instances = one_ref()
    refs[0]["sentences"][0]["sent"] = "the café's \\ 'sign'\n"
    content = python2_pickle(refs, protocol)
    root = write_set(tmp_path / "data", content, json.dumps(instances).encode())
    index = open_set(root)
    assert load_pickle(root / "refcoco/refs(unc).p") == refs
    assert index.sentence(0) == "the café's \\ 'sign'\n"
    assert index.splits == ("val",)
    assert (index.ref_id(0), index.image_id(0), index.sentence_id(0)) == (3, 7, 5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_byte_strings_of_python_3_are_read_wherever_text_is_expected(
    protocol: int, tmp_path: Path
) -> None:
    refs, instances = one_ref()
    refs[0]["sentences"][0]["sent"] = b"caf\xe9"
    refs[0]["split"] = b"val"
    refs.append(refs[0] | {"ref_id": 4})  # two occurrences of the name are one split
    content = pickle.dumps(refs, protocol)
    index = open_set(write_set(tmp_path / "data", content, json.dumps(instances).encode()))
    assert index.sentence(0) == "café"
    assert index.splits == ("val",)
    assert index.split_refs("val").tolist() == [0, 1]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(-(2**63), 2**63), inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)
"""Any plain data."""


@given(value=plain, protocol=st.sampled_from(PROTOCOLS))
@settings(relaxed, max_examples=150)
def test_any_plain_data_is_read_back_from_any_protocol(
    value: Any, protocol: int, tmp_path: Path
) -> None:
    (tmp_path / "refs.p").write_bytes(pickle.dumps(value, protocol))
    assert load_pickle(tmp_path / "refs.p") == value


# -- Pickles that would run code


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class WithState:
    def __init__(self) -> None:
        self.ref_id = 3


def payloads(sentinel: Path) -> dict[str, Any]:
    """Return objects that create the sentinel file when they are unpickled."""
    touch = Runs(os.system, f"touch {sentinel}")
    cycle: list[Any] = [touch]
    cycle.append(cycle)
    return {
        "os.system": touch,
        "eval": Runs(eval, f"open({str(sentinel)!r}, 'w').close()"),
        "exec": Runs(exec, f"open({str(sentinel)!r}, 'w').close()"),
        "open": Runs(open, str(sentinel), "w"),
        "subprocess": Runs(subprocess.check_call, ["touch", str(sentinel)]),
        "a method of a class": Runs(Path.touch, Path(sentinel)),
        "deep in a ref": [{"ref_id": 3, "sentences": [{"sent": [(1, touch)]}]}],
        "as a dictionary's key": {(1, touch): 2},
        "among thousands of plain items": [*range(3000), touch, *range(3000)],
        "seen twice": [touch, touch],
        "in a cycle": cycle,
    }


# Python's own reader leaves the file of the payload "open" open.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", payloads(Path("x")))
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(
    name: str, protocol: int, tmp_path: Path
) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(payloads(sentinel)[name], protocol))
    pickle.loads(path.read_bytes())
    assert sentinel.exists(), "the payload works"
    sentinel.unlink()
    reason = r"cannot read .*refs\.p: .*only plain containers, numbers and strings"
    with pytest.raises(InputError, match=reason):
        load_pickle(path)
    assert not sentinel.exists()


OPCODES = {  # {} is the shell command
    "protocol 0's GLOBAL and REDUCE": b"cos\nsystem\n(S'{}'\ntR.",
    "INST": b"(S'{}'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'{}'\no.",
    "STACK_GLOBAL with names from the memo": (
        b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94h\x01h\x00\x93(S'{}'\ntR."
    ),
    "hidden below a plain result": b"cos\nsystem\n(S'{}'\ntR0(lp0\n.",
    "memoised, then fetched": b"cos\nsystem\np7\n0(lp0\n0g7\n(S'{}'\ntR.",
    "posix": b"cposix\nsystem\n(S'{}'\ntR.",
    "Python 2's name of subprocess": b"ccommands\ngetoutput\n(S'{}'\ntR.",
}


@pytest.mark.parametrize("opcodes", OPCODES.values(), ids=OPCODES)
def test_handwritten_opcodes_that_would_run_code_are_refused(
    opcodes: bytes, tmp_path: Path
) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "refs.p"
    path.write_bytes(opcodes.replace(b"{}", f"touch {sentinel}".encode()))
    pickle.loads(path.read_bytes())
    assert sentinel.exists(), "the payload works"
    sentinel.unlink()
    with pytest.raises(InputError, match="only plain containers, numbers and strings"):
        load_pickle(path)
    assert not sentinel.exists()


TRICKS = {
    "a persistent id": b"Pfile\n.",
    "an extension code": b"\x80\x02\x82\x01.",
    "attributes of the one allowed function": (
        b"\x80\x04\x8c\x07_codecs\x8c\x12encode.__globals__\x93."
    ),
    "another function of its module": b"c_codecs\ndecode\n(S'x'\nS'rot13'\ntR.",
    "the allowed function with a codec that unpacks": b"c_codecs\nencode\n(I1\nS'zip'\ntR.",
    "the allowed function used as a class": b"\x80\x02c_codecs\nencode\n)\x81.",
    "attributes set on the allowed function": (
        b"\x80\x02c_codecs\nencode\nN(S'__code__'\nI1\nd\x86b."
    ),
    "builtins' getattr": b"cbuiltins\ngetattr\n.",
    "Python 2's builtins": b"c__builtin__\neval\n.",
    "a module to import": b"cthis\ns\n.",
}


@pytest.mark.parametrize("opcodes", TRICKS.values(), ids=TRICKS)
def test_tricks_around_the_reader_are_refused(opcodes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(opcodes)
    with pytest.raises(InputError, match=r"cannot read .*refs\.p"):
        load_pickle(path)


OBJECTS = {
    "an instance of a class": WithState(),
    "a class": WithState,
    "a function": len,
    "an ordered dictionary": OrderedDict(a=1),
    "a path": Path("x"),
    "a fraction": Fraction(1, 3),
    "a complex number": 1j,
    "a numpy array": np.zeros(3),
    "a numpy number": np.float64(1.0),
    "a numpy dtype": np.dtype("int64"),
    "a range": range(3),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", OBJECTS)
def test_a_pickled_object_other_than_plain_data_is_refused(
    name: str, protocol: int, tmp_path: Path
) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([{"ref_id": OBJECTS[name]}], protocol))
    with pytest.raises(InputError, match="only plain containers, numbers and strings"):
        load_pickle(path)


def is_plain(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        parts = [*value, *(value.values() if isinstance(value, dict) else ())]
        return type(value) in (list, dict) and all(map(is_plain, parts))
    return type(value) in (int, float, str, bool, type(None))


OWN: dict[str, tuple[Any, Any]] = {  # values that people have in their refs, and what they mean
    "a NumPy id": (np.int64(7), 7),
    "a NumPy id of 32 bits": (np.int32(7), 7),
    "a NumPy number": (np.float32(0.5), 0.5),
    "a NumPy boolean": (np.bool_(True), True),
    "a NumPy array": (np.array([[1.5, 2], [3, 4]]), [[1.5, 2], [3, 4]]),
    "a tensor": (torch.tensor([1, 2]), [1, 2]),
    "a tensor without dimensions": (torch.tensor(7), 7),
    "a path": (Path("a/b.jpg"), str(Path("a/b.jpg"))),
    "a date": (datetime.date(2026, 1, 2), "2026-01-02"),
    "a time": (datetime.datetime(2026, 1, 2), "2026-01-02 00:00:00"),
    "an ordered dictionary": (OrderedDict(a=1), {"a": 1}),
    "a dictionary with a default": (defaultdict(list, a=[1]), {"a": [1]}),
    "a counter": (Counter("aab"), {"a": 2, "b": 1}),
    "a set": ({1}, [1]),
    "a frozen set": (frozenset([1]), [1]),
    "a decimal number": (decimal.Decimal("1.5"), 1.5),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", OWN)
def test_the_advice_for_values_of_other_libraries_makes_the_refs_plain(
    name: str, protocol: int, tmp_path: Path
) -> None:
    path = tmp_path / "refs(mine).p"
    value, plain_value = OWN[name]
    refs = [{"ref_id": value, "sentences": [{"sent": "left"}]}]
    path.write_bytes(pickle.dumps(refs, protocol))
    with pytest.raises(InputError, match=r"If it is your own, save it again") as caught:
        load_pickle(path)
    message = str(caught.value)
    assert message.startswith(f"cannot read {path}: it refers to ")
    assert ("with ids as int(x)" in message) == (type(value).__module__ in ("numpy", "torch"))
    assert "\n" not in message
    (code,) = re.findall("`refs = (.*)`", message)
    plain_refs = eval(code, {"json": json, "refs": refs})
    assert is_plain(plain_refs)
    path.write_bytes(pickle.dumps(plain_refs, protocol))
    assert load_pickle(path) == [{"ref_id": plain_value, "sentences": [{"sent": "left"}]}]


def test_a_table_of_pandas_is_advised_to_become_records(tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(b"cpandas.core.frame\nDataFrame\n)R.")
    with pytest.raises(InputError, match=r"`refs = refs\.to_dict\('records'\)`"):
        load_pickle(path)


@pytest.mark.parametrize(
    "opcodes", [b"cos\nsystem\n.", b"cbuiltins\neval\n.", b"c__main__\nRef\n."]
)
def test_other_values_are_refused_without_that_advice(opcodes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(opcodes)
    with pytest.raises(
        InputError, match=r"are read\. Fetch it again, from a source that you trust$"
    ):
        load_pickle(path)


@pytest.mark.parametrize("fault", [MemoryError, NameError, TypeError])
def test_faults_of_the_reader_are_not_called_damage(
    fault: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise fault("ours")

    monkeypatch.setattr(pickles._DataUnpickler, "_count_container", fail)
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([{}], 2))
    with pytest.raises(fault, match="ours"):
        load_pickle(path)


def test_a_refs_file_that_the_system_refuses_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^cannot read .*: Is a directory$"):
        load_pickle(tmp_path)


def test_opening_a_set_refuses_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    root = write_set(tmp_path / "data", pickle.dumps([Runs(os.system, f"touch {sentinel}")]))
    with pytest.raises(InputError, match=r"refs\(unc\)\.p: it refers to \w+\.system"):
        open_set(root)
    assert not sentinel.exists()


# -- Damaged and oversized files


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_truncated_anywhere_is_an_error_that_names_it(
    protocol: int, tmp_path: Path
) -> None:
    content = pickle.dumps(one_ref()[0], protocol)
    path = tmp_path / "refs(unc).p"
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match=r"cannot read .*refs\(unc\)\.p"):
            load_pickle(path)


def test_a_pickle_with_any_byte_changed_is_read_or_refused_but_never_anything_else(
    tmp_path: Path,
) -> None:
    content = pickle.dumps(one_ref()[0], 2)
    path = tmp_path / "refs.p"
    rng = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            build_index(load_pickle(path), one_ref()[1], path)
        except InputError:
            refused += 1
    assert refused > 100


def test_a_refs_file_of_too_many_containers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickles, "MAX_CONTAINERS", 1000)
    path = tmp_path / "refs.p"
    reason = r"refs\.p: it has more than 1,000 lists, tuples and dictionaries"
    for protocol in PROTOCOLS:
        too_many: list[list[Any]] = [
            [[] for _ in range(1001)],
            [{} for _ in range(1001)],
            [(i,) for i in range(1001)],
        ]
        for value in too_many:
            path.write_bytes(pickle.dumps(value, protocol))
            with pytest.raises(InputError, match=reason):
                load_pickle(path)
        path.write_bytes(pickle.dumps(["x"] * 10_000, protocol))
        assert len(load_pickle(path)) == 10_000


@given(content=st.binary(max_size=60))
@settings(relaxed, max_examples=300)
def test_any_bytes_are_plain_data_or_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    for load in (load_pickle, read_json):
        try:
            load(path)
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017


# -- JSON


def test_a_json_file_truncated_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    content = json.dumps(one_ref()[1]).encode()
    path = tmp_path / "instances.json"
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match=r"cannot read .*instances\.json"):
            read_json(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"[" * 200_000, b"{'a': 1}", b"\x00"])
def test_a_json_file_of_other_bytes_is_an_error_that_names_it(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "instances.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*instances\.json"):
        read_json(path)
