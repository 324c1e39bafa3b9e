"""The round as a Flower Strategy."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedmap_sparse._files import write_atomically
from fedmap_sparse.engines.flower.client import ARRAYS, CONFIG, METRICS
from fedmap_sparse.engines.flower.codec import message_of, record_of
from fedmap_sparse.engines.in_process import generator
from fedmap_sparse.errors import RoundFailed
from fedmap_sparse.federated import FedMapServer, RoundResult

_log = logging.getLogger("flwr")


class FedMap(Strategy):
    """The rounds of a `FedMapServer` over Flower's nodes.

    Args:
        server: its options are those of the round: schedule, dtype, `min_updates`, `max_samples`,
            server optimizer, aggregator.
        fraction_train, fraction_evaluate: of the nodes, drawn anew each round; 0 evaluates nowhere.
        min_nodes: wait for this many nodes, and draw at least as many.
        seed: of the draws.
        order: "node" identifies clients by node id, which a restarted SuperNode changes;
            "partition-id" by what the node's config says: then a run can be repeated bit for bit.
            A `partition-id` belongs to the node that declared it first, until that node is gone or
            silent; others that declare it are refused.
        checkpoint: a file for the server's state, written after each round and read if it exists.
            Then `strategy.start(..., num_rounds=total - server.round)` goes on.
        resend: how often a node that lost its mask is sent it again within a round.
        timeout: seconds to wait for nodes to appear, and for the replies to what is sent again.

    Attributes:
        results: each round's `RoundResult`, with every refusal and its reason.
    """

    def __init__(
        self,
        server: FedMapServer,
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 0.0,
        min_nodes: int = 2,
        seed: int = 0,
        order: Literal["node", "partition-id"] = "node",
        checkpoint: str | os.PathLike[str] | None = None,
        resend: int = 1,
        timeout: float = 3600.0,
    ) -> None:
        for name, value in (("train", fraction_train), ("evaluate", fraction_evaluate)):
            if not 0 <= value <= 1:
                raise ValueError(f"fraction_{name}: expected 0 to 1, got {value}")
        if order not in ("node", "partition-id"):
            raise ValueError(f"order: expected 'node' or 'partition-id', got {order!r}")
        self.server = server
        self.fraction_train, self.fraction_evaluate = fraction_train, fraction_evaluate
        self.min_nodes, self.seed, self.order = min_nodes, seed, order
        self.resend, self.timeout = resend, timeout
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.results: list[RoundResult] = []
        # What clients keep belongs to one federation: a new one starts them afresh.
        self.federation = secrets.token_hex(16)
        if self.checkpoint is not None and self.checkpoint.exists():
            head, _, data = self.checkpoint.read_bytes().partition(b"\n")
            server.from_bytes(data)
            self.federation = head.decode("ascii", "replace")
        self._grid: Grid | None = None
        self._have: dict[int, bytes] = {}  # node: the mask that it said it has
        self._declared: dict[int, int] = {}  # node: its partition-id
        self._lost: dict[int, int] = {}  # node: the round in which it did not answer
        self._asked: set[int] = set()
        self._refused: dict[int, str] = {}
        self._down = 0

    @property
    def arrays(self) -> ArrayRecord:
        """The global model, dense, for `start(initial_arrays=...)` and `evaluate_fn`."""
        state = self.server.params.to_state_dict()
        wide = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in state.items()}
        return ArrayRecord(wide)  # NumPy, and so Flower, has no bfloat16

    def summary(self) -> None:
        _log.info("\tFedMap: round %d, %s", self.server.round, self.server.params)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.server.begin_round()
        return self._messages(grid, "train", self._draw(grid, self.fraction_train))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        nodes = self._draw(grid, self.fraction_evaluate) if self.fraction_evaluate else []
        return self._messages(grid, "evaluate", nodes)

    def _draw(self, grid: Grid, fraction: float) -> list[int]:
        deadline = time.monotonic() + self.timeout
        while len(alive := set(grid.get_node_ids())) < self.min_nodes:
            if time.monotonic() > deadline:
                wanted = f"expected at least {self.min_nodes} nodes in {self.timeout} s"
                raise TimeoutError(f"{wanted}, got {len(alive)}")
            time.sleep(0.1)
        for table in (self._have, self._declared, self._lost):
            for gone in set(table) - alive:
                del table[gone]
        # A node that was silent in the last round is left out of this one, if others are enough.
        last = self.server.round - 1
        awake = {n for n in alive if self._lost.get(n, -1) < last}
        nodes = sorted(
            awake if len(awake) >= self.min_nodes else alive,
            key=lambda n: (self._declared.get(n, math.inf), n),
        )
        size = min(len(nodes), max(self.min_nodes, math.ceil(fraction * len(nodes))))
        order = generator(self.seed, 0, self.server.round).permutation(len(nodes))[:size]
        return [nodes[i] for i in sorted(order)]

    def _messages(self, grid: Grid, kind: str, nodes: list[int]) -> list[Message]:
        self._grid, self._asked, self._refused, self._down = grid, set(nodes), {}, 0
        return self._addressed(kind, nodes)

    def _addressed(self, kind: str, nodes: list[int]) -> list[Message]:
        encode = self.server.broadcast if kind == "train" else self.server.snapshot
        contents: dict[bytes | None, tuple[int, RecordDict]] = {}
        config = ConfigRecord({"federation": self.federation, "round": self.server.round})
        messages = []
        for node in nodes:
            have = self._have.get(node)
            if have not in contents:
                data = encode(have)
                content = RecordDict({ARRAYS: record_of(data), CONFIG: config})
                contents[have] = len(data), content
            size, content = contents[have]
            self._down += size
            messages.append(Message(content, node, kind))
        return messages

    def _answers(self, kind: str, replies: Iterable[Message]) -> list[Message]:
        """The replies that answer; what lacks a mask is sent it, within the round."""
        answers, silent = [], set(self._asked)
        for attempt in range(self.resend + 1):
            again = []
            for reply in replies:
                node = reply.metadata.src_node_id
                silent.discard(node)
                self._lost.pop(node, None)
                try:
                    if reply.has_error():
                        raise ValueError(reply.error.reason)
                    config = reply.content[CONFIG]
                    if not isinstance(config, ConfigRecord) or not isinstance(
                        config["have"], bytes
                    ):
                        raise ValueError("expected a record of what the node has, got another")
                except (ValueError, KeyError) as error:
                    self._refuse(node, error)
                    continue
                self._have[node] = config["have"]
                if not config.get("needs-mask"):
                    answers.append(reply)
                elif attempt < self.resend:
                    again.append(node)
                else:
                    self._refuse(node, ValueError("expected it to have a mask by now, got none"))
            if not again:
                break
            assert self._grid is not None
            silent.update(again)
            messages = self._addressed(kind, again)
            replies = self._grid.send_and_receive(messages, timeout=self.timeout)
        self._lost.update(dict.fromkeys(silent, self.server.round))
        return answers

    def _refuse(self, node: int, error: Exception) -> None:
        self._refused[node] = str(error)
        self._have.pop(node, None)
        _log.warning("fedmap_sparse: node %d is left out: %s", node, error)

    def _client(self, reply: Message) -> int:
        """Who a node speaks for; ValueError if that is somebody else."""
        node = reply.metadata.src_node_id
        if self.order == "node":
            return int(node)
        declared = reply.content[CONFIG].get("partition-id")
        if not isinstance(declared, int) or declared < 0:
            raise ValueError(f"expected a partition-id, got {declared!r}")
        if self._declared.get(node, declared) != declared:
            raise ValueError(f"expected partition-id {self._declared[node]}, got {declared}")
        for other, theirs in list(self._declared.items()):
            if theirs == declared and other != node:
                if other not in self._lost:
                    raise ValueError(f"expected a partition-id of its own, got node {other}'s")
                del self._declared[other]
        self._declared[node] = declared
        return declared

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        updates: dict[int, bytes] = {}
        for reply in self._answers("train", replies):
            try:
                client = self._client(reply)
                updates[client] = message_of(reply.content.get(ARRAYS))
            except (ValueError, TypeError) as error:
                self._refuse(reply.metadata.src_node_id, error)
        metrics: dict[str, int | float] = {
            "nnz": self.server.mask.nnz,
            "density": self.server.params.density,
            "silent": sum(n in self._lost for n in self._asked),
            "downlink-bytes": self._down,
            "uplink-bytes": sum(map(len, updates.values())),
        }
        try:
            result = self.server.aggregate(updates.items())
        except RoundFailed as error:  # the next round of Flower's repeats this one
            _log.warning("fedmap_sparse: %s", error)
            refused = len(self._refused) + len(error.refused)
            return None, MetricRecord({**metrics, "accepted": 0, "refused": refused})
        self.results.append(result)
        metrics |= {
            "accepted": len(result.accepted),
            "refused": len(self._refused) + len(result.refused),
            "num-examples": result.num_samples,
        }
        if result.loss is not None:
            metrics["train-loss"] = result.loss
        if self.checkpoint is not None:
            state = self.federation.encode() + b"\n" + self.server.to_bytes()
            write_atomically(self.checkpoint, state)
        return self.arrays, MetricRecord(metrics)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Each metric's mean by examples, over the nodes that reported it."""
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        for reply in self._answers("evaluate", replies):
            try:
                metrics = dict(reply.content[METRICS])
                examples = metrics.pop("num-examples")
                values = {name: float(value) for name, value in metrics.items()}
                if not isinstance(examples, int) or examples < 1:
                    raise ValueError(f"num-examples: expected at least 1, got {examples!r}")
            except (KeyError, TypeError, ValueError) as error:
                self._refuse(reply.metadata.src_node_id, error)
                continue
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * examples
                weights[name] = weights.get(name, 0) + examples
        if not sums:
            return None
        means = {name: total / weights[name] for name, total in sums.items()}
        return MetricRecord({**means, "num-examples": max(weights.values())})
