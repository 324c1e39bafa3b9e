"""The emulator's memories: bounds, alignment, initialisation, races, and what was moved."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Array = Any
SECTOR = 32

#: Bytes that one entry of the race shadow covers. Neighbouring 16-bit elements may belong to two
#: blocks, and neighbouring bytes of shared memory to two warps.
_GRANULE = {"global": 2, "shared": 1}


@dataclass
class Region:
    """One stretch of global memory that a kernel may touch; overlapping tensors share one."""

    name: str
    address: int
    size: int
    offset: int = 0


@dataclass
class Faults:
    """What was noticed: (kind, source line) to how often, the instruction, and an example."""

    found: dict[tuple[str, int], list[Any]] = field(default_factory=dict)

    def add(self, kind: str, ins: Any, count: int, example: str = "") -> None:
        entry = self.found.setdefault((kind, ins.line), [0, ins.text, example])
        entry[0] += count


class Shadow:
    """Last writer, reader and atomic of each granule: global thread number and barrier epoch."""

    def __init__(self, size: int, granule: int) -> None:
        count = size // granule + 1
        self.granule = granule
        self.thread = {k: np.full(count, -1, np.int64) for k in ("ld", "st", "atom")}
        self.epoch = {k: np.full(count, -1, np.int64) for k in ("ld", "st", "atom")}
        # Of readers the last alone would not do: it may be of the warp that writes next.
        self.many_warps = np.zeros(count, bool)  # in the reader's epoch
        self.many_blocks = np.zeros(count, bool)

    def note(self, kind: str, where: Array, me: Array, epoch: Array, threads: int) -> None:
        """Remember these accesses."""
        thread, epochs = self.thread[kind], self.epoch[kind]
        if kind == "ld":
            before = thread[where]
            block = (before >= 0) & (before // threads == me // threads)
            recent = block & (epochs[where] == epoch)
            many = recent & (self.many_warps[where] | (before // 32 != me // 32))
            self.many_blocks[where[(before >= 0) & ~block]] = True
            self.many_warps[where] = False
            self.many_warps[where[many]] = True
        thread[where], epochs[where] = me, epoch
        if kind == "ld":  # lanes of this very access that read the same
            last = thread[where]
            self.many_warps[where[last // 32 != me // 32]] = True
            self.many_blocks[where[last // threads != me // threads]] = True


class Memory:
    """Global memory of one launch, and the shared memory of the blocks that run now.

    Addresses in global memory are the tensors' own, so that tables of pointers work. What is no
    byte of a registered tensor is out of bounds.
    """

    def __init__(self, tensors: list[tuple[str, torch.Tensor]], check_races: bool) -> None:
        self.tensors = [(name, t) for name, t in tensors if t.numel()]
        self.regions = _merge(self.tensors)
        size = sum(-(-r.size // 256) * 256 + 512 for r in self.regions) + 512
        self.arena = np.full(size, 0xA5, np.uint8)
        self.starts = np.array([r.address for r in self.regions] or [0], np.int64)
        self.ends = np.array([r.address + r.size for r in self.regions] or [0], np.int64)
        self.offsets = np.array([r.offset for r in self.regions] or [0], np.int64)
        self.check_races = check_races
        self.faults = Faults()
        self.stats: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
        self.touched_at: dict[tuple[str, str], Array] = {}
        self.touched = {k: np.zeros(size // SECTOR + 1, bool) for k in ("ld", "st", "atom")}
        granule = min([_GRANULE["global"], *(t.element_size() for _, t in self.tensors)])
        self.shadow = {"global": Shadow(size, granule)} if check_races else {}
        self.shared = np.zeros(0, np.uint8)
        # Tickets: which blocks did an acquiring and releasing atomic at an address, and which came
        # after every other block's.
        self.grid_blocks = 0
        self.tickets: dict[int, set[int]] = defaultdict(set)
        self.after_all: set[int] = set()
        for t, view in self._views():
            view[:] = t

    def _views(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each tensor's bytes beside its bytes in the arena."""
        out = []
        for _, t in self.tensors:
            data = t.detach().view(-1).view(torch.uint8).numpy()
            region = self.regions[int(np.searchsorted(self.starts, t.data_ptr(), "right")) - 1]
            at = region.offset + t.data_ptr() - region.address
            out.append((data, self.arena[at : at + data.size]))
        return out

    def write_back(self) -> None:
        for t, view in self._views():
            t[:] = view

    def start_blocks(self, blocks: np.ndarray, threads: int, shared_bytes: int) -> None:
        """Fresh shared memory for the blocks that run next."""
        self.lanes = len(blocks) * threads
        self.threads = threads
        self.block_of = np.repeat(np.arange(len(blocks)), threads)
        self.thread_id = np.repeat(blocks, threads) * threads + np.tile(
            np.arange(threads), len(blocks)
        )
        self.epoch = np.zeros(self.lanes, np.int64)
        self.accessed = np.full(
            self.lanes, -1, np.int64
        )  # the epoch of a lane's last global access
        self.shared_size = shared_bytes
        self.stride = -(-shared_bytes // 256) * 256 + 256
        self.shared = np.full(len(blocks) * self.stride + 16, 0xA5, np.uint8)
        if self.check_races:
            self.shadow["shared"] = Shadow(len(self.shared), _GRANULE["shared"])

    # -- checks ----------------------------------------------------------------------------------

    def locate(self, address: Array, mask: Array | None, size: int, ins: Any, space: str) -> Any:
        """Byte offsets into the backing array, and the lanes whose access is good."""
        good = np.ones(self.lanes, bool) if mask is None else mask.copy()
        if space == "shared":
            bad = good & ((address < 0) | (address + size > self.shared_size))
            offset = address + self.block_of * self.stride
        else:
            own = np.maximum(np.searchsorted(self.starts, address, "right") - 1, 0)
            bad = good & ((address < self.starts[own]) | (address + size > self.ends[own]))
            offset = address - self.starts[own] + self.offsets[own]
        if bad.any():
            example = ""
            if space == "global":
                lane = int(np.flatnonzero(bad)[0])
                region = self.regions[own[lane]]
                at = int(address[lane]) - region.address
                example = f"byte {at} of {region.name}, which has {region.size}"
            self.faults.add(f"{space} out-of-bounds", ins, int(bad.sum()), example)
            good &= ~bad
        crooked = good & (address % size != 0)
        if crooked.any():
            self.faults.add(f"{space} misaligned", ins, int(crooked.sum()))
            good &= ~crooked
        return offset, good

    def _count(
        self, offset: Array, good: Array, size: int, ins: Any, space: str, kind: str
    ) -> None:
        lines, active = offset.reshape(-1, 32), good.reshape(-1, 32)
        some = active.any(1)
        lines, active = lines[some], active[some]
        if not len(lines):
            return
        stats = self.stats[ins.place, kind, space]
        stats["requests"] += len(lines)
        stats["bytes"] += int(active.sum()) * size
        if space == "global":
            stats["sectors"] += _distinct(np.where(active, lines // SECTOR, -1))
            touched = self.touched[kind]
            touched[offset[good] // SECTOR] = True
            here = self.touched_at.setdefault((ins.place, kind), np.zeros_like(touched))
            here[offset[good] // SECTOR] = True
        else:
            wavefronts, ideal = _bank_conflicts(lines, active, size)
            stats["wavefronts"] += wavefronts
            stats["ideal"] += ideal

    def _race(self, offset: Array, good: Array, size: int, ins: Any, space: str, kind: str) -> None:
        """Two accesses to one granule, one of them a write, that no barrier orders.

        Within a block a barrier orders, and so do lanes of one warp (they run in step here, and
        Triton separates them). Between blocks nothing does but the last ticket of a launch; two
        atomics never race.
        """
        shadow = self.shadow[space]
        lanes = np.flatnonzero(good)
        if not lanes.size:
            return
        count = max(1, size // shadow.granule)
        where = ((offset[lanes] // shadow.granule)[:, None] + np.arange(count)).ravel()
        lane = np.repeat(lanes, count)
        me, epoch = self.thread_id[lane], self.epoch[lane]
        alone = ~np.isin(me // self.threads, list(self.after_all))
        if space == "global":
            self.accessed[lanes] = self.epoch[lanes]

        def clash(other: str) -> Array:
            thread = shadow.thread[other][where]
            used = thread >= 0
            block = thread // self.threads == me // self.threads
            another, elsewhere = thread // 32 != me // 32, ~block
            if other == "ld":
                another = another | shadow.many_warps[where]
                elsewhere = elsewhere | shadow.many_blocks[where]
            unordered = another & (shadow.epoch[other][where] == epoch)
            return used & ((elsewhere & alone & (space == "global")) | (block & unordered))

        against = {"ld": ("st",), "st": ("st", "ld", "atom"), "atom": ("st",)}[kind]
        if space == "shared" and kind != "st":
            against = (*against, "atom" if kind == "ld" else "ld")
        clashes = np.logical_or.reduce([clash(other) for other in against])
        if clashes.any():
            self.faults.add(f"{space} race ({kind})", ins, int(clashes.sum()))
        shadow.note(kind, where, me, epoch, self.threads)

    def _take_ticket(self, lane: int, address: int, ins: Any) -> None:
        """What other warps of the block did is released only if a barrier came before."""
        mine = self.thread_id // self.threads == self.thread_id[lane] // self.threads
        other = mine & (self.thread_id // 32 != self.thread_id[lane] // 32)
        if (self.accessed[other] == self.epoch[other]).any():
            self.faults.add("global race (a ticket without a barrier before it)", ins, 1)
        block = int(self.thread_id[lane]) // self.threads
        self.tickets[address].add(block)
        if len(self.tickets[address]) == self.grid_blocks:
            self.after_all.add(block)

    def _collision(self, index: Array, values: list[Array], ins: Any, space: str) -> None:
        """Two lanes of one store that write different values to one element."""
        at = np.concatenate([index + k for k in range(len(values))])
        value = np.concatenate(values)
        order = np.argsort(at, kind="stable")
        differ = (at[order][1:] == at[order][:-1]) & (value[order][1:] != value[order][:-1])
        if differ.any():
            kind = f"{space} race (two lanes of one store, different values)"
            self.faults.add(kind, ins, int(differ.sum()))

    # -- accesses --------------------------------------------------------------------------------

    def _cells(self, space: str, dtype: np.dtype) -> Array:
        backing = self.shared if space == "shared" else self.arena
        return backing[: len(backing) // 16 * 16].view(dtype)

    def _access(self, address: Array, mask: Any, size: int, ins: Any, space: str, kind: str) -> Any:
        offset, good = self.locate(address, mask, size, ins, space)
        self._count(offset, good, size, ins, space, kind)
        if self.check_races:
            self._race(offset, good, size, ins, space, kind)
        return offset, good

    def load(
        self, address: Array, mask: Any, dtype: np.dtype, width: int, ins: Any, space: str
    ) -> tuple[list[Array], Array]:
        offset, good = self._access(address, mask, dtype.itemsize * width, ins, space, "ld")
        cells = self._cells(space, dtype)
        index = np.where(good, offset, 0) // dtype.itemsize
        return [cells[index + k] for k in range(width)], good

    def store(
        self, address: Array, mask: Any, values: list[Array], dtype: np.dtype, ins: Any, space: str
    ) -> None:
        size = dtype.itemsize * len(values)
        offset, good = self._access(address, mask, size, ins, space, "st")
        index = offset[good] // dtype.itemsize
        chosen = [np.broadcast_to(v, (self.lanes,)).view(dtype)[good] for v in values]
        if self.check_races and index.size:
            self._collision(index, chosen, ins, space)
        cells = self._cells(space, dtype)
        for k, value in enumerate(chosen):
            cells[index + k] = value

    def atomic(
        self,
        address: Array,
        mask: Any,
        op: str,
        dtype: np.dtype,
        operands: list[Array],
        fetch: bool,
        rng: Any,
        ins: Any,
        space: str,
    ) -> tuple[Array, Array]:
        """Read, combine and write, lane after lane; with `fetch`, returns what was there before."""
        offset, good = self._access(address, mask, dtype.itemsize, ins, space, "atom")
        cells, old = self._cells(space, dtype), np.zeros(self.lanes, dtype)
        lanes = np.flatnonzero(good)
        if rng is not None:
            rng.shuffle(lanes)
        first, *rest = (np.broadcast_to(v, (self.lanes,)).view(dtype) for v in operands)
        if op == "add" and dtype.kind in "iu" and not fetch:
            np.add.at(cells, offset[lanes] // dtype.itemsize, first[lanes])
            return old, good
        for lane in lanes.tolist():
            at = offset[lane] // dtype.itemsize
            before = cells[at]
            old[lane] = before
            if self.check_races and "acq_rel" in ins.opcode:
                self._take_ticket(lane, int(offset[lane]), ins)
            if op == "cas":
                cells[at] = rest[0][lane] if before == first[lane] else before
            else:
                cells[at] = _COMBINE[op](before, first[lane])
        return old, good

    # -- results ---------------------------------------------------------------------------------

    def accesses(self) -> dict[tuple[str, str, str], Counter[str]]:
        """The counters, with each place's distinct sectors."""
        for (place, kind), touched in self.touched_at.items():
            self.stats[place, kind, "global"]["distinct"] = int(touched.sum())
        return self.stats

    def sectors(self) -> dict[str, dict[str, int]]:
        """Distinct sectors touched, by region and kind."""
        out = {}
        for region in self.regions:
            inside = slice(region.offset // SECTOR, -(-(region.offset + region.size) // SECTOR))
            out[region.name] = {k: int(t[inside].sum()) for k, t in self.touched.items()}
        return out


_COMBINE = {
    "add": lambda x, y: x + y,
    "exch": lambda x, y: y,
    "min": min,
    "max": max,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
}


def _merge(tensors: list[tuple[str, torch.Tensor]]) -> list[Region]:
    """Sorted by address; tensors that overlap become one region. Offsets keep 32-byte phase."""
    regions: list[Region] = []
    for name, t in sorted(tensors, key=lambda pair: pair[1].data_ptr()):
        address, size = t.data_ptr(), t.numel() * t.element_size()
        last = regions[-1] if regions else None
        if last and address < last.address + last.size:
            last.size = max(last.size, address + size - last.address)
            last.name += f"+{name}"
        else:
            regions.append(Region(name, address, size))
    at = 256
    for region in regions:
        region.offset = at + region.address % SECTOR
        at = -(-(region.offset + region.size) // 256) * 256 + 256
    return regions


def _distinct(keys: Array) -> int:
    """Distinct values in each row, -1 apart, added up."""
    ordered = np.sort(keys, 1)
    changes = (ordered[:, 1:] != ordered[:, :-1]).sum() + len(ordered)
    return int(changes - (ordered[:, 0] == -1).sum())


def _bank_conflicts(lines: Array, active: Array, size: int) -> tuple[int, int]:
    """Wavefronts of shared accesses, and how many there would be without conflicts.

    32 banks of 4 bytes; accesses of 8 and 16 bytes are served by half and quarter warps.
    """
    words = max(1, size // 4)
    lines, active = lines.reshape(-1, 32 // words), active.reshape(-1, 32 // words)
    word = ((lines[:, :, None] >> 2) + np.arange(words)).reshape(len(lines), -1)
    key = np.sort(np.where(np.repeat(active, words, 1), word, -1), 1)
    fresh = np.ones_like(key, bool)
    fresh[:, 1:] = key[:, 1:] != key[:, :-1]
    fresh &= key >= 0
    per_bank = np.zeros((len(key), 32), int)
    np.add.at(per_bank, (np.nonzero(fresh)[0], key[fresh] & 31), 1)
    worst = per_bank.max(1)
    return int(worst.sum()), int((worst > 0).sum())
