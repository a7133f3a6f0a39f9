"""Configuration of the documentation site; see docs/contributing/index.md for the build commands.

The build needs no network: intersphinx is off unless DOCS_INTERSPHINX=1.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "reallm"
author = "the reallm authors"
project_copyright = "the reallm authors, Apache-2.0"
version = release = installed_version("reallm")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "numpydoc",
    "sphinxcontrib.typer",
    "plain_docstrings",
]
exclude_patterns = ["_build", "_ext"]
nitpicky = False
smartquotes = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"exclude-members": "model_config, model_post_init"}
autosummary_generate = False
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

doctest_global_setup = "import reallm"
doctest_test_doctest_blocks = ""

intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
    if os.environ.get("DOCS_INTERSPHINX") == "1"
    else {}
)

html_theme = "pydata_sphinx_theme"
html_title = f"reallm {release}"
html_static_path = ["_static"]
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navigation_depth": 2,
    "navbar_align": "left",
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
html_sidebars = {"log": [], "limitations": [], "glossary": []}
