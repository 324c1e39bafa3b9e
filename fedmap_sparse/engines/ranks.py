"""FedAvg across ranks: a federated round whose clients are spread over torch.distributed.

    torchrun --nproc-per-node 2 examples/distributed/ranks.py

Rank 0 has the server; each rank trains its own clients; messages travel between the ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from fedmap_sparse.engines.in_process import Round, check_draw, count_kinds, draw
from fedmap_sparse.engines.workers import Train
from fedmap_sparse.federated import ClientId, FedMapClient, FedMapServer, RoundResult

Group = dist.ProcessGroup | None


class RanksEngine:
    """The rounds of one `FedMapServer` over clients that are spread over the ranks.

    Rank 0 holds the server. Each rank trains its own clients, then rank 0 gets all updates and
    aggregates them in order of client id: the same bits as `InProcessEngine`, at any number of
    ranks. Messages are those of a deployment, so their bytes are counted in the same way.

    Args:
        server: on rank 0; None on the others.
        clients: this rank's, by id; ids are unique over all ranks. A cohort is spread evenly where
            rank r has the ids r, r + R, r + 2R, ...
        train, cohort, dropout, seed: as in `InProcessEngine`, the same on all ranks.
        group: process group; None: the default one.

    Raises:
        ValueError: a server on another rank than 0 or none there, an id on two ranks, no clients,
            a cohort or dropout out of range.

    Memory: each rank holds the updates of its own clients of a cohort, rank 0 those of all.
    """

    def __init__(
        self,
        server: FedMapServer | None,
        clients: Mapping[ClientId, FedMapClient],
        train: Train,
        *,
        cohort: int | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        group: Group = None,
    ) -> None:
        self.server = server
        self.clients = dict(clients)
        self.train = train
        self.dropout = dropout
        self.seed = seed
        self.group = group
        self.rank = dist.get_rank(group)
        everybody = self._gather((server is not None, list(self.clients)))
        self.owner = {c: rank for rank, (_, ids) in enumerate(everybody) for c in ids}
        if [has for has, _ in everybody] != [rank == 0 for rank in range(len(everybody))]:
            raise ValueError("server: expected one on rank 0 alone")
        if len(self.owner) != sum(len(ids) for _, ids in everybody):
            raise ValueError("clients: expected each id on one rank, got one on two")
        self.cohort = check_draw(len(self.owner), cohort, dropout)

    def _gather(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(every, value, group=self.group)
        return every

    def _on_server(self, call: Callable[[FedMapServer], Any]) -> Any:
        """What `call` returns on rank 0, on every rank; what it raises there is raised on all."""
        box: list[Any] = [None, None]
        if self.server is not None:
            try:
                box[0] = call(self.server)
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def round(self) -> Round:
        """One round; every rank calls it, and every rank gets the result.

        Raises:
            RoundFailed: on every rank; see `InProcessEngine.round`.
        """
        number = self._on_server(_begin)
        cohort, silent = draw(self.owner, number, self.cohort, self.dropout, self.seed)
        mine = [c for c in cohort if self.owner[c] == self.rank]
        held = self._gather({c: self.clients[c].have for c in mine})
        have = {c: digest for part in held for c, digest in part.items()}
        # One message per mask that clients hold: most often a single one.
        messages = self._on_server(lambda s: {h: s.broadcast(h) for h in set(have.values())})
        updates = {}
        for c in mine:
            client = self.clients[c]
            received = client.receive(messages[have[c]])
            if c not in silent:
                updates[c] = client.update(*self.train(c, client, received))
            if not client.keep_optimizer:
                client.optimizer = None
        came = [(c, self._hand_over(c, updates.get(c))) for c in cohort if c not in silent]
        kinds: Counter[str] = Counter()
        for c in cohort:
            count_kinds(kinds, "downlink", messages[have[c]])

        def end(server: FedMapServer) -> tuple[RoundResult, Counter[str]]:
            for _, update in came:
                count_kinds(kinds, "uplink", update)
            return server.aggregate(came), kinds

        result, kinds = self._on_server(end)
        dropped = tuple(c for c in cohort if c in silent)
        sent = sum(len(messages[have[c]]) for c in cohort)
        return Round(result, tuple(cohort), dropped, sent, result.uplink_bytes, kinds=dict(kinds))

    def _hand_over(self, client: ClientId, update: bytes | None) -> bytes:
        """One update from the rank that has it to rank 0; elsewhere the result means nothing."""
        box = [update]
        owner = self.owner[client]
        if owner and owner == self.rank:
            dist.send_object_list(box, group=self.group, group_dst=0)
        elif owner and self.server is not None:
            dist.recv_object_list(box, group=self.group, group_src=owner)
        return box[0] or b""


def _begin(server: FedMapServer) -> int:
    server.begin_round()
    return server.round
