"""Docstrings: every example in them runs, and every public name has one that says enough."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import fedmap_sparse

# Triton's modules decide at import between compiler and interpreter; they are tests/gpu_free's.
SKIPPED = ("fedmap_sparse._native", "fedmap_sparse.triton_kernels", "fedmap_sparse.__main__")
OPTIONAL = {"flwr", "nvflare", "safetensors", "rich", "matplotlib"}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules() -> list[ModuleType]:
    found = [fedmap_sparse]
    for module in pkgutil.walk_packages(fedmap_sparse.__path__, "fedmap_sparse."):
        if module.name.startswith(SKIPPED) or module.name.endswith("__main__"):
            continue
        try:
            found.append(importlib.import_module(module.name))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in OPTIONAL:
                raise
    return found


MODULES = modules()
EXAMPLES = [
    test for module in MODULES for test in doctest.DocTestFinder().find(module) if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_example(
    example: doctest.DocTest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("doctest"))
    out: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=out.append)
    assert result.failed == 0, "".join(out)


PUBLIC = [
    "fedmap_sparse",
    "fedmap_sparse.ops",
    "fedmap_sparse.optim",
    "fedmap_sparse.schedule",
    "fedmap_sparse.federated",
    "fedmap_sparse.codec",
    "fedmap_sparse.experiments",
]
# What a user makes or calls to begin with: these show how.
SHOWN = (
    "fedmap_sparse.ops.",
    "fedmap_sparse.optim.Masked",
    "fedmap_sparse.schedule.",
    *(
        f"fedmap_sparse.{name}"
        for name in ("Flat", "Mask", "FedMapServer", "FedMapClient", "flatten", "encode", "decode")
    ),
)
# These take whatever they are given.
NEVER_RAISE = {"fedmap_sparse.federated.array_sections"}
BASES = {"fedmap_sparse.schedule.Schedule", "fedmap_sparse.optim.MaskedOptimizer"}


def public() -> dict[str, object]:
    """Each public class and function once, by the first name it is known under."""
    found: dict[str, object] = {}
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module_name and not name.startswith("_")
        ]
        for name in names:
            value = getattr(module, name)
            if (inspect.isclass(value) or inspect.isroutine(value)) and value not in found.values():
                found[f"{module_name}.{name}"] = value
    return found


def missing(name: str, value: object) -> list[str]:
    """What the docstring of a public name lacks."""
    text = vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    if not text:
        return ["a docstring"]
    wanted = {}
    if inspect.isroutine(value):
        signature = inspect.signature(value)
        wanted["Args:"] = bool(signature.parameters)
        wanted["Returns:"] = signature.return_annotation not in (None, "None")
        wanted["Raises:"] = bool(signature.parameters) and name not in NEVER_RAISE
    wanted[">>> "] = name.startswith(SHOWN) and name not in BASES
    lacks = [part for part, is_wanted in wanted.items() if is_wanted and part not in text]
    if inspect.isclass(value):
        methods = {k: getattr(value, k) for k in vars(value) if not k.startswith("_")}
        lacks += [
            f"a docstring of {k}"
            for k, method in methods.items()
            if (inspect.isroutine(method) or isinstance(method, property))
            and not inspect.getdoc(method)
        ]
    return lacks


@pytest.mark.parametrize(("name", "value"), public().items(), ids=public())
def test_public_names_are_documented(name: str, value: object) -> None:
    assert missing(name, value) == []
