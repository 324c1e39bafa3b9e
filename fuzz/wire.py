"""A mutator of messages that knows their structure: `python fuzz/wire.py COUNT [SEED [WORKERS]]`.

It damages sound messages (golden ones, and those of a live round) in their headers, sections and
payloads, mends every checksum, and feeds them to the package. What must hold for each:

- `decode` gives a message or raises FormatError, within 0.1 s; with `materialize=False` alike;
- an accepted message encodes to the same bytes, and its sums are those of its decoded values;
- a share of all is read by `tests/vectors/reader.py` too, with the same verdict and contents;
- `inspect`, a server's `add` and a client's `receive` raise nothing else; what a server admits and
  a client takes is finite.

A message that breaks one of these is written to build/fuzz/wire and named; the exit code is 1.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import torch

import fedmap_sparse as fs
from fedmap_sparse import codec
from fedmap_sparse.codec import container
from fedmap_sparse.errors import FormatError
from fedmap_sparse.federated import FedMapClient, FedMapServer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
from mutate import Mutator, Parts, Seed, crc  # lies beside this file
from stored_messages import GOLDEN, module

ROOT = Path(__file__).parent.parent
VECTORS = ROOT / "tests" / "vectors"
SLOWEST = 0.1  # seconds for one message


def golden_seeds(reader: ModuleType) -> list[Seed]:
    """The golden messages, with what their receivers have."""
    layouts = module("make_vectors").layouts()
    plain = {path.stem: reader.Layout(path.read_text()) for path in (VECTORS / "layouts").iterdir()}
    found: dict[str, Seed] = {}
    for name, entry in sorted(GOLDEN.items(), key=lambda item: item[1]["base"] is not None):
        layout = layouts[entry["layout"]]
        have, base, plain_base = None, None, None
        if entry["have"] is not None:
            raw = bytearray((VECTORS / "masks" / f"{entry['have']}.bits").read_bytes())
            have = fs.Mask.from_words(
                torch.frombuffer(raw, dtype=torch.int32), layout.prunable_numel
            )
        if entry["base"] is not None:
            other = found[entry["base"]]
            base = codec.decode(other.data, other.layout, mask=other.have)
            plain_base = reader.read(other.data, other.plain_layout, _bools(other.have))
        data = (VECTORS / "golden" / f"{name}.fsm").read_bytes()
        found[name] = Seed(name, data, layout, plain[entry["layout"]], have, base, plain_base)
    # The independent reader takes a second for the largest; they are read by the package alone.
    return [seed for seed in found.values() if len(seed.data) < 20_000]


def _bools(mask: fs.Mask | None) -> list[bool] | None:
    return None if mask is None else [bool(b) for b in mask.to_bool().tolist()]


class Live:
    """A server in a round and a client of it, fed with damaged messages of that round."""

    def __init__(self) -> None:
        def net() -> torch.nn.Module:
            torch.manual_seed(3)
            return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.BatchNorm1d(32))

        self.server = FedMapServer(fs.flatten(net()), fs.schedule.OneShot(0.5, 0), lr=0.1)
        self.client = FedMapClient(fs.flatten(net()))
        self.server.begin_round()
        self.sent = self.server.broadcast()
        self.fresh = self.client.state_dict()
        self.client.receive(self.sent)
        layout, mask = self.server.layout, self.server.mask
        self.seeds = []
        for dtype in (*codec.DTYPES, "int8"):
            for delta in (False, True):
                sender = FedMapClient(fs.flatten(net()), dtype=dtype, delta=delta)
                sender.receive(self.sent)
                data = sender.update(7, 0.5)
                base = codec.decode(self.sent, layout) if delta else None
                self.seeds.append(Seed(f"live-{dtype}", data, layout, None, mask, base, None))
        self.seeds.append(Seed("live-broadcast", self.sent, layout, None, None, None, None))

    def feed(self, data: bytes) -> str | None:
        """What is wrong with how server or client took it, if anything."""
        self.server.add(0, data)
        aggregation = self.server._streaming("fuzz")
        if aggregation.accepted and not all(
            bool(torch.isfinite(t).all()) for t in aggregation.mean()[0:1]
        ):
            return "a server's mean is not finite"
        self.server._require("fuzz").aggregation = None
        try:
            self.client.receive(data)
        except FormatError:
            return None
        if not bool(torch.isfinite(self.client.params.values).all()):
            return "a client's weights are not finite"
        self.client.load_state_dict(self.fresh)
        return None


class Checker:
    """Feeds messages to all readers and collects what should not be."""

    def __init__(self, share: float, seed: int) -> None:
        self.reader = module("reader")
        self.reader.crc32c = lambda data: crc(bytes(data))
        self.live = Live()
        self.mutator = Mutator([*golden_seeds(self.reader), *self.live.seeds], seed)
        self.share = share
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []

    def run(self, count: int) -> None:
        for _ in range(count):
            seed, data = self.mutator.next()
            try:
                self.check(seed, data)
            except Exception as error:  # whatever it is, it should not be
                self.report(seed, data, f"{type(error).__name__}: {error}")

    def report(self, seed: Seed, data: bytes, what: str) -> None:
        folder = ROOT / "build" / "fuzz" / "wire"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{seed.name}-{self.seed}-{len(self.findings)}.fsm"
        path.write_bytes(data)
        self.findings.append(f"{path}: {what}")

    def decoded(self, seed: Seed, data: bytes, whole: bool) -> codec.Message | None:
        try:
            return codec.decode(
                data, seed.layout, mask=seed.have, base=seed.base, materialize=whole
            )
        except FormatError as error:
            if not 0 <= error.offset <= max(len(data), 1 << 20):
                raise ValueError(f"offset {error.offset} of {len(data)} bytes") from error
            return None

    def timed(self, seed: Seed, data: bytes) -> float:
        start = time.perf_counter()
        self.decoded(seed, data, True)
        return time.perf_counter() - start

    def check(self, seed: Seed, data: bytes) -> None:
        self.counts["messages"] += 1
        start = time.perf_counter()
        message = self.decoded(seed, data, True)
        if time.perf_counter() - start > SLOWEST:
            seconds = min(self.timed(seed, data) for _ in range(5))  # the machine may be busy
            if seconds > SLOWEST:
                self.report(seed, data, f"took {seconds:.2f} s")
        lazy = self.decoded(seed, data, False)
        self.counts["accepted" if message else "refused"] += 1
        if (message is None) is not (lazy is None):
            self.report(seed, data, "two verdicts: whole and lazily")
        if message is not None and lazy is not None:
            self.compare(seed, data, message, lazy)
        try:
            str(codec.inspect(data))
        except FormatError:
            if message is not None:
                self.report(seed, data, "decode accepts what inspect refuses")
        if seed.plain_layout is None:
            if problem := self.live.feed(data):
                self.report(seed, data, problem)
        elif self.mutator.random.random() < self.share:
            self.second_opinion(seed, data, message)

    def compare(self, seed: Seed, data: bytes, a: codec.Message, b: codec.Message) -> None:
        ignored = any(s["id"] >= 0x8000 for s in Parts.of(data).sections)
        if not ignored and a.encode() != data:
            self.report(seed, data, "encodes to other bytes")
        if a.all_finite() is not b.all_finite():
            self.report(seed, data, "finite or not?")
        if not a.all_finite():
            return
        sums = [fs.ops.Accumulator(a.mask.nnz) for _ in range(2)]
        b.add_to(sums[0], 3)
        sums[1].add(a.packed, 3)
        if not torch.equal(sums[0].sums, sums[1].sums):
            self.report(seed, data, "other sums")

    def second_opinion(self, seed: Seed, data: bytes, message: codec.Message | None) -> None:
        self.counts["read twice"] += 1
        try:
            plain = self.reader.read(data, seed.plain_layout, _bools(seed.have), seed.plain_base)
        except self.reader.Refused as error:
            if message is not None:
                self.report(seed, data, f"the reader refuses: {error}")
            return
        if message is None:
            self.report(seed, data, "the reader accepts")
            return
        self.counts["accepted twice"] += 1
        same = (
            plain["values"] == bytes(container.tensor_bytes(message.packed))
            and plain["tail"] == bytes(container.tensor_bytes(message.tail))
            and plain["mask"] == message.mask.to_bool().tolist()
            and repr(plain["meta"]) == repr(message.meta)
            and plain["header"]["digest"] == message.broadcast_digest
        )
        if not same:
            self.report(seed, data, "the reader finds other contents")


def work(count: int, seed: int) -> tuple[str, list[str]]:
    """One process's share: a line that says what was done, and the findings."""
    torch.set_num_threads(1)
    checker = Checker(0.05, seed)
    start = time.perf_counter()
    checker.run(count)
    seconds = time.perf_counter() - start
    counts = ", ".join(f"{v:,} {k}" for k, v in checker.counts.items())
    return f"seed {seed}, {seconds:.0f} s: {counts}", checker.findings


def main(count: int, seed: int = 0, workers: int = 1) -> int:
    shares = [(count // workers + (i < count % workers), seed + i) for i in range(workers)]
    if workers == 1:
        done = [work(*shares[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            done = pool.starmap(work, shares)
    findings = [finding for _, found in done for finding in found]
    for line in [*(line for line, _ in done), *findings[:20], f"{len(findings)} findings"]:
        print(line)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
