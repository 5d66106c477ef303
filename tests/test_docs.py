"""The documentation builds without a warning, is complete, loads nothing from elsewhere."""

import ast
import importlib.machinery
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "docs"))
from api_pages import parse_module, write_module

LIBRARY = sorted(p for p in (ROOT / "dfsbir").rglob("*.py") if not p.name.startswith("_"))
HIDDEN = {".ipynb_checkpoints", "runs"}
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not HIDDEN & set(p.parts))
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name != "contents.md")


def short(path):
    return path.relative_to(ROOT).as_posix()


def build(top, out):
    "What `./run docs` runs, for the sources in `top`, with everything written under `out`."
    loader = importlib.machinery.SourceFileLoader("dfsbir_run", str(ROOT / "run"))
    run = importlib.util.module_from_spec(importlib.util.spec_from_loader("dfsbir_run", loader))
    loader.exec_module(run)
    line = [str(word) for word in run.command("docs", [])]
    assert line[1:3] == ["-m", "sphinx"]
    words = [re.sub(r"^_docs\b", str(out), word) for word in line[1:]]
    return subprocess.run(
        [sys.executable, *words], cwd=top, capture_output=True, text=True, timeout=600
    )


# ---- the site: what is missing or wrong in it, in words


def page_of(site, path):
    "The HTML of a source file; empty where there is none."
    page = site / path.relative_to(ROOT).with_suffix(".html")
    return page.read_text(encoding="utf-8") if page.is_file() else ""


def missing_pages(site):
    "Sources without a page, or whose page has no title."
    yield from (
        f"{short(p)} has no page"
        for p in [ROOT / "README.md", *PAGES, *NOTEBOOKS, *LIBRARY]
        if "<h1>" not in page_of(site, p)
    )
    if "README.html" not in (site / "index.html").read_text(encoding="utf-8"):
        yield "index.html does not lead to the README"


def missing_outputs(site):
    "Notebooks whose stored pictures are not all shown."
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        shown = [
            cell
            for cell in cells
            if not re.search(r"^#\|\s*hide\b", "".join(cell["source"]), re.MULTILINE)
        ]
        outputs = [output for cell in shown for output in cell.get("outputs", [])]
        page, pictures = (
            page_of(site, path),
            sum("image/png" in output.get("data", {}) for output in outputs),
        )
        if outputs and 'class="cell_output' not in page or page.count("<img") < pictures:
            yield f"{short(path)}: {len(outputs)} outputs, {pictures} pictures, not all shown"


def missing_names(site):
    "Public names without an entry on the page of their module."
    for path in LIBRARY:
        page, module = page_of(site, path), ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [
            n.value
            for n in tree.body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
        ]
        names = [name for value in public for name in ast.literal_eval(value)]
        if not names:
            yield f"{module} has no public names"
        yield from (
            f"{module}.{name} is on no page"
            for name in names
            if f'id="{module}.{name}"' not in page
        )


def search_faults(site):
    "A page without a search box, a source that the search does not know."
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    if not (site / "search.html").is_file() or not re.search(
        r'<input[^>]*name="q"', page_of(site, ROOT / "README.md")
    ):
        yield "there is no search box"
    for path in LIBRARY + NOTEBOOKS:
        if f'"{path.relative_to(ROOT).with_suffix("").as_posix()}"' not in index:
            yield f"{short(path)} is not in the search index"


def loads_from_elsewhere(site):
    "Scripts, styles, pictures and fonts that are not files of the site; links may lead out."
    remote = r"""(?:src|href)=["']?(?:https?:)?//"""
    for path in site.rglob("*.html"):
        tags = re.findall(
            r"<(?:script|link|img|iframe|source|video)\b[^>]*>", path.read_text(encoding="utf-8")
        )
        yield from (f"{path.name}: {tag[:150]}" for tag in tags if re.search(remote, tag))
    for path in site.rglob("*.css"):
        found = re.findall(
            r"url\(\W?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*", path.read_text(encoding="utf-8")
        )
        yield from (f"{path.name}: {words}" for words in found)


def mathematics_faults(site):
    "Formulas without the script that draws them."
    pages = [
        path for path in site.rglob("*.html") if 'class="math' in path.read_text(encoding="utf-8")
    ]
    if not pages or not (site / "_static" / "tex-svg.js").is_file():
        yield "there are no formulas, or their script is absent"
    yield from (
        f"{path.name} has formulas and no script"
        for path in pages
        if "tex-svg.js" not in path.read_text(encoding="utf-8")
    )


CHECKS = (
    missing_pages,
    missing_outputs,
    missing_names,
    search_faults,
    loads_from_elsewhere,
    mathematics_faults,
)


def test_the_site(tmp_path):
    "Built once, for it takes half a minute."
    assert LIBRARY and NOTEBOOKS and PAGES
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not [fault for check in CHECKS for fault in check(tmp_path / "html")]


# ---- what is wrong is seen


NOTEBOOK = {
    "cells": [],
    "metadata": {
        "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
    },
    "nbformat": 4,
    "nbformat_minor": 5,
}
MODULE = '''"""A module."""

__all__ = ["find"]

# %% ../../nbs/00_part/00_a.ipynb #0a0a0a0a
def find(x: int = 1):  # a number
    "A function."
'''
SETTINGS = {"lib_path": "dfsbir", "nbs_path": "nbs", "title": "t", "author": "a", "copyright": "c"}
README = "# Title\n\n[Notebook](nbs/00_part/00_a.ipynb), `dfsbir.part.a.find`, `find()`.\n"
PART = "# part\n\nWhat a part is for.\n\n```{toctree}\n:glob:\n\n/nbs/00_part/*\n```\n"
MINIATURE = {
    "settings.ini": "[DEFAULT]\nversion = 1\n"
    + "".join(f"{k} = {v}\n" for k, v in SETTINGS.items()),
    "README.md": README,
    "docs/contents.md": "\n```{toctree}\ndocs/notebooks/part\ndfsbir/__init__\n```\n",
    "dfsbir/__init__.py": "",
    "dfsbir/part/__init__.py": "",
    "dfsbir/part/a.py": MODULE,
    "docs/notebooks/part.md": PART,
}


def miniature(top, **changes):
    "A small project with the real settings and extension of the documentation."
    for name in ("docs/notebooks", "dfsbir/part", "nbs/00_part"):
        (top / name).mkdir(parents=True)
    for path in (ROOT / "docs").glob("*.py"):
        shutil.copy(path, top / "docs")
    shutil.copytree(ROOT / "docs" / "_static", top / "docs" / "_static")
    for name, text in {**MINIATURE, **changes}.items():
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).write_text(text, encoding="utf-8")
    code = {
        "cell_type": "code",
        "id": "0a0a0a0a",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
    }
    cells = [
        {"cell_type": "markdown", "id": "1", "metadata": {}, "source": "# A notebook"},
        {**code, "source": "#| export\ndef find(): ..."},
        {**code, "id": "2", "source": "#| hide\nsecret = 1"},
    ]
    (top / "nbs/00_part/00_a.ipynb").write_text(
        json.dumps({**NOTEBOOK, "cells": cells}), encoding="utf-8"
    )
    return top


def test_a_small_project_builds(tmp_path):
    done = build(miniature(tmp_path / "top"), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    readme = (tmp_path / "out/html/README.html").read_text(encoding="utf-8")
    assert readme.count('href="dfsbir/part/a.html#dfsbir.part.a.find"') == 2, (
        "names in code are links"
    )
    notebook = (tmp_path / "out/html/nbs/00_part/00_a.html").read_text(encoding="utf-8")
    assert "secret" not in notebook and "export" not in notebook
    (cell,) = re.findall(r'id="(\S*0a0a0a0a)"', notebook)
    page = (tmp_path / "out/html/dfsbir/part/a.html").read_text(encoding="utf-8")
    assert f'href="../../nbs/00_part/00_a.html#{cell}"' in page
    for path in ("dfsbir/__init__", "dfsbir/part/__init__", "docs/notebooks/part"):
        index = (tmp_path / f"out/html/{path}.html").read_text(encoding="utf-8")
        assert "What a part is for" in index, f"{path} does not say what the folder holds"


FAULTS = {
    "README.md": """# Title

[a](docs/lost.md), [b](nbs/00_part/00_a.ipynb#no-such-heading), `dfsbir.part.gone`
""",
    "docs/alone.md": "# In no table of contents\n",
    "dfsbir/unexplained/__init__.py": "",
    "dfsbir/unexplained/b.py": MODULE.replace("find", "seek"),
    "dfsbir/part/a.py": MODULE.replace('"A function."', "pass"),
}


def test_faults_fail_the_build(tmp_path):
    "A lost link, name or docstring, a page in no contents, a folder that nothing describes."
    done = build(miniature(tmp_path / "top", **FAULTS), tmp_path / "out")
    assert done.returncode == 1
    for fault in (
        "docs/lost.md",
        "no-such-heading",
        "dfsbir.part.gone",
        "alone.md",
        "without a docstring: find",
        "unexplained.md is missing",
    ):
        assert fault in done.stderr, f"{fault} was not seen in {done.stderr}"


# ---- parameter tables

SOURCE = '''
"""About."""
__all__ = ["one", "Thing", "Settings", "LIMIT", "bare"]
LIMIT = 3  # of things

def one(
    x: Tensor,  # (N,3,H,W) in [0,1]
    # above it,
    # in two lines
    scale: float | None = None,
    *,
    names=("a", "b"),  # `code|here`
) -> Tensor:  # (N,D)
    "Does one thing."

class Thing(Base):
    "A thing."

    def __init__(self, size: int):  # side, px
        pass

    def grow(self, by=1):  # how much
        "Larger."

    @property
    def area(self) -> int:  # px
        "Its area."

    @area.setter
    def area(self, value): ...

class Settings(BaseModel):
    "Settings."
    rate: float = Field(1e-3, gt=0, description="of Adam")
    steps: int = 5  # of it
    name: str

def bare(a, b): return a  # not one parameter's
'''


@pytest.fixture(scope="module")
def entries():
    return {e.name: e for e in parse_module(SOURCE, "m").entries}


def rows(entry):
    return [(p.name, p.type, p.default, p.comment) for p in entry.parameters]


def test_comments_become_a_table(entries):
    one = entries["one"]
    assert one.doc == "Does one thing." and one.returns == ("Tensor", "(N,D)")
    assert one.signature == '(x, scale=None, *, names=("a", "b"))'
    assert rows(one) == [
        ("x", "Tensor", "", "(N,3,H,W) in [0,1]"),
        ("scale", "float | None", "None", "above it, in two lines"),
        ("names", "", '("a", "b")', "`code|here`"),
    ]


def test_classes(entries):
    thing = entries["Thing"]
    assert rows(thing) == [("size", "int", "", "side, px")] and thing.bases == ["Base"]
    grow, area = thing.members
    assert (grow.kind, rows(grow)) == ("method", [("by", "", "1", "how much")])
    assert (area.kind, area.returns) == ("property", ("int", "px"))


def test_fields_of_models_and_dataclasses(entries):
    assert rows(entries["Settings"]) == [
        ("rate", "float", "0.001", "of Adam (> 0)"),
        ("steps", "int", "5", "of it"),
        ("name", "str", "", ""),
    ]


def test_constants_and_shared_lines(entries):
    assert (entries["LIMIT"].value, entries["LIMIT"].doc) == ("3", "of things")
    assert [p.comment for p in entries["bare"].parameters] == ["", ""] and entries["bare"].returns[
        1
    ] == "not one parameter's"


def test_what_has_no_docstring_is_named():
    assert [e.name for e in parse_module(SOURCE, "m").undocumented] == ["bare"]


def test_a_page_escapes_what_markdown_would_read():
    page = write_module(
        parse_module(SOURCE.replace("side, px", "a*b*c | <d> $e$"), "m"), lambda *args, **kw: ""
    )
    assert "a\\*b\\*c \\| \\<d\\> \\$e\\$" in page and "`code\\|here`" in page


def test_guides_are_files_of_the_repository():
    "Nothing under docs/ is made by the build."
    done = subprocess.run(
        ["git", "status", "--porcelain", "--ignored", "docs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    made = [
        line
        for line in done.stdout.splitlines()
        if line.startswith("!!") and "__pycache__" not in line
    ]
    assert done.returncode or not made
