"""The in-process engine: who takes part, what is sent to whom, and how many bytes that takes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_federation import bits, make, network, sgd, train

import fedmap_sparse as fs
from fedmap_sparse import codec
from fedmap_sparse.engines.in_process import InProcessEngine, generator
from fedmap_sparse.engines.phases import Phases
from fedmap_sparse.federated import NeedsMask, RoundFailed
from fedmap_sparse.schedule import Dense, Iterative


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are tiny; on a busy machine a second thread makes them ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("keep", [False, True])
def test_clients_that_share_a_module_are_as_clients_of_their_own(keep: bool) -> None:
    engines = [
        make(shared=shared, keep=keep, cohort=3, dropout=0.2, seed=3) for shared in (True, False)
    ]
    for _ in range(7):
        one, other = (engine.round() for engine in engines)
        assert one == other
        assert torch.equal(*(bits(engine.server.params) for engine in engines))
    assert engines[0].server.mask.nnz == fs.schedule.keep_count(20 * 30 + 30 * 7, 0.9)


def test_every_byte_sent_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(cohort=2, seed=1)
    down: list[bytes] = []
    up: list[bytes] = []
    broadcast, update = fs.FedMapServer.broadcast, fs.FedMapClient.update

    def spy_down(self: Any, have: bytes | None = None) -> bytes:
        down.append(broadcast(self, have))
        return down[-1]

    def spy_up(self: Any, *args: Any) -> bytes:
        up.append(update(self, *args))
        return up[-1]

    monkeypatch.setattr(fs.FedMapServer, "broadcast", spy_down)
    monkeypatch.setattr(fs.FedMapClient, "update", spy_up)
    for _ in range(4):
        down.clear()
        up.clear()
        done = engine.round()
        assert len(down) == len(up) == 2
        assert done.downlink_bytes == sum(map(len, down))
        assert done.uplink_bytes == sum(map(len, up))


def mask_section(data: bytes) -> str:
    found = {s.name for s in codec.inspect(data).sections} & {"MASK", "DELTA"}
    return found.pop() if found else "none"


def test_a_late_joiner_gets_a_mask_and_the_others_none_or_a_delta(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 12 clients, 3 a round: some join late, some return after several prunings.
    engine = make(12, cohort=3, seed=5, schedule=Iterative(0.8, start=1, end=5))
    sent: list[tuple[bytes | None, str]] = []
    broadcast = fs.FedMapServer.broadcast

    def spy(self: Any, have: bytes | None = None) -> bytes:
        data = broadcast(self, have)
        sent.append((have, mask_section(data)))
        return data

    monkeypatch.setattr(fs.FedMapServer, "broadcast", spy)
    seen: set[Any] = set()
    kinds = set()
    for round in range(12):
        cohort, _ = engine.draw(round)
        sent.clear()
        engine.round()
        for name, (have, section) in zip(cohort, sent):
            assert (have is None) == (name not in seen)
            if have is None:
                assert section == ("none" if round == 0 else "MASK")  # a dense mask has no bits
            elif have == engine.server.mask.digest():
                assert section == "none"
            else:
                assert section == "DELTA"
            kinds.add((name in seen, section))
            assert engine.clients[name].have == engine.server.mask.digest()
        seen |= set(cohort)
    assert {(False, "MASK"), (True, "DELTA"), (True, "none")} <= kinds


class Forgetful(fs.FedMapClient):
    """Says that it has what it lost, as one restored from an old backup would."""

    stale: bytes | None = None

    @property
    def have(self) -> bytes | None:
        return self.stale

    def receive(self, data: bytes) -> Any:
        try:
            return super().receive(data)
        except NeedsMask as error:
            raise NeedsMask(error.wanted, None) from error


def test_a_client_that_lost_its_mask_is_sent_another_message() -> None:
    engine = make(2)
    engine.clients[1] = Forgetful(fs.flatten(network()), optimizer=sgd)
    plain = make(2)
    for _ in range(3):
        engine.round()
        plain.round()
    client = engine.clients[1]
    client.load_state_dict(fs.FedMapClient(fs.flatten(network())).state_dict())
    assert isinstance(client, Forgetful)
    client.stale = engine.server.mask.digest()
    done, usual = engine.round(), plain.round()
    server = engine.server
    assert done.result.accepted == (0, 1)
    assert done.downlink_bytes > usual.downlink_bytes + 4 * server.mask.nnz
    assert torch.equal(bits(server.params), bits(plain.server.params))


def test_a_client_that_cannot_be_helped_raises() -> None:
    class Hopeless(fs.FedMapClient):
        def receive(self, data: bytes) -> Any:
            raise NeedsMask(bytes(16), self.have)

    engine = make(2)
    engine.clients[0] = Hopeless(fs.flatten(network()))
    with pytest.raises(NeedsMask, match="got no mask"):
        engine.round()


def test_cohorts_and_dropouts_depend_on_seed_and_round_alone() -> None:
    engine, other = make(10, cohort=4, dropout=0.3, seed=7), make(10, cohort=4, dropout=0.3, seed=8)
    drawn = [engine.draw(round) for round in range(50)]
    assert drawn == [engine.draw(round) for round in range(50)]
    assert drawn != [other.draw(round) for round in range(50)]
    for cohort, silent in drawn:
        assert len(cohort) == len(set(cohort)) == 4
        assert cohort == sorted(cohort)
        assert silent <= set(cohort)
    assert {name for cohort, _ in drawn for name in cohort} == set(range(10))
    dropped = sum(len(silent) for _, silent in drawn)
    assert 40 <= dropped <= 80  # 200 draws at 0.3: mean 60, deviation 6.5


def test_the_dropped_get_the_broadcast_and_send_nothing() -> None:
    engine = make(6, dropout=0.4, seed=2)
    full = make(6)
    dropped = []
    for _ in range(5):
        done = engine.round()
        assert set(done.dropped).isdisjoint(done.result.accepted)
        assert sorted([*done.dropped, *done.result.accepted]) == list(done.cohort)
        assert done.downlink_bytes == full.round().downlink_bytes
        dropped += done.dropped
    assert dropped


def test_too_few_answers_fail_and_move_nothing() -> None:
    engine = make(3, dropout=0.9, seed=0, min_updates=3)
    engine.server.begin_round()
    before = bits(engine.server.params)
    with pytest.raises(RoundFailed, match="at least 3 usable updates, got"):
        engine.round()
    assert engine.server.round == 0
    assert torch.equal(bits(engine.server.params), before)


def test_an_update_with_nan_is_refused_and_the_others_count() -> None:
    def one_diverges(name: Any, client: Any, message: Any) -> tuple[int, float | None]:
        samples, loss = train(name, client, message)
        if name == 2:
            with torch.no_grad():
                client.params.values[0] = float("nan")
        return samples, loss

    engine = make(4, train=one_diverges)
    done = engine.round()
    assert done.result.accepted == (0, 1, 3)
    assert "finite" in done.result.refused[2]
    assert torch.isfinite(engine.server.params.values).all()


@pytest.mark.parametrize("keep", [False, True])
def test_an_engine_goes_on_from_its_state(keep: bool) -> None:
    engine = make(5, keep=keep, cohort=3, seed=9)
    for _ in range(3):
        engine.round()
    state = engine.state_dict()
    later = make(5, keep=keep, cohort=3, seed=9)
    later.load_state_dict(state)
    for _ in range(3):
        assert engine.round() == later.round()
    assert torch.equal(bits(engine.server.params), bits(later.server.params))


def test_a_state_of_other_clients_is_refused() -> None:
    with pytest.raises(ValueError, match="clients: expected the 3 of this engine"):
        make(3).load_state_dict(make(4).state_dict())


@pytest.mark.parametrize("what", ["attempt", "server", "clients", "one client"])
def test_a_damaged_state_changes_no_client(what: str) -> None:
    engine, other = make(3, keep=True), make(3, keep=True)
    other.round()
    state = other.state_dict()
    if what == "one client":
        state["clients"][2][1]["round"] = "3"
    else:
        state[what] = {"attempt": -1, "server": {}, "clients": None}[what]
    before = bits(engine.server.params).clone()
    with pytest.raises(ValueError, match=r"attempt|layout|round|clients"):
        engine.load_state_dict(state)
    assert torch.equal(bits(engine.server.params), before)
    assert all(client.have is None for client in engine.clients.values())


def test_no_optimizer_is_left_behind() -> None:
    engine = make(3)
    engine.round()
    assert all(client.optimizer is None for client in engine.clients.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 0}, "clients: expected at least one"),
        ({"cohort": 0}, "cohort: expected 1 to 4 clients, got 0"),
        ({"cohort": 5}, "cohort: expected 1 to 4 clients, got 5"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: expected"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_phases_add_up() -> None:
    calls: list[int] = []
    phases = Phases(lambda: calls.append(1))
    with phases("a"):
        pass
    first = phases["a"]
    with pytest.raises(KeyError), phases("a"):
        raise KeyError
    assert phases["a"] > first > 0
    assert len(calls) == 4
    engine = make(2, schedule=Dense())
    engine.round()
    assert list(engine.phases) == ["select", "encode", "decode", "aggregate"]


def test_generators_differ_by_any_part_of_their_key() -> None:
    keys = [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)]
    drawn = {int(generator(*key).integers(2**62)) for key in keys}
    assert len(drawn) == len(keys)
    assert generator(*keys[0]).random() == generator(*keys[0]).random()


def hopeful(attempts: int, **options: Any) -> InProcessEngine:
    """Four in five do not answer, and half of the cohort must: most draws fail."""
    return make(8, cohort=4, dropout=0.8, min_updates=2, attempts=attempts, seed=1, **options)


def test_a_round_that_too_few_answered_is_drawn_again() -> None:
    engine = hopeful(attempts=50)
    rounds = [engine.round() for _ in range(3)]
    assert max(done.attempts for done in rounds) > 1
    for done in rounds:
        last = engine.draw(done.result.round, done.attempts - 1)
        assert (list(done.cohort), set(done.dropped)) == last
        earlier = [engine.draw(done.result.round, a) for a in range(done.attempts - 1)]
        assert all(4 - len(silent) < 2 for _, silent in earlier)
        assert len({tuple(cohort) for cohort, _ in [*earlier, last]}) > 1 or not earlier
        answers = sum(4 - len(silent) for _, silent in [*earlier, last])
        assert done.uplink_bytes == answers * done.result.uplink_bytes // (4 - len(done.dropped))
        assert done.downlink_bytes > 4 * done.attempts * 4 * engine.server.mask.nnz


@pytest.mark.parametrize("keep", [False, True])
def test_failing_and_going_on_is_the_same_as_more_attempts(keep: bool) -> None:
    patient, hasty = hopeful(attempts=50, keep=keep), hopeful(attempts=1, keep=keep)
    failures = 0
    for _ in range(3):
        patient.round()
        while True:
            state = hasty.state_dict()
            try:
                hasty.round()
                break
            except RoundFailed:
                failures += 1
                state["attempt"] = hasty.attempt  # as a checkpoint has it
                hasty = hopeful(attempts=1, keep=keep)
                hasty.load_state_dict(state)
    assert failures > 0
    assert torch.equal(bits(patient.server.params), bits(hasty.server.params))


def test_nothing_is_drawn_again_where_every_draw_is_the_same() -> None:
    trained = []

    def diverge(name: Any, client: Any, message: Any) -> tuple[int, float | None]:
        trained.append(name)
        with torch.no_grad():
            client.params.values[0] = float("nan")
        return 1, None

    engine = make(3, train=diverge, attempts=10)
    with pytest.raises(RoundFailed):
        engine.round()
    assert trained == [0, 1, 2]
    with pytest.raises(ValueError, match="attempts: expected at least 1, got 0"):
        make(3, attempts=0)
