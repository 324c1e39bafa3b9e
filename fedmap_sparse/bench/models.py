"""Cases of whole-model optimizer steps: one call for every parameter, tail included.

In these no forward or backward runs, gradients are drawn once; `forward_backward` times both.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from fedmap_sparse import ops
from fedmap_sparse.bench import floors
from fedmap_sparse.bench.case import CheckFailed, Peer, Setting, Trial, case
from fedmap_sparse.bench.steps import ADAMW, DENSITIES, SGD
from fedmap_sparse.flat import FlatParameters, flatten
from fedmap_sparse.optim import MaskedAdamW, MaskedOptimizer, MaskedSGD


def resnet20() -> nn.Module:
    from fedmap_sparse.experiments.models import build

    return build("resnet20", (3, 32, 32), 10)


def mobilenetv2() -> nn.Module:
    """The layers of Sandler et al. 2018 (arXiv 1801.04381, table 2), 1,000 classes.

    Without the additions around its blocks, which have no parameters.
    """
    layers: list[nn.Module] = []

    def conv(
        channels_in: int,
        channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        layers.append(
            nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        )
        layers.append(nn.BatchNorm2d(channels))
        if not linear:
            layers.append(nn.ReLU6())

    conv(3, 32, 3, stride=2)
    width = 32
    for expansion, channels, repeats, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for repeat in range(repeats):
            hidden = expansion * width
            if expansion != 1:
                conv(width, hidden, 1)
            conv(hidden, hidden, 3, stride=1 if repeat else stride, groups=hidden)
            conv(hidden, channels, 1, linear=True)
            width = channels
    conv(width, 1280, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


class BertLayers(nn.Sequential):
    """BERT (Devlin et al. 2018) over a plain list of layers."""

    def forward(self, tokens: Tensor) -> Tensor:
        words, places, kinds, norm, *layers, pool = list[Any](self)
        batch, length = tokens.shape
        x = norm(words(tokens) + places.weight[:length] + kinds.weight[0])

        def heads(t: Tensor) -> Tensor:
            return t.view(batch, length, -1, 32).transpose(1, 2)

        for i in range(0, len(layers), 8):
            q, k, v, out, norm, up, down, last = layers[i : i + 8]
            seen = functional.scaled_dot_product_attention(heads(q(x)), heads(k(x)), heads(v(x)))
            x = norm(x + out(seen.transpose(1, 2).reshape(x.shape)))
            x = last(x + down(functional.gelu(up(x))))
        pooled: Tensor = pool(x[:, 0])
        return pooled


def minilm() -> nn.Module:
    """The layers of all-MiniLM-L6-v2: BERT with 6 blocks of width 384."""
    width, hidden = 384, 1536
    layers: list[nn.Module] = [
        *(nn.Embedding(rows, width) for rows in (30522, 512, 2)),
        nn.LayerNorm(width),
    ]
    for _ in range(6):
        layers += [*(nn.Linear(width, width) for _ in range(4)), nn.LayerNorm(width)]
        layers += [nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width)]
    return BertLayers(*layers, nn.Linear(width, width))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (resnet20, 269_722),
    "mobilenetv2": (mobilenetv2, 3_504_872),
    "minilm": (minilm, 22_713_216),
}
#: A batch of each: images, or sentences of 128 words.
BATCHES: dict[str, Callable[[], Tensor]] = {
    "resnet20": lambda: torch.randn(32, 3, 32, 32),
    "mobilenetv2": lambda: torch.randn(8, 3, 224, 224),
    "minilm": lambda: torch.randint(30522, (8, 128)),
}


def forward_backward(name: str, module: nn.Module, rounds: int = 3) -> float:
    """Seconds that forward and backward of one batch take: the least of `rounds`."""
    batch, least = BATCHES[name](), math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        module(batch).square().mean().backward()
        least = min(least, time.perf_counter() - start)
    return least


OPTIMIZERS: dict[str, tuple[Callable[..., MaskedOptimizer], Callable[..., Any], dict[str, Any]]] = {
    "sgd": (MaskedSGD, torch.optim.SGD, SGD),
    "adamw": (MaskedAdamW, torch.optim.AdamW, ADAMW),
}


def _trial(
    s: Setting,
    model: nn.Module,
    masked: Callable[..., MaskedOptimizer],
    plain: Callable[..., Any],
    options: dict[str, Any],
) -> Trial:
    model = model.to(s.device, s.dtype)
    generator = torch.Generator().manual_seed(s.seed)
    grads = [torch.randn(p.shape, generator=generator).to(p) for p in model.parameters()]
    flat = flatten(copy.deepcopy(model))
    layout = flat.layout
    for p, q, grad in zip(flat.module.parameters(), model.parameters(), grads, strict=True):
        p.grad = q.grad = grad
    kept = round(s.density * layout.eligible)
    mask = ops.prune_(flat.prunable, kept, within=layout.initial_mask(s.device))
    flat.mark_written()
    optimizer = masked(flat, mask, **options)
    keep = layout.mask_dict(mask)

    def ours() -> FlatParameters:
        optimizer.step()
        return flat

    def check() -> None:
        """Against torch's single-tensor form; bits against the reference are the ops' own cases."""
        theirs = copy.deepcopy(flat.module)
        for p, grad in zip(theirs.parameters(), grads, strict=True):
            p.grad = grad
        step = masked(flat, mask, **options).step
        their_step = plain(theirs.parameters(), foreach=False, fused=False, **options).step
        for scale in (1.0, -0.5):
            torch._foreach_mul_(grads, scale)
            step()
            their_step()
            _multiply(theirs, keep)
        for (name, p), q in zip(theirs.named_parameters(), flat.module.parameters(), strict=True):
            if not torch.allclose(p, q, rtol=1e-5, atol=1e-7):
                off = float((p - q).detach().abs().max())
                raise CheckFailed(f"{name}: expected torch's parameters, got some {off} away")
            if name in keep and bool((q.data[~keep[name]] != 0).any()):
                raise CheckFailed(f"{name}: expected zeros where pruned")

    lines = floors.touched_bytes(mask, flat.values.element_size())
    tail = flat.tail
    ours()  # allocates the state
    state_bytes = _state_bytes(optimizer)
    scratch = torch.zeros_like(flat.values)
    return Trial(
        ours,
        check,
        mask.words.nbytes + 3 * (lines + tail.nbytes) + 2 * state_bytes,
        floors.together(
            floors.touched(scratch, mask),
            floors.inplace(scratch, tail.nbytes),
            floors.read(flat.values, lines + tail.nbytes),
            floors.inplace(torch.zeros(state_bytes // 4, device=s.device)),
        ),
        _peers(model, keep if s.density < 1 else {}, plain, options),
        state_bytes=state_bytes,
    )


def _state_bytes(optimizer: MaskedOptimizer) -> int:
    names = (*optimizer.state_names, "master")
    state = optimizer.state_dict()["state"].values()
    return sum(t.nbytes for of_one in state for name, t in of_one.items() if name in names)


def _multiply(model: nn.Module, keep: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in keep:
                p.mul_(keep[name])


def _peers(
    model: nn.Module,
    keep: dict[str, Tensor],
    plain: Callable[..., Any],
    options: dict[str, Any],
) -> dict[str, Peer]:
    """Steps over every weight, then one `_foreach_mul_` by float masks, or prune's pre-hooks.

    Of `torch.nn.utils.prune` only the forward pre-hooks are timed: its share of the backward pass
    is left out. At density 1 nothing is masked.
    """
    peers = {}
    for form in ("foreach", "fused"):
        twin = copy.deepcopy(model)
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = q.grad
        step = plain(twin.parameters(), **{form: True}, **options).step
        held = [(p.data, keep[name].to(p)) for name, p in twin.named_parameters() if name in keep]
        peers[f"{form} + mask"] = Peer(_then_multiply(step, held))
    if keep:
        peers["fused, nn.utils.prune"] = Peer(_prune(model, keep, plain, options))
    return peers


def _then_multiply(step: Callable[[], Any], held: list[tuple[Tensor, Tensor]]) -> Callable[[], Any]:
    weights, masks = [w for w, _ in held], [m for _, m in held]

    def run() -> list[Tensor]:
        step()
        if weights:
            torch._foreach_mul_(weights, masks)
        return weights

    return run


def _prune(
    model: nn.Module, keep: dict[str, Tensor], plain: Callable[..., Any], options: dict[str, Any]
) -> Callable[[], Any]:
    twin = copy.deepcopy(model)
    pruned = []
    for name, mask in keep.items():
        owner, _, key = name.rpartition(".")
        module = twin.get_submodule(owner)
        prune.custom_from_mask(module, key, mask)
        pruned.append(module)
    grads = {name: q.grad for name, q in model.named_parameters()}
    for name, p in twin.named_parameters():
        p.grad = grads[name.removesuffix("_orig")]
    step = plain(twin.parameters(), fused=True, **options).step

    def run() -> nn.Module:
        step()
        for module in pruned:
            for hook in module._forward_pre_hooks.values():
                hook(module, None)
        return twin

    return run


def _register(optimizer: str, model: str) -> None:
    masked, plain, options = OPTIMIZERS[optimizer]
    build, size = MODELS[model]

    @case(
        f"{optimizer}_{model}",
        densities=DENSITIES,
        dtypes=(torch.float32,),
        group="models",
        fixed_n=size,
        fixed_inputs="init",
    )
    def trial(s: Setting) -> Trial:
        torch.manual_seed(s.seed)
        return _trial(s, build(), masked, plain, options)


for _optimizer in OPTIMIZERS:
    for _model in MODELS:
        _register(_optimizer, _model)
