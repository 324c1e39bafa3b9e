"""Which parameters a mask covers by default, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

#: `(name, parameter) -> bool`, or the names themselves.
Prunable = Callable[[str, Any], bool] | Collection[str]
#: Whether a parameter is pruned, and the reason.
Verdict = tuple[bool, str]

_WEIGHTED: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_NORMALISATION: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
# Parts of a name, between dots and underscores: "encoder.pos_embed", "rel_pos_bias_table", "wpe".
_POSITIONS = re.compile(
    r"(?:^|[._])(?:pos|position|positions|positional|wpe|relative_attention)(?:[._]|$)"
)
_POSITION_ENDS = re.compile(
    r"(?:^|[._])(?:pos|position)(?:emb|embed|embedding|embeddings|enc|encoding)"
)
_SCALES = re.compile(
    r"(?:^|[._])(?:scale|scales|gamma|magnitude|layerscale|weight_g|ls\d*)(?:[._]|$)"
)
_NORMS = re.compile(r"(?:^|[._])(?:\w*norm\d*|bn\d*|ln\d*|ln_\w+)\.(?:weight|bias)$")


def named_owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name, as a state dict has it: activation checkpointing's wrapper
    (`torch.distributed.algorithms`) leaves its own name out there."""
    for name, owner in module.named_modules(remove_duplicate=False):
        yield ".".join(n for n in name.split(".") if n != "_checkpoint_wrapped_module"), owner


def from_name(name: str, tensor: Any) -> Verdict:
    """The default rule where a state dict is all there is: by shape and name."""
    if _NORMS.search(name):
        return False, "a normalisation, by its name"
    return _from_shape(name, tuple(tensor.shape))


def from_module(module: nn.Module) -> Callable[[str, Any], Verdict]:
    """The default rule for the parameters of `module`: by the type of the module that owns each."""
    owners: dict[str, tuple[nn.Module, str]] = {}
    modules: Mapping[str, nn.Module] = dict(named_owners(module))
    for prefix, owner in modules.items():
        for key in owner._parameters:
            owners[f"{prefix}.{key}" if prefix else key] = owner, prefix

    def rule(name: str, tensor: Any) -> Verdict:
        owner, prefix = owners[name]
        key = name.rpartition(".")[2]
        if isinstance(owner, nn.utils.parametrize.ParametrizationList):
            return _parametrized(owner, prefix, key, modules, tensor)
        return _from_type(owner, name, key, tuple(tensor.shape))

    return rule


def _from_type(owner: nn.Module, name: str, key: str, shape: tuple[int, ...]) -> Verdict:
    kind = type(owner).__name__
    if isinstance(owner, _WEIGHTED):
        if len(shape) < 2 or "bias" in key:
            return False, f"a bias of {kind}"
        if key == "weight_g":
            return False, f"a magnitude of {kind}, by torch.nn.utils.weight_norm"
        if isinstance(owner, nn.Embedding) and _is_position(name):
            return False, "a table of positions, by its name"
        return True, f"a weight of {kind}"
    if isinstance(owner, _NORMALISATION) or "norm" in kind.lower():
        return False, f"a parameter of {kind}, a normalisation"
    return _from_shape(name, shape)


def _parametrized(
    owner: nn.Module, prefix: str, key: str, modules: Mapping[str, nn.Module], tensor: Any
) -> Verdict:
    """`prefix` is "...parametrizations.weight": the rule is the parametrised module's own."""
    first = type(next(iter(owner.children()))).__name__
    if first == "_WeightNorm" and key == "original0":
        return False, "a magnitude, by torch.nn.utils.parametrizations.weight_norm"
    base, _, what = prefix.rpartition("parametrizations.")
    parent = modules[base.rstrip(".")]
    pruned, why = _from_type(parent, f"{base}{what}", what, tuple(tensor.shape))
    return pruned, f"{why}, behind {first.lstrip('_')}"


def _from_shape(name: str, shape: tuple[int, ...]) -> Verdict:
    key = name.rpartition(".")[2]
    if len(shape) < 2:
        return False, "fewer than two dimensions"
    if len(shape) > 2 and sum(s != 1 for s in shape) < 2 and "weight" not in key:
        return False, "one dimension longer than 1: a scale, a token or a bias"
    if "bias" in key:
        return False, "a bias, by its name"
    if _is_position(name):
        return False, "a table of positions, by its name"
    if _SCALES.search(name):
        return False, "a scale, by its name"
    return True, "two or more dimensions"


def _is_position(name: str) -> bool:
    return bool(_POSITIONS.search(name) or _POSITION_ENDS.search(name))
