"""Ambient state of torch changes no result: a whole round and its training, bit for bit."""

import copy

import ambient
import numpy as np
import pytest
import torch
from torch import nn

import fedmap_sparse as fs
from fedmap_sparse.optim import MaskedAdamW, MaskedSGD

STATES = {**ambient.INSIDE, **ambient.AROUND}


def federate(state, dtype):
    """A round of two clients, each call within `state`; gradients are drawn, not computed."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 5)).to(dtype)]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    grads = [[torch.randn_like(p) for p in models[0].parameters()] for _ in range(3)]
    with state():
        server = fs.FedMapServer(
            fs.flatten(models[0]), fs.schedule.OneShot(0.5, at=0), dtype="bfloat16"
        )
        makes = (MaskedAdamW, lambda f, m, lr: MaskedSGD(f, m, lr=0.1, momentum=0.9))
        makes = (lambda f, m, lr: MaskedAdamW(f, m, lr=0.1), makes[1])
        clients = [
            fs.FedMapClient(fs.flatten(m), optimizer=make, dtype=wire)
            for m, make, wire in zip(models[1:], makes, ("int8", "float16"), strict=True)
        ]
        server.begin_round()
        for c, m in zip(clients, models[1:], strict=True):
            c.receive(server.broadcast(c.have))
            for drawn in grads:
                for p, g in zip(m.parameters(), drawn, strict=True):
                    p.grad = g.clone()
                c.optimizer.clip_grad_norm_(1.0)
                c.optimizer.step()
        result = server.aggregate([(i, c.update(10)) for i, c in enumerate(clients)])
        assert result.accepted == (0, 1)
        saved = server.to_bytes(), clients[0].optimizer.state_dict()
        masks = server.mask & server.mask, ~server.mask
    return server, saved, masks, models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STATES)
def test_a_round_has_the_same_bits(name, dtype):
    from contextlib import nullcontext

    there, saved, masks, models = federate(STATES[name], dtype)
    here, wanted, same, _ = federate(nullcontext, dtype)
    assert torch.equal(there.params.values, here.params.values)
    assert saved[0] == wanted[0]
    assert masks == same
    # and training goes on outside of it
    m = models[1]
    m.zero_grad()
    m(torch.randn(4, 40).to(dtype)).sum().backward()
    x = torch.randn(there.mask.numel, requires_grad=True)
    fs.ops.pack(x, there.mask).sum().backward()
    MaskedSGD(fs.flatten(models[2]), lr=0.1).step()


@pytest.mark.parametrize("name", STATES)
def test_plain_ops_have_the_same_bits(name):
    x = torch.randn(5000)
    mask = fs.ops.magnitude_mask(x, 700)
    half = x.half()

    def run():
        q, scales = fs.ops.quantize_int8(x)
        return [
            fs.ops.magnitude_mask(x, 700).words,
            fs.ops.magnitude_threshold(x, 700),
            fs.ops.pack(x, mask),
            fs.ops.magnitude_threshold(half, 700, backend="reference"),
            torch.vmap(lambda row: fs.ops.pack(row, mask))(half.view(1, -1)),
            fs.ops.unpack(fs.ops.pack(x, mask), mask),
            fs.ops.extract(mask, fs.Mask.full(5000)).words,
            fs.ops.weighted_mean([x, x + 1], [1, 2]),
            fs.ops.cast(x, torch.bfloat16)[0],
            q,
            scales,
            fs.ops.dequantize_int8(q, scales),
            mask.to_bool(),
            fs.Mask.from_bool(mask.to_bool()).rank,
        ]

    with STATES[name]():
        there = run()
    for a, b in zip(there, run(), strict=True):
        assert a.dtype == b.dtype
        assert a.device == b.device
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "t",
    [
        torch.empty(64, device="meta"),
        torch._subclasses.FakeTensorMode().from_tensor(torch.ones(64)),
        torch.ones(64).to_sparse(),
        torch.ones(64)[::2],
        torch.ones(64, dtype=torch.float64),
        torch.ones(64).view(8, 8).t(),
        torch.ones(1).expand(64),
        torch._neg_view(torch.ones(64)),
        torch.complex(torch.ones(64), torch.ones(64)).conj().imag,
    ],
    ids=["meta", "fake", "sparse", "strided", "float64", "t", "expanded", "negated", "conjugate"],
)
def test_no_kernel_reads_what_is_no_memory_of_that_size(t):
    numel = t.numel()
    mask = fs.Mask.full(numel)
    try:
        packed = fs.ops.pack(t, mask)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError):
        return
    assert packed.device == t.device
    if packed.device.type == "cpu" and type(packed) is torch.Tensor:
        assert torch.equal(packed, t.reshape(-1))


def test_numpy_that_raises_at_underflow():
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    groups = [{"params": m[0].parameters()}, {"params": m[1].parameters()}]
    o = MaskedAdamW(fs.flatten(m), lr=0.1, betas=(0.5, 0.9), groups=groups)
    with np.errstate(all="raise"):
        for _ in range(1100):  # 0.5 ** 1075 is 0
            for p in m.parameters():
                p.grad = torch.ones_like(p)
            o.step()
    assert all(p.isfinite().all() for p in m.parameters())


def test_a_model_made_in_inference_mode_is_flattened_and_not_trained():
    """torch itself refuses to write its parameters: they count no versions."""
    with torch.inference_mode():
        m = nn.Sequential(nn.Linear(4, 4))
        params = fs.flatten(m)
    assert torch.equal(params.values[:16].view(4, 4), m[0].weight)
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        fs.optim.MaskedSGD(params, lr=0.1).step()


def test_nobodys_random_numbers_are_drawn():
    models = [nn.Linear(40, 30) for _ in range(2)]
    of_torch = torch.get_rng_state()
    of_numpy = np.random.get_state()[1].copy()  # noqa: NPY002  # the global one
    fs.ops.magnitude_mask(torch.arange(1e5).sin(), 500)
    server = fs.FedMapServer(fs.flatten(models[0]), fs.schedule.OneShot(0.5, at=0))
    client = fs.FedMapClient(fs.flatten(models[1]), dtype="int8")
    server.begin_round()
    client.receive(server.broadcast(None))
    server.aggregate([(0, client.update(1))])
    assert torch.equal(of_torch, torch.get_rng_state())
    assert (of_numpy == np.random.get_state()[1]).all()  # noqa: NPY002  # the global one
