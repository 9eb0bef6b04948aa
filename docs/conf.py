"""How the site is built: `make docs`. Its pages are executed on the bundled models.

What a page says of a real model is read from the kept store of the findings, which is unpacked
beside the pages. Pages run in a folder of their own each, so that none sees what another wrote.
"""

import os
import socket
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).parent
FINDINGS = HERE / "_build" / "findings.zarr"


def _unpack_findings() -> None:
    if not FINDINGS.is_dir():
        with tarfile.open(HERE.parent / "stores" / "findings.tar.xz") as archive:
            archive.extractall(FINDINGS, filter="data")


def _answers(address: str) -> bool:
    """Whether a site can be reached: where it cannot, links to it are left out."""
    try:
        socket.create_connection((str(urlsplit(address).hostname), 443), timeout=2).close()
    except OSError:
        return False
    return True


sys.path[:0] = [str(HERE), str(HERE / "extensions")]
_unpack_findings()
# Pages and the processes that they start take what is here; a thread each, as pages are two. What
# a command prints is plain, although a kernel asks for colours.
os.environ |= {
    "COLUMNS": "100",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PERSONA_NNS_FINDINGS": str(FINDINGS),
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "TOKENIZERS_PARALLELISM": "false",
    "TTY_COMPATIBLE": "0",
    "_TYPER_FORCE_DISABLE_TERMINAL": "1",
}

project = "persona_nns"
author = "the persona_nns developers"
release = metadata.version("persona-nns")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "command_line",
    "preloaded",
    "rooms",
    "streams",
]
exclude_patterns = ["_build"]

html_theme = "pydata_sphinx_theme"
html_title = "persona_nns"
html_show_sourcelink = False
html_theme_options = {
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "navigation_with_keys": True,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "use_edit_page_button": False,
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}
html_sidebars = {page: [] for page in ("findings", "paper", "start", "words")}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_merge_streams = True
nb_number_source_lines = False

autodoc_preserve_defaults = True
autodoc_typehints = "signature"
default_role = "py:obj"  # what docstrings name between single backticks
autodoc_member_order = "alphabetical"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

_others = {
    "matplotlib": "https://matplotlib.org/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "transformers": "https://huggingface.co/docs/transformers/main/en/",
    "xarray": "https://docs.xarray.dev/en/stable/",
}
intersphinx_mapping = {
    name: (address, None) for name, address in _others.items() if _answers(address)
}
