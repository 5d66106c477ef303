"""The Sphinx extension behind the site: modules and notebooks as pages, names in code as links.

- A module of the package is a source file like any other: `dfsbir/x.py` becomes its API page.
- Notebooks are shown as they were saved; hidden cells and nbdev's directives are taken out.
- Inline code that is a public name leads to its API page, wherever it stands.
- What a folder of the package holds is the first paragraph of its page in `notebooks/`.
"""

import json
import posixpath
import re
from collections import Counter
from pathlib import Path

import api_pages
from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.addnodes import pending_xref
from sphinx.util import logging

log = logging.getLogger(__name__)


# ---- modules


def dotted(docname: str) -> str:  # "dfsbir/core/types" or "dfsbir/core/__init__"
    "The module behind a page."
    return docname.removesuffix("/__init__").replace("/", ".")


def cell_label(notebook: str, cell: str) -> str:  # "00_core/00_types.ipynb", "1a2b3c4d"
    "The label of an exported cell."
    return f"{Path(notebook).stem}-{cell}"


def first_sentence(text: str) -> str:
    "The first sentence of a docstring, for a table."
    return re.split(r"(?<=[.]) ", " ".join(text.split()))[0].rstrip(".")


def describe(folder: str, env) -> str:
    "The first paragraph of a folder's page, as nbdev keeps the folder's `__init__.py` empty."
    page = Path(env.app.confdir, "notebooks", f"{folder}.md")
    if not page.is_file():
        log.warning("nothing says what the folder %s holds: %s is missing", folder, page.name)
        return ""
    _, paragraph, *_ = page.read_text(encoding="utf-8").split("\n\n")
    return paragraph


def pages_of_package(folder: Path) -> list[Path]:
    "Modules and folders of a package, in the order of the notebooks that they come from."
    files = [p for p in folder.rglob("*.py") if not p.name.startswith("_")]
    first = {}
    for file in files:
        module = api_pages.read_module(file, "")
        part = file.relative_to(folder).parts[0]
        page = folder / part if file.parent == folder else folder / part / "__init__.py"
        notebook = module.places[0][1] if module.places else part
        first[page] = min(notebook, first.get(page, notebook))
    return sorted(first, key=first.get)


def write_package(path: Path, docname: str, env) -> str:  # path of its __init__.py
    "The page of a package: a table of its modules, and their pages in the sidebar."
    here = posixpath.dirname(docname)
    name = dotted(docname)
    folder = name.partition(".")[2]
    lines = [f"# {name}", "", describe(folder, env) if folder else "", ""]
    lines += [f"```{{py:module}} {name}", "```", ""]
    rows, pages = [], []
    for file in pages_of_package(path.parent):
        page = file.with_suffix("").relative_to(path.parent).as_posix()
        if file.name == "__init__.py":
            words = describe(file.parent.name, env)
        else:
            words = api_pages.read_module(file, "").doc
        link = f"[{dotted(f'{here}/{page}')}](/{here}/{page}.py)"
        rows.append(f"| {link} | {api_pages.escape(first_sentence(words))} |")
        pages.append(f"{page.removesuffix('/__init__')} <{page}>")
    lines += ["| module | what it holds |", "|---|---|", *rows, ""]
    lines += ["```{toctree}", ":hidden:", ":titlesonly:", "", *pages, "```", ""]
    return "\n".join(lines)


class ModuleParser(MystParser):
    "Reads a Python module as its API page."

    supported = ("python",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        env = document.settings.env
        path = Path(env.doc2path(env.docname))
        if path.name == "__init__.py":
            text = write_package(path, env.docname, env)
        else:
            module = api_pages.parse_module(inputstring, dotted(env.docname))
            for entry in module.undocumented:
                place = (env.docname, entry.line)
                log.warning("public, and without a docstring: %s", entry.name, location=place)
            text = api_pages.write_module(module, lambda place, **kw: source_link(place, env, **kw))
        super().parse(text, document)


def source_link(place: tuple[str, str] | None, env, whole: bool = False) -> str:
    "A link from the API to the cell that a definition stands in, or to the notebook."
    if place is None:
        return ""
    notebook, cell = place
    if whole:
        return f"Written in the notebook [{notebook}](/{notebook})."
    return f"[Source](#{cell_label(notebook, cell)})"


# ---- notebooks


DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp)\b", re.MULTILINE)


def prepare_notebook(text: str, name: str) -> str:
    "A notebook's JSON without what is hidden, and a label before each exported cell."
    notebook = json.loads(text)
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and HIDDEN.search(source):
            continue
        if cell["cell_type"] == "code":
            if re.search(r"^#\|\s*exporti?\b", source, re.MULTILINE):
                cells.append(label_cell(cell_label(name, cell["id"])))
            cell["source"] = DIRECTIVE.sub("", source)
        cells.append(cell)
    notebook["cells"] = cells
    return json.dumps(notebook)


def label_cell(label: str) -> dict:
    "A Markdown cell that is a target for links."
    return {"cell_type": "markdown", "id": label, "metadata": {}, "source": f"({label})="}


def prepare_source(app, docname: str, source: list[str]) -> None:
    "Called by Sphinx with each source text before it is parsed."
    if str(app.env.doc2path(docname)).endswith(".ipynb"):
        source[0] = prepare_notebook(source[0], posixpath.basename(docname))
    if docname == app.config.root_doc:
        source[0] += Path(app.confdir, "contents.md").read_text(encoding="utf-8")


# ---- names


def collect_names(app) -> None:
    "Public names -> full names; those of two modules are left out."
    top = Path(app.srcdir, app.config.api_package)
    app.api_modules = api_pages.read_package(top)
    full = [
        (e.name, f"{name}.{e.name}")
        for name, path in app.api_modules.items()
        for e in api_pages.read_module(path, name).entries
    ]
    count = Counter(name for name, _ in full)
    app.api_names = {name: target for name, target in full if count[name] == 1 and len(name) > 2}
    folders = {name.rpartition(".")[0] for name in app.api_modules}
    app.api_full = {target for _, target in full} | set(app.api_modules) | folders


def link_names(app, doctree: nodes.document) -> None:
    "Turns inline code that is a public name into a link to its API page."
    for literal in list(doctree.findall(nodes.literal)):
        if isinstance(literal.parent, (nodes.title, nodes.reference, pending_xref)):
            continue
        text = literal.astext().removesuffix("()")
        target = app.api_names.get(text)
        if text.startswith(f"{app.config.api_package}."):
            target = text
            if text not in app.api_full:
                log.warning("there is no %s in the package", text, location=literal)
        if target in app.api_full:
            of_python = {"refdomain": "py", "reftype": "obj", "refwarn": True}
            link = pending_xref("", reftarget=target, refdoc=app.env.docname, **of_python)
            literal.replace_self(link)
            link += literal


def write_front(app, error) -> None:
    "`index.html`, which leads to the first page."
    if error is None and app.builder.format == "html":
        page = f"{app.config.root_doc}.html"
        text = f'<!doctype html><meta http-equiv="refresh" content="0; url={page}">'
        Path(app.outdir, "index.html").write_text(f'{text}<a href="{page}">{page}</a>\n')


def setup(app) -> dict:
    "Called by Sphinx."
    app.add_config_value("api_package", "", "env")
    app.add_source_suffix(".py", "python")
    app.add_source_parser(ModuleParser)
    app.connect("builder-inited", collect_names)
    app.connect("source-read", prepare_source)
    app.connect("doctree-read", link_names)
    app.connect("build-finished", write_front)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
