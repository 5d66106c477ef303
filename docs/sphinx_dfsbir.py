"""The Sphinx extension behind the site: modules and notebooks as pages, names in code as links.

- A module of the package is a source file like any other: `dfsbir/x.py` becomes its API page.
- Notebooks are shown as they were saved; hidden cells and nbdev's directives are taken out.
- Inline code that is a public name leads to its API page, wherever it stands.
- `packages.toml`, beside the settings, has a line on each folder of the package.
"""

import json
import posixpath
import re
import tomllib
from collections import Counter
from pathlib import Path

import api_pages
from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.addnodes import pending_xref
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

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


def read_about(app) -> None:
    "What `packages.toml` says of each folder of the package; a folder without a line is a fault."
    file = Path(app.confdir, "packages.toml")
    app.about = tomllib.loads(file.read_text(encoding="utf-8"))
    top = Path(app.srcdir, app.config.api_package)
    folders = {path.parent.name for path in top.glob("*/__init__.py")}
    for folder in sorted(folders ^ set(app.about)):
        found = "no line about" if folder in folders else "a line about a folder that is not there:"
        log.warning("%s has %s %s", file.name, found, folder)


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


def write_package(path: Path, docname: str, about: dict) -> str:  # path of its __init__.py
    "The page of a package: a table of its modules, and their pages in the sidebar."
    here = posixpath.dirname(docname)
    name = dotted(docname)
    lines = [f"# {name}", "", about.get(name.partition(".")[2], ""), ""]
    lines += [f"```{{py:module}} {name}", "```", ""]
    rows, pages = [], []
    for file in pages_of_package(path.parent):
        page = file.with_suffix("").relative_to(path.parent).as_posix()
        words = about.get(file.parent.name, "")
        if file.name != "__init__.py":
            words = api_pages.read_module(file, "").doc
        link = f"[{dotted(f'{here}/{page}')}](/{here}/{page}.py)"
        rows.append(f"| {link} | {api_pages.escape(first_sentence(words))} |")
        pages.append(page)
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
            text = write_package(path, env.docname, env.app.about)
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


class NotebookTree(SphinxDirective):
    "`{notebooks} FOLDER`: links to the notebooks under a folder, a heading per folder."

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        top = self.arguments[0]
        sections = {}
        for page in sorted(self.env.found_docs):
            if self.is_notebook(page, top):
                sections.setdefault(self.section(page, top), []).append(f"/{page}")
        about = self.env.app.about
        lines = []
        for section in sorted(sections):
            title = re.sub(r"^\d+_", "", posixpath.relpath(section, top))
            lines += [f"## {'To open first' if title == '.' else title}", "", about.get(title, "")]
            lines += ["", "```{toctree}", ":titlesonly:", "", *sections[section], "```", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)

    def section(self, page: str, top: str) -> str:
        "The folder of a notebook; a numbered one outside of the folders is a section of its own."
        folder = posixpath.dirname(page)
        return page if folder == top and posixpath.basename(page)[0].isdigit() else folder

    def is_notebook(self, page: str, top: str) -> bool:
        "Whether a page is a notebook of the folder."
        return page.startswith(f"{top}/") and str(self.env.doc2path(page)).endswith(".ipynb")


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
    app.add_directive("notebooks", NotebookTree)
    app.connect("builder-inited", read_about)
    app.connect("builder-inited", collect_names)
    app.connect("source-read", prepare_source)
    app.connect("doctree-read", link_names)
    app.connect("build-finished", write_front)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
