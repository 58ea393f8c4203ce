"""Configuration of Sphinx."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

# Importing AiiDA makes its configuration folder; not the one of whoever builds these pages.
_aiida = tempfile.TemporaryDirectory(prefix="docs-aiida-")
os.environ["AIIDA_PATH"] = _aiida.name
warnings.filterwarnings("ignore", message="Creating AiiDA configuration folder")
logging.getLogger("alembic").setLevel(logging.WARNING)

from aiida_marketplace_hpc import __version__  # noqa: E402

project = "aiida-marketplace-hpc"
author = "The aiida-marketplace-hpc developers"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "from_code"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"aiida-marketplace-hpc {version}"
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
suppress_warnings = ["autodoc.mocked_object"]
