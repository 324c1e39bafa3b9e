"""The package as a whole: what importing it pulls in, its version, and what it ships."""

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import op_calls
import pytest

import fedmap_sparse

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str) -> str:
    """Output of ``code`` in a new interpreter that finds this checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_pulls_in_torch_and_numpy_alone() -> None:
    # torch and numpy come first: what they pull in themselves is theirs.
    added = python(
        "import sys, numpy, torch\n"
        "before = set(sys.modules)\n"
        "import fedmap_sparse\n"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(added - sys.stdlib_module_names - {'torch', 'numpy'}))"
    ).split()
    assert added == ["fedmap_sparse"]


def test_import_works_without_what_is_optional() -> None:
    optional = ["triton", "flwr", "nvflare", "matplotlib", "rich", "safetensors", "sklearn"]
    python(f"import sys; sys.modules.update(dict.fromkeys({optional})); import fedmap_sparse")


#: What users may rely on. A name more or less here is a decision, for the changelog too.
PUBLIC = {
    "": """
        FedMapClient FedMapError FedMapServer FlatLayout FlatParameters FormatError Mask
        NeedsMask RoundFailed __version__ backends decode decode_state_dict encode
        encode_state_dict errors flatten ops optim schedule""",
    "ops": " ".join(op_calls.PUBLIC),
    "codec": """
        Coding DTYPES FormatError Header Inspection MaskSection Message NeedsMask
        Quantized Section SectionInfo Source Stamp check_coding check_dtype check_key
        compose decode decode_state_dict encode encode_state_dict inspect inspect_file
        parse_header seal unseal""",
    "federated": """
        Aggregator ArraySection Bytes ClientId Criterion FedMapClient FedMapServer
        MakeOptimizer NeedsMask RoundFailed RoundResult array_sections""",
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda name: name or "fedmap_sparse")
def test_public_names_are_exactly_these(module: str) -> None:
    found = importlib.import_module(f"fedmap_sparse.{module}".rstrip("."))
    assert sorted(found.__all__) == sorted(PUBLIC[module].split())
    for name in found.__all__:
        assert hasattr(found, name)


#: From the lowest to the highest. A module imports what is lower, or of its own entry.
LAYERS = [
    "_command _text",
    "_files",
    "errors page",
    "_backends",
    "_autocast _checks _transfer",
    "schedule prunable _tensor_kinds",
    "mask",
    "layout",
    "ops",
    "flat",
    "codec optim",
    "federated",
    "engines",
    "",
    "experiments",
    "bench",
    "cli",
    "__main__",
]
#: Modules that are a part of another's.
PART_OF = {
    "triton_kernels": "ops",
    "cuda_kernels": "ops",
    "_layout_text": "layout",
    "_gradients": "flat",
    "_module_tree": "flat",
    "_writes": "flat",
}
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in (layer.split() or [""])}
MODULES = sorted((ROOT / "fedmap_sparse").rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of this package that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "fedmap_sparse")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == (
            "fedmap_sparse"
        ):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name.split(".")[1] in {*RANK, *PART_OF} else str(node.module)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    def part(name: str) -> str:
        second = [*name.split("."), ""][1]
        return PART_OF.get(second, second)

    own = part(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for name in imported(ast.parse(path.read_text())):
        other = part(name)
        assert {own, other} <= RANK.keys(), f"LAYERS: where do {own} and {other} belong?"
        assert other == own or RANK[other] < RANK[own], f"{own or 'the root'} imports {name}"


def test_an_import_the_wrong_way_is_noticed() -> None:
    """The check itself: in a function, by either form."""
    code = "def f():\n    import fedmap_sparse.cli\n    from fedmap_sparse import codec, optim\n"
    names = ["fedmap_sparse.cli", "fedmap_sparse.codec", "fedmap_sparse.optim"]
    assert list(imported(ast.parse(code))) == names


def test_an_older_torch_is_refused_in_one_clear_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.__version__ = '2.9.1'; import fedmap_sparse"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    wanted = "ImportError: fedmap_sparse needs torch 2.11 or later, found torch 2.9.1"
    assert done.stderr.splitlines()[-1] == wanted
    assert f">={wanted.split()[4]}," in next(
        r for r in PYPROJECT["project"]["dependencies"] if r.startswith("torch")
    )


UNBUILT = """
import sys, warnings
sys.modules["fedmap_sparse._native"] = None  # as if it had not been built
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fedmap_sparse as fs
import torch
print(*[w.message for w in caught])
print(fs.backends()["cpu"])
torch.manual_seed(0)
params = fs.flatten(torch.nn.Linear(40, 30))
mask = fs.ops.prune_(params.prunable, 100, within=params.layout.initial_mask())
params.mask = mask
optimizer = fs.optim.MaskedSGD(params, lr=0.1, momentum=0.9)
for _ in range(2):
    params.module(torch.ones(1, 40)).sum().backward()
    optimizer.step()
for dtype in ("float32", "float16", "int8"):
    message = fs.encode(params, mask, dtype=dtype, mask_section="full")
    assert fs.decode(message, params.layout).mask == mask
packed = fs.ops.pack(params.prunable, mask)
assert torch.equal(fs.ops.weighted_mean([packed, packed], [1, 2]), packed)
assert fs.ops.deposit(fs.ops.extract(mask, mask), mask) == mask
print("served", mask.nnz)
"""


def test_an_unbuilt_tree_is_served_by_the_reference() -> None:
    warning, reason, served = python(UNBUILT).splitlines()
    assert "the C++ extension did not load" in warning
    assert "pip install ." in warning
    assert "pip install ." in reason
    assert served == "served 100"


def test_the_extension_is_there_in_ci() -> None:
    """What needs it is skipped without it; in CI that would hide everything."""
    from fedmap_sparse import _backends

    if os.environ.get("CI", "").lower() in ("", "0", "false"):
        pytest.skip("CI is not set")
    assert _backends.native is not None, _backends._native_error


def test_version_has_one_source() -> None:
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "fedmap_sparse.__version__"
    }
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {fedmap_sparse.__version__}" in citation


def test_core_depends_on_numpy_and_torch() -> None:
    names = [requirement.split(">")[0] for requirement in PYPROJECT["project"]["dependencies"]]
    assert names == ["numpy", "torch"]


def test_constraints_are_within_the_accepted_ranges() -> None:
    pytest.importorskip("packaging", reason="packaging is not installed")
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pairs}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    # Not installed by `make`, or pinned elsewhere.
    untested = {"flower", "nvflare", "privacy", "tensorboard"}
    wanted = [*project["dependencies"]]
    wanted += [r for extra, group in extras.items() if extra not in untested for r in group]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_every_file_of_data_and_types_is_declared() -> None:
    declared = {
        path
        for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    built = {".py", ".pyc", ".so"}
    shipped = {
        path
        for path in (ROOT / "fedmap_sparse").rglob("*")
        if path.is_file() and path.suffix not in built
    }
    assert shipped == declared
    assert {"py.typed", "LICENSE"} <= {path.name for path in shipped}
