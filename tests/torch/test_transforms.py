"""Transforms and wrappers: they work, or a clear error names the parameter and the remedy."""

import copy
import os

import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedSGD


def test_vmap_over_pack():
    g = torch.randn(3, 64)
    mask = fs.ops.magnitude_mask(g[0].contiguous(), 8)
    wanted = g[:, mask.to_bool()]
    assert torch.equal(torch.vmap(lambda x: fs.ops.pack(x, mask))(g), wanted)


def test_functional_call_and_grad():
    m = nn.Linear(4, 3)
    flat = fs.flatten(m)
    x = torch.randn(2, 4)

    def loss(p):
        return torch.func.functional_call(m, p, (x,)).square().sum()

    grads = torch.func.grad(loss)({n: p.detach() for n, p in m.named_parameters()})
    m(x).square().sum().backward()
    torch.testing.assert_close(grads["weight"], m.weight.grad)
    flat.check_bound()


def test_a_sparse_gradient_names_its_parameter_and_the_remedy():
    m = nn.Sequential(nn.Embedding(50, 4, sparse=True))
    o = MaskedSGD(fs.flatten(m), lr=0.1)
    m(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"0\.weight\.grad: .*sparse=False"):
        o.step()


def test_a_teacher_whose_data_is_replaced_says_what_to_call():
    student = nn.Linear(4, 4)
    m = nn.ModuleList([student, copy.deepcopy(student).requires_grad_(False)])
    o = MaskedSGD(fs.flatten(m), lr=0.1)
    m[0](torch.ones(1, 4)).sum().backward()
    m[1].weight.data = m[1].weight.data * 0.9
    with pytest.raises(RuntimeError, match=r"1\.weight.*rebind\(\)"):
        o.step()
    m[1].weight.data.mul_(0.9)
    o.flat.rebind()
    o.step()


def test_fully_sharded_parameters_are_refused_by_name(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = dist.FileStore(os.fspath(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        m = nn.Linear(8, 4)
        fully_shard(m, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"weight: .*DTensor.*full state dict"):
            fs.flatten(m)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_trains():
    m = nn.Linear(4, 3)
    flat = fs.flatten(m)
    o = MaskedSGD(flat, lr=0.1)
    run = torch.compile(m, backend="eager")
    for _ in range(2):
        o.zero_grad()
        run(torch.ones(2, 4)).sum().backward()
        o.step()
    assert not torch.equal(m.weight, nn.Linear(4, 3).weight)
    flat.check_bound()
