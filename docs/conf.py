"""Sphinx: MyST pages, and an API reference made from the docstrings. `make docs` builds it."""

import importlib
import inspect
import pydoc
import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock
from sphinx.util import logging

import fedmap_sparse

project = "fedmap_sparse"
author = copyright = "The fedmap-sparse authors"
version = release = fedmap_sparse.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"fedmap_sparse {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# A link that leaves docs/ is one to a file of the repository, which tests/test_documents.py checks.
myst_all_links_external = False

# Every reference inside the package has to resolve; other packages' names are not looked up, since
# that needs a network. Single backticks in docstrings are links where the name is known, else code.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!fedmap_sparse\.).*"),
    ("py:.*", r"fedmap_sparse\.(.*\.)?_.*"),
]
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Inherited members are shown, but for those of torch and of Python's own classes.
FOREIGN = "BaseException, Exception, ValueError, RuntimeError, Optimizer, ABC, dict, tuple, IntEnum"
autodoc_default_options = {"members": True, "inherited-members": FOREIGN}
autodoc_mock_imports = ["flwr", "nvflare"]
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# A short name in backticks may fit several methods, `round` for one: then any of them is the link.
suppress_warnings = ["ref.python"]
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

# Modules whose `__all__` is public. A name that several of them have is documented in the first.
PUBLIC = [
    "fedmap_sparse",
    "fedmap_sparse.ops",
    "fedmap_sparse.optim",
    "fedmap_sparse.schedule",
    "fedmap_sparse.federated",
    "fedmap_sparse.codec",
    "fedmap_sparse.layout",
    "fedmap_sparse.errors",
    "fedmap_sparse.experiments",
]


def public_names() -> dict[int, str]:
    """Identity to full name of each class and function in `__all__` of the public modules."""
    names: dict[int, str] = {}
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isroutine(value):
                names.setdefault(id(value), f"{module_name}.{name}")
    return names


def skip_documented(
    app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any
) -> bool | None:
    """A name that an earlier module of PUBLIC documents is left out of the later ones."""
    if what != "module" or not callable(value):
        return None
    module = app.env.current_document.autodoc_module if skip is False else None
    if module not in PUBLIC:
        return None
    earlier = PUBLIC[: PUBLIC.index(module)]
    if any(value is getattr(importlib.import_module(m), name, None) for m in earlier):
        return True
    return None


def plain_bars(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """|x| is a magnitude in our docstrings, not a substitution of reStructuredText."""
    lines[:] = [re.sub(r"\|(\w+)\|", r"\\|\1\\|", line) for line in lines]


def check_public_names(app: Sphinx, env: Any) -> None:
    names = public_names()
    with mock(autodoc_mock_imports):  # where no page of the API has changed, autodoc imported none
        for name, _, kind, *_ in env.get_domain("py").get_objects():
            if kind in ("class", "exception", "function"):
                names.pop(id(pydoc.locate(name)), None)
    for name in names.values():
        logging.getLogger(__name__).warning("public name %s is on no page of docs/api", name)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip_documented)
    app.connect("autodoc-process-docstring", plain_bars)
    app.connect("env-check-consistency", check_public_names)
