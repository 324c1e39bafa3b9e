"""Autograd and the transforms of torch.func through pack and unpack."""

from __future__ import annotations

import pytest
import torch
from op_calls import N, mask, normal

from fedmap_sparse import ops
from fedmap_sparse.ops._library import OPS


def test_gradients_pass_through_pack_and_unpack() -> None:
    m = mask()
    values = normal().requires_grad_()
    ops.unpack(ops.pack(values, m), m).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, m.to_bool().float())
    with torch.no_grad():
        assert not ops.pack(values, m).requires_grad


def test_transforms_of_pack_and_unpack() -> None:
    m, batch = mask(), normal(3 * N).view(3, N)
    for x in batch:
        assert torch.equal(torch.func.grad(lambda x: ops.pack(x, m).sum())(x), m.to_bool().float())
    rows = torch.stack([ops.pack(x, m) for x in batch])
    assert torch.equal(torch.func.vmap(lambda x: ops.pack(x, m))(batch), rows)
    across = torch.func.vmap(lambda x: ops.pack(x, m), in_dims=1, out_dims=1)
    assert torch.equal(across(batch.T), rows.T)
    back = torch.func.vmap(lambda x: ops.unpack(x, m))(rows)
    assert torch.equal(back, batch * m.to_bool())
    grads = torch.func.vmap(torch.func.grad(lambda x: ops.pack(x, m).pow(2).sum()))(batch)
    assert torch.equal(grads, 2 * batch * m.to_bool())
    jacobian = torch.func.jacrev(lambda x: ops.unpack(x, m))(rows[0])
    assert torch.equal(jacobian, torch.eye(N)[m.to_bool()].T)


@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_the_registered_batching_rule(name: str) -> None:
    m = mask()
    width, size = (N, 100) if name == "pack" else (100, N)
    batch = normal(3 * width).view(3, width)
    op = OPS[name].default
    mapped = torch.vmap(op, in_dims=(0, None, None, None))(batch, m.words, m.rank, size)
    assert torch.equal(mapped, torch.stack([op(x, m.words, m.rank, size) for x in batch]))
    words = m.words.expand(3, -1)
    with pytest.raises(NotImplementedError, match="under one mask"):
        torch.vmap(op, in_dims=(0, 0, None, None))(batch, words, m.rank, size)


def test_a_second_gradient() -> None:
    m, x = mask(), normal().requires_grad_()
    (first,) = torch.autograd.grad(ops.pack(x, m).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 2 * m.to_bool().float())
