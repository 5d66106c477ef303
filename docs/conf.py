"""Settings of the documentation: `./run docs` builds it into _docs/html, without a network."""

import sys
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))  # the extension beside this file

parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

project = settings["title"]
author = settings["author"]
copyright = settings["copyright"]
version = release = settings["version"]
api_package = settings["lib_path"]

# The sources are the repository itself: README, guides, notebooks, modules, change log.
root_doc = "README"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_dfsbir"]
PAGES = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
FOLDERS = {"docs", settings["nbs_path"], settings["lib_path"]}
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in PAGES | FOLDERS]
exclude_patterns += [
    "docs/*.py",
    "docs/contents.md",
    "**/_modidx.py",
    "**/.ipynb_checkpoints",
    "**/runs",
    "**/__pycache__",
]

# A broken link is an error: the build runs with -W.
nitpicky = True
suppress_warnings = []

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # widgets are shown as text: their scripts would come from the network
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_dmath_double_inline = True  # $$ inside a paragraph
myst_heading_anchors = 3

smartquotes = False  # "auto" in a comment is a value

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# MathJax from its package: one file that needs no other.
MATHJAX = (
    Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax" / "tex-svg.js"
)
html_static_path.append(str(MATHJAX))
mathjax_path = MATHJAX.name
