"""One arm of an experiment: a federation under one schedule, its records and its result."""

from __future__ import annotations

import copy
from time import perf_counter
from typing import Any

import torch

from fedmap_sparse.engines.in_process import InProcessEngine, Round
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.experiments import hardening, measures, methods, report, snip
from fedmap_sparse.experiments.config import Config
from fedmap_sparse.experiments.folder import Record
from fedmap_sparse.experiments.setting import Setting
from fedmap_sparse.experiments.shares import placed
from fedmap_sparse.experiments.training import Evaluation, evaluate
from fedmap_sparse.federated import ClientId, FedMapClient
from fedmap_sparse.flat import flatten
from fedmap_sparse.schedule import Adaptive, Schedule, keep_count


class Arm:
    """One federation: server, clients and engine, under one schedule.

    Clients share one module: their weights come with each broadcast.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        schedule: Schedule,
        setting: Setting,
    ) -> None:
        self.name = name
        self.config = config
        self._setting = setting
        self._survivors: tuple[bytes, dict[str, int]] = (b"", {})
        template, device = setting.template, setting.device
        # The dense arm beside another method is plain FedAvg.
        method = config.method if name == config.arm else "fedavg"
        asks = config.criterion == "snip" and name == config.arm
        self._scores = snip.Scores() if asks else None
        self.server = methods.make_server(
            method,
            config,
            schedule,
            flatten(copy.deepcopy(template)),
            config.make_criterion(self._scores),
        )
        local = flatten(copy.deepcopy(template))
        clients: dict[ClientId, FedMapClient] = {
            i: methods.make_client(method, config, local) for i in range(config.clients)
        }
        phases = Phases(torch.cuda.synchronize if device.type == "cuda" else None)
        plain = hardening.training(config, setting.shares, setting.classes, phases)
        train = methods.make_train(method, config, plain, setting.shares)
        self.engine = InProcessEngine(
            self.server,
            clients,
            train,
            cohort=config.cohort,
            dropout=config.dropout,
            attempts=config.attempts,
            seed=config.seed,
            phases=phases,
            workers=None if method in methods.OF_THEIR_OWN else setting.workers,
            sizes=setting.shares.sizes if config.sampling == "samples" else None,
        )

    @property
    def round(self) -> int:
        """How many rounds have ended."""
        return self.server.round

    def broadcast(self) -> bytes:
        """The next round's broadcast, with its whole mask."""
        self.server.begin_round()
        return self.server.broadcast()

    def play(self, saving: float) -> Record:
        """One round; `saving` is the seconds that writing the one before took."""
        start = perf_counter()
        phases = self.engine.phases
        phases.clear()
        asked = self._ask()
        done = self.engine.round()
        if asked is not None:
            done = done.with_messages_of(asked)
        with phases("evaluate"):
            module = self.server.params.module
            setting = self._setting
            found = evaluate(module, setting.validation, setting.at_once)
            clients = setting.clients(module, setting.validation, found.right)
        seconds = {**phases, "save": saving}
        seconds["total"] = perf_counter() - start + saving
        return self._record(done, found, clients, seconds)

    def _ask(self) -> Round | None:
        """Have the clients score the weights before the first round, where the method does."""
        if self._scores is None or self.round:
            return None
        with self.engine.phases("select"):
            self._scores.values, asked = snip.ask(
                self._setting.template, self.config, self._setting.shares
            )
        return asked

    def layers(self) -> dict[str, int]:
        """Weights left in each prunable tensor; counted anew when the mask has changed."""
        mask = self.server.mask.digest()
        if self._survivors[0] != mask:
            found = measures.layer_survivors(self.server.layout, self.server.mask)
            self._survivors = mask, found
        return self._survivors[1]

    def _record(
        self, done: Round, found: Evaluation, clients: dict[str, Any], seconds: dict[str, float]
    ) -> Record:
        result = done.result
        layout, survivors = self.server.layout, self.layers()
        return {
            "arm": self.name,
            "round": result.round,
            "accuracy": found.accuracy,
            "loss": found.loss,
            "clients": clients,
            "train_loss": result.loss,
            "density": self.server.params.density,
            "keep": self.server.mask.nnz,
            "layers": {e.name: survivors[e.name] / e.numel for e in layout.prunable_entries},
            "starving": measures.starving(layout, survivors),
            "lr": self.config.learning_rate(result.round),
            "uplink_bytes": done.uplink_bytes,
            "downlink_bytes": done.downlink_bytes,
            "bytes": dict(done.kinds),
            "cohort": len(done.cohort),
            "dropped": list(done.dropped),
            "attempts": done.attempts,
            "epsilon": hardening.epsilon(self.config, result.round + 1),
            "refused": {str(client): reason for client, reason in result.refused.items()},
            "seconds": seconds,
        }

    def summary(self, records: list[Record]) -> dict[str, Any]:
        """The arm's result; this is where test data are looked at."""
        setting = self._setting
        test = placed(setting.test, setting.device, setting.nhwc)
        found = evaluate(self.server.params.module, test, setting.at_once)
        phases = report.totals([r["seconds"] for r in records])
        return {
            "accuracy": found.accuracy,
            "loss": found.loss,
            **measures.over_rounds([r["accuracy"] for r in records]),
            "clients": {**records[-1]["clients"], "on": setting.clients.on},
            "layers": records[-1]["layers"],
            "starving": list(records[-1]["starving"].values()),
            "short": self._short(),
            "density": self.server.params.density,
            "survivors": self.server.mask.nnz,
            "prunable": self.server.layout.eligible,
            "uplink_bytes": sum(r["uplink_bytes"] for r in records),
            "downlink_bytes": sum(r["downlink_bytes"] for r in records),
            "bytes": report.totals([r["bytes"] for r in records]),
            "seconds": phases["total"],
            "rounds": len(records),
            "seed": self.config.seed,
            "hardening": hardening.summary(self.config),
            "phases": phases,
            "overhead": 1 - (phases["train"] + phases["evaluate"]) / phases["total"],
        }

    def _short(self) -> str | None:
        """What an adaptive schedule left undone, in words."""
        schedule, left = self.server.schedule, self.server.mask.nnz
        eligible = self.server.layout.eligible
        if not isinstance(schedule, Adaptive) or left <= keep_count(eligible, schedule.target):
            return None
        return (
            f"pruned {1 - left / eligible:.1%} instead of {schedule.target:.1%}: the training loss "
            f"had not recovered often enough by round {schedule.end}"
        )

    def model(self) -> bytes:
        """The global model as a safetensors state dict, dense, with zeros where it is pruned."""
        from safetensors.torch import save

        state = {n: t.cpu().contiguous() for n, t in self.server.params.to_state_dict().items()}
        return bytes(save(state))
