"""masked_sgd_: kernels against the reference to the bit, the reference against torch.optim."""

from __future__ import annotations

import pytest
import torch
from ambient import FROZEN, not_under
from masked_steps import DTYPES, EDGES, Problem, bits, make_problem
from page_faults import LINUX, touched_bytes

from fedmap_sparse import Mask
from fedmap_sparse.ops import masked_sgd_
from fedmap_sparse.ops._segments import SKIPPED, Segments
from fedmap_sparse.ops.masked_sgd import sgd_flags, step_segments_

# lr, momentum, dampening, weight_decay; no default among them, except where a name says so.
SETTINGS = {
    "plain": ((0.05, 0, 0, 0), {}),
    "decay": ((0.03, 0, 0, 0.02), {"maximize": True}),
    "first": ((0.05, 0.8, 0.3, 0.01), {"first": True}),
    "dampened": ((0.05, 0.8, 0.3, 0.01), {}),
    "nesterov": ((0.03, 0.7, 0, 0.02), {"nesterov": True}),
    "nesterov first": ((0.03, 0.7, 0, 0.02), {"nesterov": True, "first": True}),
    "maximize": ((0.002, 0.5, 0.1, 0.1), {"maximize": True}),
    "all": ((0.07, 0.6, 0, 0.3), {"nesterov": True, "maximize": True}),
}
# torch.optim.SGD contracts (`add_` with alpha) where we round twice: 1 ulp of what is added, each
# step. Weights and buffers here are of size 1, so 20 steps stay within 20 * 2^-24 = 1.2e-6.
TOLERANCE = {"rtol": 1e-6, "atol": 1.2e-6}


def set_scalars(problem: Problem, names: list[str]) -> None:
    for s in range(len(problem.segments)):
        scalars, flags = SETTINGS[names[s % len(names)]]
        problem.segments.scalars[s, :4] = torch.tensor(scalars, dtype=torch.float64)
        problem.segments.rows[s, 3] = sgd_flags(**flags)


def step(problem: Problem, backend: str) -> Problem:
    stepped = problem.copy()
    step_segments_(
        stepped.values,
        problem.mask,
        problem.grads,
        problem.segments,
        momentum_buffer=stepped.states[0],
        master=stepped.master,
        backend=backend,
    )
    return stepped


def assert_kernel_is_reference(problem: Problem) -> Problem:
    stepped = step(problem, "cpu")
    stepped.assert_same(step(problem, "reference"))
    return stepped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_kernel_is_reference_at_every_edge(isa: str, dtype: torch.dtype, density: float) -> None:
    for size in EDGES:
        problem = make_problem([size, 3, size], [size, 1], density, dtype)
        set_scalars(problem, list(SETTINGS))
        assert_kernel_is_reference(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_reference_at_any_thread_count(
    isa: str, threads: int, dtype: torch.dtype
) -> None:
    for density in (0.01, 0.3, 1.0):
        problem = make_problem([70_001, 5, 30_000], [9, 120_000], density, dtype)
        set_scalars(problem, ["dampened", "nesterov", "maximize"])
        assert_kernel_is_reference(problem)


@not_under("inference", reason=FROZEN)
def test_blocks_of_every_density_in_one_mask(isa: str) -> None:
    """Full, crowded, sparse and empty blocks take different paths; so do segments inside them."""
    problem = make_problem([2048] * 5 + [300, 20_000, 130] * 3, [7, 2048, 100], 1.0)
    kept = problem.mask.to_bool()
    for block, density in enumerate([1.0, 0.4, 0.02, 0.0, 0.001, 0.7, 0.01, 1.0] * 3):
        part = kept[2048 * block : 2048 * (block + 1)]
        part &= torch.rand(part.numel()) < density
    problem.values[: kept.numel()][~kept] = 0
    problem.mask = type(problem.mask).from_bool(kept)
    problem.states = [torch.randn(problem.mask.nnz + problem.values.numel() - kept.numel())]
    set_scalars(problem, list(SETTINGS))
    assert_kernel_is_reference(problem)


@pytest.mark.parametrize("how", ["no gradient", "SKIPPED"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_that_do_not_step_keep_weights_and_state(
    isa: str, dtype: torch.dtype, how: str
) -> None:
    problem = make_problem([500, 3000, 40, 2048], [64, 9, 33], 0.4, dtype)
    set_scalars(problem, ["dampened"])
    for skipped in (1, 3, 5):
        if how == "SKIPPED":
            problem.segments.scalars[skipped, SKIPPED] = 1.0
        else:
            problem.grads[skipped] = None
    stepped = assert_kernel_is_reference(problem)
    for s in (1, 3, 5):
        assert torch.equal(bits(stepped.values_of(s)), bits(problem.values_of(s)))
        assert torch.equal(bits(stepped.state_of(s, 0)), bits(problem.state_of(s, 0)))
    assert not torch.equal(stepped.states[0], problem.states[0])
    problem.grads = [None] * len(problem.grads)
    step(problem, "cpu").assert_same(problem)


def test_what_no_segment_covers_is_not_touched(isa: str) -> None:
    """Survivors between segments, even in the same word, count in the packed order all the same."""
    problem = make_problem([4000, 90, 2100], [16, 40], 1.0)
    problem.mask = type(problem.mask).full(problem.mask.numel)
    problem.values[: problem.mask.numel] = torch.randn(problem.mask.numel)
    problem.states = [torch.randn(problem.values.numel())]
    sizes = [3777, 70, 2085, 9, 33]
    problem.segments = Segments(problem.segments.rows[:, 0].tolist(), sizes)
    problem.grads = [torch.randn(size) for size in sizes]
    set_scalars(problem, ["dampened"])
    stepped = assert_kernel_is_reference(problem)
    covered = torch.zeros(problem.values.numel(), dtype=torch.bool)
    for offset, size, *_ in problem.segments.rows.tolist():
        covered[offset : offset + size] = True
    assert torch.equal(stepped.values[~covered], problem.values[~covered])
    assert bool((stepped.values[covered] != problem.values[covered]).all())


def test_segments_with_momentum_zero_leave_the_buffer_alone(isa: str) -> None:
    problem = make_problem([1000, 1000], [50], 0.5)
    set_scalars(problem, ["decay"])
    stepped = assert_kernel_is_reference(problem)
    assert torch.equal(stepped.states[0], problem.states[0])
    without = problem.copy()
    step_segments_(without.values, problem.mask, problem.grads, problem.segments, backend="cpu")
    assert torch.equal(without.values, stepped.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.005, 0.2, 0.9])
def test_pruned_weights_stay_zero_whatever_their_gradient(
    isa: str, dtype: torch.dtype, density: float
) -> None:
    problem = make_problem([5000, 77], [20], density, dtype)
    set_scalars(problem, ["all"])
    kept = problem.mask.to_bool()
    for s, bad in enumerate((float("inf"), float("nan"))):
        offset, size = problem.segments.rows[s, :2].tolist()
        problem.grads[s][~kept[offset : offset + size]] = bad
    stepped = problem
    for _ in range(3):
        stepped = assert_kernel_is_reference(stepped)
        pruned = stepped.values[: kept.numel()][~kept]
        assert torch.equal(bits(pruned), torch.zeros_like(bits(pruned)))
    assert all(bool(torch.isfinite(held).all()) for held in stepped.held())


def test_what_is_not_finite_spreads_as_in_the_reference(isa: str) -> None:
    problem = make_problem([3000], [40], 0.3)
    set_scalars(problem, ["all"])
    problem.grads[0][::5] = float("inf")
    problem.grads[1][3] = float("nan")
    assert_kernel_is_reference(problem)
    problem.grads[0][::5] = 1e-41
    problem.states[0][::3] = -1e-44
    assert_kernel_is_reference(problem)


def test_bits_do_not_depend_on_flushing_of_the_calling_thread(isa: str) -> None:
    problem = make_problem([70_000], [8], 0.6)
    set_scalars(problem, ["dampened"])
    problem.states[0] *= 1e-39
    problem.grads[0].mul_(1e-39)
    expected = step(problem, "reference")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        stepped = step(problem, "cpu")
    finally:
        torch.set_flush_denormal(False)
    stepped.assert_same(expected)


@LINUX
@pytest.mark.parametrize("module", ["test_masked_sgd", "test_masked_adamw"])
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_peak_memory(module: str, density: float) -> None:
    """Beyond its arguments a step needs stack and small change, whatever the model's size."""
    setup = f"""
import {module} as module
problem = module.make_problem([6_000_000, 2_000_000], [1000], {density}, states=3)
scalars = {{"test_masked_sgd": (["dampened"],), "test_masked_adamw": (["all"], 2)}}["{module}"]
module.set_scalars(problem, *scalars)
problem.copy = lambda: problem
"""
    touched = touched_bytes(setup, "module.step(problem, 'cpu')")
    assert 0 < touched < 400_000


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_dense_mask_is_torch_optim_over_20_steps(name: str, backend: str) -> None:
    (lr, momentum, dampening, decay), flags = SETTINGS[name]
    problem = make_problem([700, 33], [129], 1.0)
    set_scalars(problem, [name])
    twins = [problem.values_of(s).clone() for s in range(len(problem.segments))]
    flags = dict(flags)
    flags.pop("first", None)
    theirs = torch.optim.SGD(
        twins,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=decay,
        foreach=False,
        **flags,
    )
    problem.states[0].zero_()
    for number in range(20):
        problem.grads = [torch.randn_like(t) for t in twins]
        for twin, grad in zip(twins, problem.grads, strict=True):
            twin.grad = grad.clone()
        problem.segments.rows[:, 3] = sgd_flags(**flags, first=number == 0)
        problem = step(problem, backend)
        theirs.step()
    for s, twin in enumerate(twins):
        torch.testing.assert_close(problem.values_of(s), twin, **TOLERANCE)
        if momentum:
            buffer = theirs.state[twin]["momentum_buffer"]
            torch.testing.assert_close(problem.state_of(s, 0), buffer, **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tails", [[], [40, 9]], ids=["no tail", "tail"])
def test_the_public_form_is_the_step_of_torch(dtype: torch.dtype, tails: list[int]) -> None:
    """One flat gradient, and a list with offsets: the same bits as over a table of segments."""
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}
    start = make_problem([1000, 300], tails, 0.3, dtype)
    offsets = start.segments.rows[:, 0].tolist()
    flat = torch.zeros_like(start.values)
    for offset, grad in zip(offsets, start.grads, strict=True):
        flat[offset : offset + grad.numel()] = grad
    start.segments.scalars[:, :4] = torch.tensor(list(options.values()), dtype=torch.float64)
    results = []
    for grads, more in ((flat, {}), (start.grads, {"offsets": offsets})):
        p = start.copy()
        states = {"momentum_buffer": p.states[0], "master": p.master}
        masked_sgd_(p.values, p.mask, grads, **options, **states, **more, nesterov=True)
        results.append(p)
    wanted = start.copy()
    wanted.segments.rows[:, 3] = sgd_flags(nesterov=True)
    states = {"momentum_buffer": wanted.states[0], "master": wanted.master}
    step_segments_(wanted.values, wanted.mask, wanted.grads, wanted.segments, **states)
    results[1].assert_same(wanted)
    for offset, grad in zip(offsets, start.grads, strict=True):  # what lies between is not stepped
        part = slice(offset, offset + grad.numel())
        assert torch.equal(bits(results[0].values[part]), bits(wanted.values[part]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": torch.ones(999)}, "grads: expected 1000 elements"),
        ({"grads": torch.ones(1000).half()}, "grads: expected dtype float32, got float16"),
        ({"grads": torch.ones(1000), "offsets": [0]}, "offsets: expected None"),
        ({"grads": [torch.ones(10)]}, "offsets: expected 1, one per gradient, got None"),
        ({"grads": [torch.ones(10)], "offsets": [0, 128]}, "offsets: expected 1"),
        ({"grads": [torch.ones(10)], "offsets": [32]}, "multiples of 128"),
        ({"grads": [torch.ones(10)] * 2, "offsets": [128, 0]}, "in order"),
        ({"grads": [torch.ones(200)] * 2, "offsets": [0, 128]}, "apart"),
        ({"grads": [torch.ones(200)], "offsets": [896]}, "in the mask or in the tail"),
        ({"mask": None}, "mask: expected a Mask, got NoneType"),
        ({"values": torch.ones(4, 500)[:, ::2]}, "values: expected a contiguous tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_public_form_names_what_does_not_fit(change: dict, message: str) -> None:
    given = {"values": torch.ones(1000), "mask": Mask.full(1000), "grads": torch.ones(1000)}
    kept = given["values"].clone()
    with pytest.raises((TypeError, ValueError), match=message):
        masked_sgd_(**(given | change), lr=0.1)
    assert torch.equal(given["values"], kept)


def test_a_tail_begins_at_a_multiple_of_8() -> None:
    values = torch.ones(20)
    with pytest.raises(ValueError, match="multiple of 8 elements before a tail, got 12"):
        masked_sgd_(values, Mask.full(12), torch.ones(20), lr=0.1)
    masked_sgd_(values, Mask.full(16), torch.ones(20), lr=0.5)
    assert values.tolist() == [0.5] * 20
