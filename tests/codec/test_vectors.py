"""Golden and malformed messages, read by the package and by an independent reader."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from ambient import FROZEN, not_under
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_messages import (
    GOLDEN,
    HERE,
    MALFORMED,
    base,
    decode,
    golden,
    have,
    layout,
    malformed,
    module,
)

from fedmap_sparse import _transfer, codec
from fedmap_sparse.codec import container

FLIPPED = ("float32-full", "bfloat16-delta", "update")


@cache
def plain_layout(name: str) -> Any:
    return module("reader").Layout((HERE / "layouts" / f"{name}.json").read_text())


def read_plainly(name: str, data: bytes) -> Any:
    entry, mask = GOLDEN[name], have(name)
    other = entry["base"] and read_plainly(entry["base"], golden(entry["base"]))
    bools = None if mask is None else mask.to_bool().tolist()
    return module("reader").read(data, plain_layout(entry["layout"]), bools, other)


def test_every_file_is_listed() -> None:
    for folder, table in (("golden", GOLDEN), ("malformed", MALFORMED)):
        assert {p.stem for p in (HERE / folder).iterdir()} == set(table)


def test_layouts() -> None:
    for path in (HERE / "layouts").iterdir():
        assert plain_layout(path.stem).digest == layout(path.stem).digest()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_contents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = golden(name)
    m = decode(name, data)
    assert module("make_vectors").content_hash(m) == GOLDEN[name]["sha256"]
    if name != "ignorable":
        assert m.encode() == data
        monkeypatch.setattr(_transfer, "MANY", 64)  # joined and copied as large ones are
        assert m.encode() == data


@pytest.mark.parametrize("name", GOLDEN)
def test_independent_reader_agrees(name: str) -> None:
    data = golden(name)
    m, plain = decode(name, data), read_plainly(name, data)
    assert plain["mask"] == m.mask.to_bool().tolist()
    assert plain["values"] == bytes(container.tensor_bytes(m.packed))
    assert plain["tail"] == bytes(container.tensor_bytes(m.tail))
    for kind in ("float", "int", "bool"):
        flat = [m.buffers[b.name] for b in m.layout.buffers if b.kind == kind]
        assert plain[kind + "s"] == b"".join(bytes(container.tensor_bytes(t)) for t in flat)
    assert repr(plain["meta"]) == repr(m.meta)
    header = plain["header"]
    assert header["digest"] == m.broadcast_digest
    assert (header["round"], header["epoch"], header["samples"]) == (
        m.round,
        m.epoch,
        m.num_samples,
    )


@not_under("inference", reason=FROZEN)
def test_golden_messages_are_what_the_encoder_writes_today() -> None:
    for name, (_, data, *_rest) in module("make_vectors").golden().items():
        assert data == golden(name), name


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_is_refused(name: str) -> None:
    entry = MALFORMED[name]
    data = malformed(name)
    with pytest.raises(codec.FormatError) as caught:
        decode(entry["from"], data)
    assert entry["reason"] in caught.value.reason
    assert caught.value.offset == entry["offset"]
    with pytest.raises(module("reader").Refused):
        read_plainly(entry["from"], data)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_prefix_is_refused(name: str) -> None:
    data = golden(name)
    for length in range(len(data)):
        with pytest.raises(codec.FormatError):
            decode(name, data[:length])


@pytest.mark.parametrize("name", FLIPPED)
def test_every_flipped_bit_is_refused(name: str) -> None:
    data = bytearray(golden(name))
    mask, expected = have(name), base(name)
    its_layout = layout(GOLDEN[name]["layout"])
    for i in range(8 * len(data)):
        data[i >> 3] ^= 1 << (i & 7)
        with pytest.raises(codec.FormatError):
            codec.decode(data, its_layout, mask=mask, base=expected)
        data[i >> 3] ^= 1 << (i & 7)
    decode(name, bytes(data))


SEALED = ("float32-delta", "update", "rans-mask-full", "rans-float16", "int8-64", "ignorable")


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("name", SEALED)
def test_damage_under_good_checksums_is_refused_or_read(name: str, data: st.DataObject) -> None:
    edit = module("malformed_vectors").Edit(golden(name))
    ends = [*edit.starts.values(), 0]
    headers = st.tuples(st.sampled_from(ends), st.integers(0, 200)).map(sum)
    places = (headers | st.integers(0, len(edit.data) - 1)).filter(lambda i: i < len(edit.data))
    for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
        edit.data[at] = value
    try:
        message = decode(name, edit.seal())
    except codec.FormatError:
        return
    assert message.packed.numel() == message.mask.nnz
    assert message.mask <= message.layout.initial_mask()
    message.to_state_dict()
    message.all_finite()


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(codec.FormatError):
        codec.decode(data, layout("net"))
    with pytest.raises(codec.FormatError):
        codec.inspect(b"\x89FEDMAP\n" + data)
