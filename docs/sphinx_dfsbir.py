"""The Sphinx extension behind the site: modules and notebooks as pages, names in code as links.

- A module of the package is a source file like any other: `dfsbir/x.py` becomes its API page.
- Notebooks are shown as they were saved; hidden cells and nbdev's directives are taken out.
- Inline code that is a public name leads to its API page, wherever it stands.
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


def write_package(path: Path, docname: str, text: str) -> str:  # its __init__.py
    "The page of a package: a table of its modules, and their pages in the sidebar."
    here = posixpath.dirname(docname)
    parts = sorted(
        p for p in path.parent.iterdir() if p.suffix == ".py" and not p.name.startswith("_")
    )
    parts += sorted(p.parent for p in path.parent.glob("*/__init__.py"))
    name = dotted(docname)
    lines = [f"# {name}", "", api_pages.parse_module(text, "").doc, ""]
    lines += [f"```{{py:module}} {name}", "```", ""]
    rows, pages = [], []
    for part in parts:
        file = part / "__init__.py" if part.is_dir() else part
        page = file.with_suffix("").relative_to(path.parent).as_posix()
        about = api_pages.read_module(file, "").doc or ", ".join(
            p.stem for p in sorted(part.glob("[a-z]*.py"))
        )
        link = f"[{dotted(f'{here}/{page}')}](/{here}/{page}.py)"
        rows.append(f"| {link} | {api_pages.escape(first_sentence(about))} |")
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
            text = write_package(path, env.docname, inputstring)
        else:
            module = api_pages.parse_module(inputstring, dotted(env.docname))
            for entry in module.undocumented:
                log.warning(
                    "public, and without a docstring: %s",
                    entry.name,
                    location=(env.docname, entry.line),
                )
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
        pages = [name for name in self.env.found_docs if self.is_notebook(name, top)]
        lines = []
        for folder in sorted({posixpath.dirname(page) for page in pages}):
            title = re.sub(r"^\d+_", "", posixpath.relpath(folder, top)).replace(
                ".", "To open first"
            )
            inside = sorted(f"/{page}" for page in pages if posixpath.dirname(page) == folder)
            lines += [f"## {title}", "", "```{toctree}", ":titlesonly:"]
            lines += ["", *inside, "```", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)

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
            link = pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refdoc=app.env.docname,
                refwarn=True,
            )
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
    app.connect("builder-inited", collect_names)
    app.connect("source-read", prepare_source)
    app.connect("doctree-read", link_names)
    app.connect("build-finished", write_front)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
