"""Docstrings: every example in them runs, and every public name has one that says enough."""

import doctest
import importlib
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
