import operator as python_operator
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmap_sparse.mask import BLOCK, Mask, digest_reference, num_words

SIZES = [0, 1, 31, 32, 33, 63, 64, 65, 2047, 2048, 2049, 100_003]


def random_mask(numel: int, density: float = 0.3, seed: int = 0) -> Mask:
    g = torch.Generator().manual_seed(seed)
    return Mask.from_bool(torch.rand(numel, generator=g) < density)


@pytest.mark.parametrize("numel", SIZES)
def test_bits_ranks_and_counts(numel):
    keep = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.3
    mask = Mask.from_bool(keep)
    assert torch.equal(mask.to_bool(), keep)
    assert (mask.numel, mask.nnz) == (numel, int(keep.sum()))
    packed = np.packbits(keep.numpy(), bitorder="little").tobytes()
    assert mask.words.numpy().tobytes()[: len(packed)] == packed
    assert not any(mask.words.numpy().tobytes()[len(packed) :])
    before = [int(keep[: b * BLOCK].sum()) for b in range(-(-numel // BLOCK))]
    assert mask.rank.tolist() == [*before, mask.nnz]
    assert mask.density == (mask.nnz / numel if numel else 0.0)
    again = Mask.from_words(mask.words.clone(), numel)
    assert again == mask
    assert torch.equal(again.rank, mask.rank)


@pytest.mark.parametrize("numel", SIZES)
def test_full_empty_and_complement(numel):
    full, empty = Mask.full(numel), Mask.empty(numel)
    assert full.nnz == numel
    assert full.to_bool().all()
    assert ~full == empty
    assert ~empty == full
    assert full == Mask.from_bool(torch.ones(numel, dtype=torch.bool))
    assert torch.equal(full.rank, Mask.from_words(full.words, numel).rank)


def test_set_algebra():
    a, b = random_mask(5000, seed=1), random_mask(5000, seed=2)
    x, y = a.to_bool(), b.to_bool()
    assert torch.equal((a & b).to_bool(), x & y)
    assert torch.equal((a | b).to_bool(), x | y)
    assert torch.equal((~a).to_bool(), ~x)
    assert torch.equal((a - b).to_bool(), x & ~y)
    assert torch.equal((a ^ b).to_bool(), x ^ y)
    assert a & b <= a <= a | b
    assert not a <= b
    assert a != b
    assert len({a, b, Mask.from_words(a.words.clone(), 5000)}) == 2
    with pytest.raises(ValueError, match="5000 elements, got 4999"):
        a <= random_mask(4999)  # noqa: B015  # the comparison itself raises
    assert a != Mask.full(4999)
    assert a != "mask"


@given(st.lists(st.booleans(), max_size=300))
def test_round_trips(bits):
    mask = Mask.from_bool(torch.tensor(bits, dtype=torch.bool))
    assert mask.to_bool().tolist() == bits
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert mask.digest() == digest_reference(mask.words, mask.numel)


def test_digest_is_the_specified_one():
    """Worked by hand from docs/format.md in plain integers."""
    wrap = (1 << 64) - 1
    words = [0x8000000000000001, 0x5]
    h1 = h2 = 0
    for j, w in enumerate(words):
        t = (w + (j + 1) * 0x9E3779B97F4A7C15) & wrap
        t = ((t ^ (t >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        t ^= t >> 27
        u = (t * 0x94D049BB133111EB) & wrap
        u ^= u >> 31
        h1, h2 = h1 + t, h2 + u
    h1, h2 = (h1 + 96) & wrap, (h2 + 96 * 0x9E3779B97F4A7C15) & wrap
    keep = torch.zeros(96, dtype=torch.bool)
    keep[[0, 63, 64, 66]] = True
    wanted = h1.to_bytes(8, "little") + h2.to_bytes(8, "little")
    assert Mask.from_bool(keep).digest() == wanted


def test_digest_sees_bits_places_and_size():
    seen = {Mask.empty(n).digest() for n in (0, 31, 32, 33, 64, 128)}
    keep = torch.zeros(4096, dtype=torch.bool)
    for i in range(4096):
        keep[i] = True
        seen.add(Mask.from_bool(keep).digest())
        keep[i] = False
    assert len(seen) == 6 + 4096


def test_bad_input_says_what_was_wanted():
    with pytest.raises(TypeError, match="bool, got float32"):
        Mask.from_bool(torch.ones(3))
    with pytest.raises(ValueError, match="contiguous"):
        Mask.from_bool(torch.ones(4, 4, dtype=torch.bool).T[:, 1:])
    with pytest.raises(TypeError, match="int32, got int64"):
        Mask.from_words(torch.zeros(2, dtype=torch.int64), 64)
    with pytest.raises(ValueError, match="expected 2 elements"):
        Mask.from_words(torch.zeros(3, dtype=torch.int32), 64)
    with pytest.raises(ValueError, match="past numel=33"):
        Mask.from_words(torch.tensor([0, 2], dtype=torch.int32), 33)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Mask.full(-1)
    with pytest.raises(TypeError, match="expected an int, got float"):
        Mask.empty(3.0)
    assert Mask.from_words(torch.tensor([-1, 1], dtype=torch.int32), 33) == Mask.full(33)
    assert num_words(33) == 2


@pytest.mark.parametrize(
    "sizes",
    [[100], [64, 96, 33], [64, 33, 96], [1, 2048, 0, 31], [0, 0], [4096, 2048]],
    ids=str,
)
def test_cat(sizes):
    masks = [random_mask(n, seed=i) for i, n in enumerate(sizes)]
    joined = Mask.cat(masks)
    assert torch.equal(joined.to_bool(), torch.cat([m.to_bool() for m in masks]))
    assert torch.equal(joined.rank, Mask.from_words(joined.words.clone(), joined.numel).rank)
    assert joined.nnz == sum(m.nnz for m in masks)


def test_cat_says_what_it_wants():
    with pytest.raises(ValueError, match="masks: expected at least one, got none"):
        Mask.cat([])
    with pytest.raises(TypeError, match="masks: expected a Mask, got str"):
        Mask.cat([Mask.full(3), "mask"])
    with pytest.raises(ValueError, match="masks: expected device cpu, got meta"):
        Mask.cat([Mask.full(32), Mask.full(32).to("meta")])


@pytest.mark.parametrize("operator", ["eq", "ne", "le", "and_", "or_", "sub", "xor"])
def test_masks_of_two_devices_are_not_compared(operator):
    """They would be unequal, silently."""
    combine = getattr(python_operator, operator)
    with pytest.raises(ValueError, match="other: expected device cpu, got meta"):
        combine(Mask.full(64), Mask.full(64).to("meta"))


@pytest.mark.parametrize("save", ["torch.save", "pickle"])
def test_saved_masks_load(save, tmp_path):
    mask = random_mask(5000)
    view = Mask.from_words(torch.cat([mask.words, torch.zeros(100_000).int()])[:157], 5000)
    file = tmp_path / "mask.pt"
    if save == "pickle":
        assert pickle.loads(pickle.dumps(view)) == mask
        return
    torch.save({"mask": view}, file)
    assert torch.load(file, weights_only=True)["mask"] == mask
    assert file.stat().st_size < 4000  # the mask's words, not the storage that they were a view of


def test_what_was_saved_is_checked(tmp_path):
    """The writer of the file may have set any bit."""
    file = tmp_path / "mask.pt"
    broken = Mask(torch.tensor([-1], dtype=torch.int32), torch.zeros(2, dtype=torch.int64), 3, 3)
    torch.save(broken, file)
    with pytest.raises(Exception, match="past numel=3"):
        torch.load(file, weights_only=True)
