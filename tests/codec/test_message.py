"""The message: what travels round, what is refused, what bytes are promised."""

from __future__ import annotations

import pickle
import struct
import time
import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse import codec
from fedmap_sparse.codec import container, meta

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def model() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(45, 7))
    net.register_buffer("seen", torch.tensor([True, False, True]))
    return net


@pytest.fixture
def params() -> fs.FlatParameters:
    return fs.flatten(model())


def masks(params: fs.FlatParameters) -> tuple[fs.Mask, fs.Mask]:
    """(parent, child)"""
    parent = fs.ops.magnitude_mask(params.prunable, 200, within=params.mask)
    return parent, fs.ops.magnitude_mask(params.prunable, 77, within=parent)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "full", "delta"])
def test_round_trip(params: fs.FlatParameters, dtype: str, kind: str) -> None:
    parent, mask = masks(params)
    have = {"none": mask, "full": None, "delta": parent}[kind]
    data = codec.encode(
        params,
        mask,
        dtype=dtype,
        mask_section=kind,
        parent=have if kind == "delta" else None,
        round=3,
        epoch=2,
        num_samples=10,
        answers=b"a" * 16,
        meta={"loss": 0.25, "note": "ok"},
    )
    m = codec.decode(data, params.layout, mask=have)
    assert (m.round, m.epoch, m.num_samples, m.answers) == (3, 2, 10, b"a" * 16)
    assert m.meta == {"loss": 0.25, "note": "ok"}
    assert m.mask == mask
    want = fs.ops.cast(fs.ops.pack(params.prunable, mask), DTYPES[dtype])[0]
    assert torch.equal(bits(m.packed), bits(want))
    assert torch.equal(bits(m.tail), bits(fs.ops.cast(params.tail.detach(), DTYPES[dtype])[0]))
    assert m.buffers.keys() == params.buffers.keys()
    for name, b in params.buffers.items():
        assert torch.equal(m.buffers[name], b)
    assert m.encode() == data
    assert reencoded(m) == data


def reencoded(m: codec.Message) -> bytes:
    """The message written anew from its decoded contents."""
    h = m.header
    body = codec.compose(
        m.layout,
        m.mask,
        m.sections[16].tensor(),
        m.tail,
        m.buffers,
        round=h.round,
        epoch=h.epoch,
        num_samples=h.samples,
        answers=h.answers,
        meta=m.meta,
    )
    lead = [] if m.mask_section is None else [m.mask_section]
    header = replace(body.header, base=h.base)
    return container.join(header, (*lead, *body.sections.values()))


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_input_types_and_alignment(params: fs.FlatParameters, wrap: type) -> None:
    mask = masks(params)[1]
    data = codec.encode(params, mask)
    shifted = memoryview(b"x" + data)[1:]  # elements no longer aligned: copied, not viewed
    for given_ in (wrap(data), shifted):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            m = codec.decode(given_, params.layout, mask=mask)
        assert torch.equal(m.packed, fs.ops.pack(params.prunable.detach(), mask))
    for wrong in ("text", None, 7):
        with pytest.raises(TypeError, match="expected bytes"):
            codec.decode(wrong, params.layout)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="contiguous"):
        codec.decode(memoryview(data)[::2], params.layout)


def test_packed_views_the_message(params: fs.FlatParameters) -> None:
    mask = masks(params)[1]
    data = bytearray(codec.encode(params, mask))
    m = codec.decode(data, params.layout, mask=mask)
    start = np.frombuffer(data, np.uint8).ctypes.data
    assert start < m.packed.data_ptr() < start + len(data)


def test_dense_mask_costs_no_bits(params: fs.FlatParameters) -> None:
    dense = params.layout.initial_mask()
    messages = {
        codec.encode(params, dense),
        codec.encode(params, dense, mask_section="full"),
        codec.encode(params, dense, mask_section="delta", parent=dense),
    }
    assert len(messages) == 1
    m = codec.decode(messages.pop(), params.layout)  # no mask at hand is needed
    assert m.mask == dense
    assert m.mask_section is None
    assert torch.equal(m.dense(), params.prunable.detach())


def test_nothing_kept_and_all_pruned_state(params: fs.FlatParameters) -> None:
    empty = fs.Mask.empty(params.layout.prunable_numel)
    m = codec.decode(codec.encode(params, empty, mask_section="full"), params.layout)
    assert m.packed.numel() == 0
    state = m.to_state_dict()
    assert list(state) == list(params.layout.names)
    assert not state["3.weight"].any()
    assert torch.equal(state["3.bias"], params.to_state_dict()["3.bias"])


def test_one_broadcast_digest_for_all_receivers(params: fs.FlatParameters) -> None:
    parent, mask = masks(params)
    body = codec.compose(
        params.layout,
        mask,
        fs.ops.pack(params.prunable.detach(), mask),
        params.tail,
        params.buffers,
        round=5,
    )
    got = {
        codec.decode(body.encode(kind, p), params.layout, mask=have).broadcast_digest
        for kind, p, have in (("none", None, mask), ("full", None, None), ("delta", parent, parent))
    }
    assert got == {body.broadcast_digest}
    other = codec.compose(
        params.layout,
        mask,
        fs.ops.pack(params.prunable.detach(), mask).neg(),
        params.tail,
        params.buffers,
        round=5,
    )
    assert other.broadcast_digest != body.broadcast_digest


def test_message_needs_the_right_mask(params: fs.FlatParameters) -> None:
    parent, mask = masks(params)
    delta = codec.encode(params, mask, mask_section="delta", parent=parent)
    none = codec.encode(params, mask)
    for data, wanted in ((delta, parent), (none, mask)):
        for have in (None, params.layout.initial_mask()):
            with pytest.raises(codec.NeedsMask) as caught:
                codec.decode(data, params.layout, mask=have)
            assert caught.value.wanted == wanted.digest()
            assert pickle.loads(pickle.dumps(caught.value)).wanted == wanted.digest()
    with pytest.raises(ValueError, match="expected a mask over"):
        codec.decode(none, params.layout, mask=fs.Mask.full(5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_base(params: fs.FlatParameters, dtype: str) -> None:
    mask = masks(params)[1]
    base = codec.decode(codec.encode(params, mask, dtype="bfloat16"), params.layout, mask=mask)
    with torch.no_grad():
        params.prunable.mul_(1.01)
    data = codec.encode(params, mask, dtype=dtype, base=base)
    m = codec.decode(data, params.layout, mask=mask, base=base)
    packed, old = fs.ops.pack(params.prunable.detach(), mask), base.packed.float()
    assert torch.equal(m.packed, old + (packed - old).to(DTYPES[dtype]).float())
    assert m.encode() == data == reencoded(m)
    with pytest.raises(codec.FormatError, match=r"expected the base .* got none"):
        codec.decode(data, params.layout, mask=mask)
    with pytest.raises(codec.FormatError, match="expected the base"):
        codec.decode(data, params.layout, mask=mask, base=m)
    with pytest.raises(ValueError, match="same mask"):
        codec.encode(params, masks(params)[0], base=base)


def test_finiteness_is_told_not_judged(params: fs.FlatParameters) -> None:
    mask = masks(params)[1]
    assert codec.decode(codec.encode(params, mask), params.layout, mask=mask).all_finite()
    tail = next(e.name for e in params.layout.tail_entries)
    for value in (float("nan"), float("inf"), float("-inf")):
        for write in ("packed", "tail", "buffer"):
            p = fs.flatten(model())
            if write == "packed":
                p.prunable.detach()[mask.to_bool().nonzero()[-1]] = value
            elif write == "tail":
                p.module.get_parameter(tail).data.view(-1)[-1] = value
            else:
                p.module.get_buffer("1.running_var")[1] = value
            m = codec.decode(codec.encode(p, mask), p.layout, mask=mask)
            assert not m.all_finite()


def test_float64_buffers_keep_their_bits() -> None:
    net = nn.Linear(3, 4)
    net.register_buffer("third", torch.tensor([1 / 3], dtype=torch.float64))
    net.register_buffer("short", torch.tensor([0.5], dtype=torch.float16))
    p = fs.flatten(net)
    m = codec.decode(codec.encode(p, p.mask), p.layout)
    assert m.buffers["third"].item() == 1 / 3
    assert m.buffers["short"].item() == 0.5


def test_encode_refuses(params: fs.FlatParameters) -> None:
    parent, mask = masks(params)
    for options, error, words in (
        ({"dtype": "float64"}, ValueError, "dtype: expected one of float32, float16, bfloat16"),
        ({"mask_section": "some"}, ValueError, "mask_section: expected"),
        ({"mask_section": "delta"}, ValueError, "expected a parent"),
        ({"mask_section": "full", "parent": parent}, ValueError, "expected no parent"),
        ({"mask_section": "delta", "parent": fs.Mask.empty(parent.numel)}, ValueError, "subset"),
        ({"round": -1}, ValueError, "round: expected 0 to 2\\^53"),
        ({"num_samples": (1 << 53) + 1}, ValueError, "num_samples"),
        ({"epoch": 1.5}, TypeError, "epoch: expected an int"),
        ({"answers": b"short"}, ValueError, "answers: expected a digest of 16 bytes"),
        ({"meta": {"a": [1]}}, TypeError, "expected bool, int, float or str, got list"),
        ({"meta": {"": 1}}, ValueError, "key of 1 to 255 bytes"),
        ({"meta": {"a": 1 << 63}}, ValueError, "integer of 64 bits"),
        ({"meta": {"a": "x" * 5000}}, ValueError, "at most 4096"),
        (
            {"meta": {f"{i:03}": True for i in range(257)}},
            ValueError,
            "at most 256 entries, got 257",
        ),
        ({"meta": {1: 2}}, TypeError, "expected str keys"),
    ):
        with pytest.raises(error, match=words):
            codec.encode(params, mask, **options)
    packed = fs.ops.pack(params.prunable.detach(), mask)
    with pytest.raises(ValueError, match="packed: expected 77 elements"):
        codec.compose(params.layout, mask, packed[:-1], params.tail, params.buffers)
    with pytest.raises(ValueError, match="tail: expected"):
        codec.compose(params.layout, mask, packed, params.tail[:-1], params.buffers)
    with pytest.raises(ValueError, match="buffers: expected"):
        codec.compose(params.layout, mask, packed, params.tail, {})
    wrong = {**params.buffers, "seen": torch.ones(4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="seen: expected shape"):
        codec.compose(params.layout, mask, packed, params.tail, wrong)


def test_huge_claims_fail_at_once(params: fs.FlatParameters) -> None:
    mask = masks(params)[1]
    data = bytearray(codec.encode(params, mask))
    small = data[: 128 + 64]
    small[112:124] = struct.pack("<QI", len(small), 1)
    small[128 + 8 : 128 + 24] = struct.pack("<QQ", 1 << 60, 1 << 62)
    for end, start in ((124, 0), (128 + 60, 128)):
        crc = container.crc32c(bytes(small[start:end]))
        small[end : end + 4] = struct.pack("<I", crc)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(codec.FormatError, match="expected a payload of 4611686018427387904 bytes"):
        codec.decode(bytes(small), params.layout, mask=mask)
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert seconds < 0.05  # 0.2 ms on a quiet machine; a loaded one runs this test too


@given(st.data())
def test_meta_round_trip(data: st.DataObject) -> None:
    value = (
        st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats() | st.text(max_size=9)
    )
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
    record = data.draw(st.dictionaries(text, value, min_size=1, max_size=8))
    section = meta.write(record)
    back = meta.read(section)
    assert repr(sorted(back.items())) == repr(sorted(record.items()))
    assert bytes(meta.write(back).payload) == bytes(section.payload)


def test_state_dict_door(params: fs.FlatParameters) -> None:
    mask = masks(params)[1]
    state = params.to_state_dict()
    bools = params.layout.mask_dict(mask)
    arrays = {name: t.numpy() for name, t in state.items()}
    buffers = [b.name for b in params.layout.buffers]
    layout = fs.FlatLayout.from_state_dict(state, buffers=buffers)
    assert layout.digest() == params.layout.digest()
    data = codec.encode_state_dict(arrays, {k: b.numpy() for k, b in bools.items()})
    assert data == codec.encode(params, mask, mask_section="full")
    back = codec.decode_state_dict(data, like=arrays)
    for name, array in arrays.items():
        want = array * bools[name].numpy() if name in bools else array
        assert isinstance(back[name], np.ndarray)
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert np.array_equal(back[name], want)
    tensors = codec.decode_state_dict(data, layout=layout)
    assert all(torch.equal(tensors[n], torch.from_numpy(back[n])) for n in arrays)
    assert all(t.data_ptr() not in (0,) or t.numel() == 0 for t in tensors.values())
    model().load_state_dict(tensors)


def test_state_dict_door_deltas_bfloat16_and_partial_masks() -> None:
    state = {
        "w": torch.randn(30, 10, dtype=torch.bfloat16),
        "v": torch.randn(4, 4),
        "b": torch.randn(3),
    }
    keep = {"w": torch.rand(30, 10) < 0.5}
    less = {"w": keep["w"] & (torch.rand(30, 10) < 0.5)}
    data = codec.encode_state_dict(state, less, mask_section="delta", parent=keep)
    back = codec.decode_state_dict(data, like=state, masks=keep)
    assert torch.equal(back["w"], state["w"] * less["w"])
    assert torch.equal(back["v"], state["v"])  # has no mask: kept whole
    assert back["w"].dtype == torch.bfloat16
    with pytest.raises(codec.NeedsMask):
        codec.decode_state_dict(data, like=state, masks=less)
    for call, words in (
        (lambda: codec.encode_state_dict(state, {"x": keep["w"]}), "prunable parameters"),
        (lambda: codec.encode_state_dict(state, {"w": keep["w"][:1]}), "w: expected shape"),
        (lambda: codec.decode_state_dict(data), "expected `like` or `layout`"),
        (lambda: codec.decode_state_dict(data, like={"w": state["w"]}), "of layout"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="w: expected"):
        codec.encode_state_dict({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)})


def test_inspect_needs_no_layout(params: fs.FlatParameters) -> None:
    parent, mask = masks(params)
    data = codec.encode(
        params, mask, mask_section="delta", parent=parent, answers=b"q" * 16, meta={"loss": 0.5}
    )
    seen = codec.inspect(data)
    assert seen.size == len(data)
    assert seen.survivors == 77
    assert seen.density == 77 / params.layout.eligible
    assert seen.broadcast_digest == codec.decode(data, params.layout, mask=parent).broadcast_digest
    assert [s.name for s in seen.sections] == [
        "DELTA", "VALUES", "TAIL", "FLOATS", "INTS", "BOOLS", "META",
    ]  # fmt: skip
    for s in seen.sections:
        assert data[s.offset : s.offset + s.size]
    text = str(seen)
    for words in ("update", "delta", mask.digest().hex(), "loss=0.5", f"{len(data):,} bytes"):
        assert words in text
    with pytest.raises(codec.FormatError, match="payload: expected CRC"):
        codec.inspect(data[:192] + b"\xff" + data[193:])


def test_a_record_has_at_most_256_entries() -> None:
    entries = b"".join(b"\x03%03d\x00\x01" % i for i in range(257))
    for count in (257, 5):
        section = container.Section.make(container.Id.META, container.Wire.RECORD, count, entries)
        with pytest.raises(fs.FormatError, match=r"at most 256 entries|expected 5 entries, got 6"):
            meta.read(section)
    section = container.Section.make(container.Id.META, container.Wire.RECORD, 256, entries[:-6])
    assert len(meta.read(section)) == 256
