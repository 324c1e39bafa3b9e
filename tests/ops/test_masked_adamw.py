"""masked_adamw_: kernels against the reference to the bit, the reference against torch.optim."""

from __future__ import annotations

import pytest
import torch
from masked_steps import DTYPES, EDGES, Problem, bits, make_problem

from fedmap_sparse import Mask
from fedmap_sparse.ops import masked_adamw_
from fedmap_sparse.ops.masked_adamw import adamw_flags, step_segments_

# lr, beta1, beta2, eps, weight_decay; no default among them, except where a name says so.
SETTINGS = {
    "default": ((1e-3, 0.9, 0.999, 1e-8, 1e-2), {}),
    "betas": ((0.02, 0.7, 0.95, 1e-3, 0.2), {}),
    "no decay": ((0.002, 0.8, 0.9, 1e-4, 0), {"maximize": True}),
    "amsgrad": ((0.01, 0.8, 0.9, 1e-4, 0.1), {"amsgrad": True}),
    "all": ((0.03, 0.6, 0.99, 1e-5, 0.3), {"amsgrad": True, "maximize": True}),
}
# torch contracts (`lerp`, `addcmul`, `addcdiv`) where we round each operation, and its float32 root
# is off by an ulp in a fifth of values: some 2^-22 of a weight's step of size lr, and of the
# averages, 20 times; weights are of size 1.
TOLERANCE = {"rtol": 2e-6, "atol": 1e-6}


def set_scalars(problem: Problem, names: list[str], t: int) -> None:
    for s in range(len(problem.segments)):
        (lr, beta1, beta2, eps, decay), flags = SETTINGS[names[s % len(names)]]
        row = [lr, beta1, beta2, eps, decay, beta1**t, beta2**t, 0]
        problem.segments.scalars[s] = torch.tensor(row, dtype=torch.float64)
        problem.segments.rows[s, 3] = adamw_flags(**flags)


def step(problem: Problem, backend: str) -> Problem:
    stepped = problem.copy()
    step_segments_(
        stepped.values,
        problem.mask,
        problem.grads,
        problem.segments,
        exp_avg=stepped.states[0],
        exp_avg_sq=stepped.states[1],
        max_exp_avg_sq=stepped.states[2] if len(stepped.states) > 2 else None,
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
        problem = make_problem([size, 3, size], [size, 1], density, dtype, states=3)
        set_scalars(problem, list(SETTINGS), t=3)
        assert_kernel_is_reference(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_reference_at_any_thread_count(
    isa: str, threads: int, dtype: torch.dtype
) -> None:
    for density in (0.01, 0.3, 1.0):
        problem = make_problem([70_001, 5, 30_000], [9, 120_000], density, dtype, states=3)
        set_scalars(problem, ["betas", "amsgrad", "all"], t=2)
        assert_kernel_is_reference(problem)


def test_without_amsgrad_the_third_state_is_not_needed_nor_touched(isa: str) -> None:
    problem = make_problem([3000, 100], [50], 0.3, states=3)
    set_scalars(problem, ["betas", "no decay"], t=7)
    stepped = assert_kernel_is_reference(problem)
    assert torch.equal(stepped.states[2], problem.states[2])
    del problem.states[2], stepped.states[2]
    step(problem, "cpu").assert_same(stepped)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_without_gradient_keep_weights_and_state(isa: str, dtype: torch.dtype) -> None:
    problem = make_problem([500, 3000, 40, 2048], [64, 9, 33], 0.4, dtype, states=3)
    set_scalars(problem, ["all"], t=1)
    for skipped in (0, 2, 4):
        problem.grads[skipped] = None
    stepped = assert_kernel_is_reference(problem)
    for s in (0, 2, 4):
        assert torch.equal(bits(stepped.values_of(s)), bits(problem.values_of(s)))
        for k in range(3):
            assert torch.equal(bits(stepped.state_of(s, k)), bits(problem.state_of(s, k)))
    assert not torch.equal(stepped.states[1], problem.states[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.005, 0.2, 0.9])
def test_pruned_weights_stay_zero_whatever_their_gradient(
    isa: str, dtype: torch.dtype, density: float
) -> None:
    problem = make_problem([5000, 77], [20], density, dtype, states=3)
    kept = problem.mask.to_bool()
    for s, bad in enumerate((float("inf"), float("nan"))):
        offset, size = problem.segments.rows[s, :2].tolist()
        problem.grads[s][~kept[offset : offset + size]] = bad
    stepped = problem
    for t in (1, 2, 3):
        set_scalars(stepped, ["all"], t)
        stepped = assert_kernel_is_reference(stepped)
        pruned = stepped.values[: kept.numel()][~kept]
        assert torch.equal(bits(pruned), torch.zeros_like(bits(pruned)))
    assert all(bool(torch.isfinite(held).all()) for held in stepped.held())


def test_what_is_not_finite_spreads_as_in_the_reference(isa: str) -> None:
    problem = make_problem([3000], [40], 0.3, states=3)
    set_scalars(problem, ["all"], t=4)
    problem.grads[0][::5] = float("inf")
    problem.grads[1][3] = float("nan")
    stepped = assert_kernel_is_reference(problem)
    assert stepped.state_of(1, 2)[3].isnan()  # the maximum does not hide it


def test_moments_of_zero_and_below_the_normal_range(isa: str) -> None:
    problem = make_problem([3000], [40], 0.3, states=3)
    set_scalars(problem, ["betas"], t=1)
    for state, size in zip(problem.states, (0.0, 1e-41, 1e-44), strict=True):
        state.fill_(size)
    problem.grads[0].mul_(1e-22)
    problem.grads[1].zero_()
    assert_kernel_is_reference(problem)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_dense_mask_is_torch_optim_over_20_steps(name: str, backend: str) -> None:
    (lr, beta1, beta2, eps, decay), flags = SETTINGS[name]
    problem = make_problem([700, 33], [129], 1.0, states=3)
    twins = [problem.values_of(s).clone() for s in range(len(problem.segments))]
    theirs = torch.optim.AdamW(
        twins,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=decay,
        foreach=False,
        **flags,
    )
    for state in problem.states:
        state.zero_()
    for t in range(1, 21):
        problem.grads = [torch.randn_like(twin) for twin in twins]
        for twin, grad in zip(twins, problem.grads, strict=True):
            twin.grad = grad.clone()
        set_scalars(problem, [name], t)
        problem = step(problem, backend)
        theirs.step()
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if "amsgrad" in flags else [])]
    for s, twin in enumerate(twins):
        torch.testing.assert_close(problem.values_of(s), twin, **TOLERANCE)
        for k, state in enumerate(names):
            torch.testing.assert_close(
                problem.state_of(s, k), theirs.state[twin][state], **TOLERANCE
            )


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_public_form_is_the_step_of_torch(amsgrad: bool) -> None:
    """Three steps beside `torch.optim.AdamW` over the survivors."""
    torch.manual_seed(0)
    mask = Mask.from_bool(torch.rand(1000) < 0.3)
    kept = mask.to_bool()
    values = torch.randn(1000) * kept
    theirs = torch.nn.Parameter(values[kept].clone())
    options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([theirs], amsgrad=amsgrad, **options)
    m, v = torch.zeros(mask.nnz), torch.zeros(mask.nnz)
    largest = torch.zeros(mask.nnz) if amsgrad else None
    for step in range(1, 4):
        grad = torch.randn(1000)
        states = {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": largest}
        masked_adamw_(values, mask, grad, step=step, **states, **options)
        theirs.grad = grad[kept]
        optimizer.step()
    assert torch.allclose(values[kept], theirs, rtol=1e-5, atol=1e-7)
    assert not values[~kept].any()
    with pytest.raises(ValueError, match="step: expected at least 1, got 0"):
        masked_adamw_(values, mask, grad, step=0, exp_avg=m, exp_avg_sq=v)
