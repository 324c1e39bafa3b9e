"""What a client costs the server in a round, and whether memory grows with clients.

`python benchmarks/scale.py cost [PARAMETERS ...]` prints bytes and CPU seconds per message; `python
benchmarks/scale.py flat MESSAGES` streams many messages through one aggregator and prints its
memory on the way. One thread.
"""

import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn

import fedmap_sparse as fs

DENSITY = 0.1
REPEATS = 9


def model(parameters: int) -> fs.FlatParameters:
    """Normal weights: trained ones are nearer to those than to the uniform ones of a new layer."""
    torch.manual_seed(0)
    linear = nn.Linear(parameters // 1000, 1000, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    return fs.flatten(linear)


def peak() -> int:
    """This process's largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def now() -> int:
    """Its resident memory, in MB; 0 where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() >> 20 if path.exists() else 0


def started(
    parameters: int, coding: fs.codec.Coding = "entropy"
) -> tuple[fs.FedMapServer, fs.FedMapClient]:
    """A server in a pruned round, and a client that has received its broadcast."""
    schedule = fs.schedule.OneShot(1 - DENSITY, at=0)
    server = fs.FedMapServer(model(parameters), schedule, max_samples=1000, coding=coding)
    server.begin_round()
    client = fs.FedMapClient(model(parameters), coding=coding)
    client.receive(server.broadcast())
    return server, client


#: With torch and this package imported, and nothing made.
ALONE = peak()


def cpu(call) -> float:
    """CPU seconds of a call, the least of some."""
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def cost(parameters: int, coding: fs.codec.Coding) -> None:
    server, client = started(parameters, coding)
    full, short = server.broadcast(), server.broadcast(client.have)
    update = client.update(10)
    names = iter(range(10**6))
    seconds = {
        "broadcast": cpu(lambda: server.snapshot(client.have)),
        "receive": cpu(lambda: client.receive(short)),
        "update": cpu(lambda: client.update(10)),
        "add": cpu(lambda: server.add(next(names), update)),
    }
    sizes = {"broadcast with mask": full, "broadcast": short, "update": update}
    said = ", ".join(f"{n} {len(m):,} B" for n, m in sizes.items())
    print(f"{parameters:,} parameters, {coding}: {said}")
    start = time.process_time()
    server.close_round()
    seconds["close_round"] = time.process_time() - start
    print("  CPU ms:", ", ".join(f"{n} {1e3 * s:.2f}" for n, s in seconds.items()))
    print(f"  peak {peak():,} MB", flush=True)


def flat(messages: int) -> None:
    """Ten clients' updates, under as many names as there are messages."""
    server, client = started(10**7)
    updates = []
    for seed in range(10):
        with torch.no_grad():
            client.params.prunable.add_(1e-3 * (seed + 1) * client.params.prunable)
        updates.append(client.update(10 + seed))
    began, wall = time.process_time(), time.perf_counter()
    for n in range(messages):
        refused = server.add(n, updates[n % len(updates)])
        assert refused is None, refused
        if (n + 1) in (10, 100, 1000, 10_000, messages):
            spent = time.process_time() - began
            memory = f"{now():,} MB, peak {peak():,} MB"
            print(f"{n + 1:,} messages: {memory}, {spent:.1f} CPU s", flush=True)
    result = server.close_round()
    done = sum(map(len, updates)) / len(updates) * messages / 1e9
    print(
        f"{len(result.accepted):,} in the mean, {done:.1f} GB in {time.perf_counter() - wall:.1f} s"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["flat"]:
        flat(int(sys.argv[2]))
    else:
        print(f"torch alone {ALONE:,} MB")
        for size in map(int, sys.argv[2:] or (10**6, 10**7, 10**8)):
            for coding in ("entropy", "raw"):
                cost(size, coding)
