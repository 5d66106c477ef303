"""The workspace's rules: notebooks and package agree, imports go one way, settings fit together."""

import ast
import configparser
import importlib
import json
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT, SLOW, TESTS
from packaging.requirements import Requirement
from packaging.version import Version

NUMBERED = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
NUMBERED += sorted((ROOT / "nbs").glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb"))
NOTEBOOKS = [
    path
    for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if not re.search(r"/(\.|_|runs/)", path.relative_to(ROOT).as_posix())
]
MODULES = sorted(
    path
    for path in (ROOT / "dfsbir").rglob("*.py")
    if path.name not in ("__init__.py", "_modidx.py")
)
SCRIPTS = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "docs").glob("*.py"))
SCRIPTS += [ROOT / "setup.py", ROOT / "run"]


def module_of(path):
    "The module that a library notebook exports, told from its place: 01_data/04_toy is data.toy."
    parts = path.relative_to(ROOT / "nbs").with_suffix("").parts
    return ".".join(part[3:] for part in parts)


def place_of(path):
    "A library notebook's place in the order of imports: the numbers of its folder and of itself."
    return tuple(int(part[:2]) for part in path.relative_to(ROOT / "nbs").parts)


NOTEBOOK = {module_of(path): path for path in NUMBERED}
NUMBER = {name: place_of(path) for name, path in NOTEBOOK.items()}


def name_of(path):
    "The dotted name of an exported module, without the package's."
    return ".".join(path.relative_to(ROOT / "dfsbir").with_suffix("").parts)


def settings(top=ROOT):
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(top / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def requirements(key):
    return [Requirement(line) for line in settings()[key].splitlines() if line.strip()]


def canonical(name):
    "A distribution's name as the index spells it."
    return re.sub(r"[-_.]+", "-", name).lower()


def short(path):
    "A path as it is seen from the top of the repository."
    return str(path.relative_to(ROOT))


def cells(path, kind):
    "The sources of a notebook's cells of one kind."
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


# ---- notebooks and package agree


def snapshot(top):
    return {
        str(path.relative_to(top)): path.read_bytes()
        for folder in ("nbs", "dfsbir")
        for path in sorted((top / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def nbdev(tree, env, *commands):
    for command in commands:
        done = subprocess.run(
            [Path(sys.executable).with_name(command)],
            cwd=tree,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"


def test_export_and_clean_leave_no_diff(tree, elsewhere):
    before = snapshot(tree)
    nbdev(tree, elsewhere, "nbdev_export", "nbdev_clean")
    after = snapshot(tree)
    changed = [
        name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)
    ]
    assert not changed, f"run nbdev_export and nbdev_clean (./run exec ...): {changed} would change"


def test_export_and_clean_see_a_difference(tree, elsewhere):
    "The check above can fail: an edited module is restored, a count removed, a tag kept."
    module = tree / "dfsbir" / "core" / "types.py"
    notebook = tree / "nbs" / "00_core" / "00_types.ipynb"
    was = module.read_bytes()
    module.write_bytes(was + b"\nedited = True\n")
    content = json.loads(notebook.read_text(encoding="utf-8"))
    first = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
    first["execution_count"], first["metadata"] = 7, {"tags": ["parameters"], "scrolled": True}
    notebook.write_text(json.dumps(content), encoding="utf-8")
    nbdev(tree, elsewhere, "nbdev_export", "nbdev_clean")
    assert module.read_bytes() == was
    first = next(
        cell
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    )
    assert first["execution_count"] is None and first["metadata"] == {"tags": ["parameters"]}


def test_every_module_has_its_notebook():
    for name, path in NOTEBOOK.items():
        text = "\n".join(cells(path, "code"))
        found = re.findall(r"^#\|\s*default_exp\s+(\S+)", text, re.MULTILINE)
        assert found == [name], f"{short(path)} should export {name}, once; found {found}"
    assert sorted(NOTEBOOK) == sorted(name_of(path) for path in MODULES)


def test_a_folder_has_one_number():
    "Places in the order of imports are unique: of folders, and of the notebooks in one folder."
    folders = [path.name[:2] for path in (ROOT / "nbs").glob("[0-9][0-9]_*")]
    assert len(set(folders)) == len(folders)
    assert len(set(NUMBER.values())) == len(NUMBER)


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_module_is_exported(path):
    head = path.read_text(encoding="utf-8")[:2000]
    source = short(NOTEBOOK[name_of(path)])
    mark = "# AUTOGENERATED! DO NOT EDIT! File to edit: "
    assert re.search(rf"{re.escape(mark)}(\.\./)+{re.escape(source)}\.", head)


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_no_long_line_is_exported(path):
    "The list __all__ alone is excepted: nbdev writes and wraps it."
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^__all__ = \[.*?\]$", "", text, count=1, flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 100]
    assert not long, f"lines over 100 characters: {long}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=short)
def test_names_that_a_notebook_imports_are_there(path):
    "Not every notebook runs in every test, and a name that moved is seen at once."
    missing = []
    for source in cells(path, "code"):
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        for node in ast.walk(ast.parse("\n".join(lines))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("dfsbir"):
                continue
            module = importlib.import_module(node.module)
            missing += [
                f"{node.module}.{n.name}" for n in node.names if not hasattr(module, n.name)
            ]
    assert not missing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=short)
def test_notebook_form(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"].get("kernelspec", {}).get("name") == "python3", (
        "every machine has the kernel python3, no other name is sure"
    )
    assert path.stat().st_size <= 500_000, (
        f"{path.stat().st_size} bytes: fewer or smaller pictures (dpi 70)"
    )
    assert cells(path, "markdown"), "a notebook has prose"
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    errors = [output["ename"] for output in outputs if output["output_type"] == "error"]
    assert not errors, f"committed with a failed cell: {errors}"
    assert "widgets" not in notebook["metadata"], "progress bars teach nothing: clear that output"


@pytest.mark.parametrize("path", NUMBERED, ids=short)
def test_a_title_and_one_line_that_becomes_the_docstring(path):
    first = cells(path, "markdown")[0]
    title = re.match(r"# (\S.*)\n\n> (\S.*)(?:\n|$)", first)
    assert title, f"wanted '# Title', an empty line and '> subtitle'; found {first[:200]!r}"
    assert len(title[2]) <= 94, f"{len(title[2])} characters make a docstring over 100: {title[2]}"


def test_tests_mirror_the_package():
    "A folder of tests has the name of the folder of the package or of nbs that it is about."
    folders = {path.parent for path in TESTS.rglob("test_*.py")} - {TESTS}
    known = {name.partition(".")[0] for name in NOTEBOOK} | {"experiments"}  # of nbs/experiments
    assert {folder.name for folder in folders} <= known


def test_slow_tests_exist():
    "Those that conftest.py starts first; a renamed file would run last unnoticed."
    assert not [name for name in SLOW if not (TESTS / name).exists()]


# ---- imports go one way


def imports(tree, package="dfsbir"):
    """(module, names or None, line, nested) of each import of a module in `package`; relative
    ones are given their whole name."""
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno, id(node) not in top
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join(filter(None, [*base, node.module or ""]))
            yield module, [alias.name for alias in node.names], node.lineno, id(node) not in top


def package_of(name):
    "The package that holds a module: of data.toy it is dfsbir.data."
    return ".".join(["dfsbir", *name.split(".")[:-1]])


def import_faults(source, name, number):
    "What in a module's imports breaks the order: `number` maps each module to its place."
    for module, names, line, _ in imports(ast.parse(source), package_of(name)):
        if module.split(".")[0] != "dfsbir":
            continue
        other = module.partition(".")[2]
        if module == "dfsbir" and names == ["__version__"]:
            continue
        if names is None or names == ["*"] or not other:
            yield f"line {line}: import named things from a module (from dfsbir.x import a, b)"
        elif other not in number or number[other] >= number[name]:
            yield f"line {line}: {name} imports from {other}, which does not come before it"


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_imports_from_lower_numbers_only(path):
    assert not list(import_faults(path.read_text(encoding="utf-8"), name_of(path), NUMBER))


@pytest.mark.parametrize(
    "source",
    [
        "from .c import x",
        "from dfsbir.p.b import x",
        "from ..q.a import x",
        "import dfsbir.p.a",
        "from .a import *",
        "from . import a",
        "def f():\n    from dfsbir.p.c import x",
    ],
)
def test_import_faults_are_seen(source):
    number = {"p.a": (0, 0), "p.b": (0, 1), "p.c": (0, 2), "q.a": (1, 0)}
    assert list(import_faults(source, "p.b", number))
    good = "from .a import x\nfrom dfsbir import __version__\nimport torch"
    assert not list(import_faults(good, "p.b", number))
    assert not list(import_faults("from ..p.c import x", "q.a", number))


@cache
def distributions(*keys):
    "The import names that the requirements under these settings bring, as installed here."
    wanted = {canonical(r.name) for key in keys for r in requirements(key)}
    found = metadata.packages_distributions().items()
    return {module for module, names in found if wanted & set(map(canonical, names))}


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_modules_import_what_the_package_requires(path):
    """At the top of a module its requirements alone, inside a function also the extras.

    An extra may be absent. The widgets of explore are an extra of that folder's own.
    """
    own = ["explore_requirements"] if name_of(path).startswith("explore.") else []
    top = distributions("requirements", *own) | set(sys.stdlib_module_names) | {"dfsbir"}
    extras = [key for key in settings() if key.endswith("_requirements")]
    extras.remove("dev_requirements")
    anywhere = top | distributions(*extras)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [
        f"line {line}: {module}"
        for module, _, line, nested in imports(tree, package_of(name_of(path)))
        if module.split(".")[0] not in (anywhere if nested else top)
    ]
    assert not wrong, f"not in settings.ini: {wrong}"
    assert not {"fastcore", "nbdev", "execnb", "IPython"} & anywhere


# ---- unsafe habits


UNSAFE_CALLS = ("eval", "exec", "pickle.load", "pickle.loads", "os.system")


def does_nothing(step):
    "Whether a statement is `pass` or a bare constant."
    constant = isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)
    return constant or isinstance(step, ast.Pass)


def fault_of_handler(handler):
    "What is wrong with an `except`, or None."
    if handler.type is None:
        return "bare except"
    broad = ast.unparse(handler.type) in ("Exception", "BaseException")
    if broad and all(map(does_nothing, handler.body)):
        return "an error of any kind is swallowed"
    return None


def fault_of_call(call):
    "What is wrong with a call, or None."
    name = ast.unparse(call.func)
    if name.endswith(".cuda"):
        return ".cuda(): the device comes from the tensors or the config"
    if name == "torch.load" and not any(k.arg == "weights_only" for k in call.keywords):
        return "torch.load without weights_only"
    copies = name == "pickle.loads" and ast.unparse(call.args[0]).startswith("pickle.dumps(")
    if name in UNSAFE_CALLS and not copies:
        return name
    return None


def habits(source):
    "Unsafe habits in Python source, by line."
    for node in ast.walk(ast.parse(source)):
        fault = None
        if isinstance(node, ast.ExceptHandler):
            fault = fault_of_handler(node)
        elif isinstance(node, ast.Call):
            fault = fault_of_call(node)
        if fault:
            yield f"line {node.lineno}: {fault}"


def python_of(path):
    "The Python of a module, script or notebook (cell by cell), with IPython's own lines left out."
    if path.suffix != ".ipynb":
        return [path.read_text(encoding="utf-8")]
    return [
        re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)
        for source in cells(path, "code")
        if not source.startswith("%%")
    ]


@pytest.mark.parametrize("path", MODULES + NOTEBOOKS + SCRIPTS, ids=short)
def test_no_unsafe_habits(path):
    assert not [fault for source in python_of(path) for fault in habits(source)]


@pytest.mark.parametrize(
    "source",
    [
        "try: f()\nexcept: g()",
        "try: f()\nexcept Exception: pass",
        "x.cuda()",
        "net.to(d).cuda(0)",
        "torch.load(p)",
        "eval('1')",
        "pickle.load(f)",
        "pickle.loads(b)",
    ],
)
def test_unsafe_habits_are_seen(source):
    assert len(list(habits(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "try: f()\nexcept ValueError: pass",
        "try: f()\nexcept Exception as e: raise RuntimeError from e",
        "net.eval()",
        "pickle.loads(pickle.dumps(x))",
        "torch.cuda.is_available()",
        "torch.load(p, weights_only=True)",
    ],
)
def test_habits_leave_good_code_alone(source):
    assert not list(habits(source))


@pytest.mark.parametrize("path", MODULES + NOTEBOOKS + SCRIPTS, ids=short)
def test_no_folder_of_one_machine(path):
    "No home folder, no scratch folder: not in code, not in what a cell printed."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":  # pictures are base64, which may hold anything
        notebook = json.loads(text)
        outputs = [x for cell in notebook["cells"] for x in cell.get("outputs", [])]
        for output in outputs:
            shown = output.get("data", {})
            output["data"] = {k: v for k, v in shown.items() if k.startswith("text/")}
        text = re.sub(r"data:[\w/+]+;base64,[\w+/=\\n]+", "", json.dumps(notebook))
    roots = "|".join(["home", "Users", "root", "work", "tmp", "mnt", "private/var"])
    found = re.findall(rf"(?<![\w.:/<~])/(?:{roots})/[\w.]+[^\s\"']*", text)
    assert not found, f"show names without their folder: {found[:3]}"


def test_no_clear_all():
    "nbdev's clear_all would remove the tag by which papermill finds the parameters."
    assert settings().getboolean("clear_all") is False
    assert "tags" in settings()["allowed_cell_metadata_keys"].split()


# ---- settings that fit together


@pytest.mark.parametrize("line", ["format --check", "check"])
def test_ruff_is_content(line):
    "One formatter decides the layout of notebooks, tests and scripts; the linter has no complaint."
    ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run(
        [ruff, *line.split(), "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-1000:]}"


def test_version_is_said_once():
    import dfsbir

    assert dfsbir.__version__ == settings()["version"]
    assert f"## {dfsbir.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_hold_a_version_of_every_requirement():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pins = {canonical(name): version for name, version in (line.split("==") for line in lines)}
    for key in [key for key in settings() if key.endswith("requirements")]:
        for requirement in requirements(key):
            name = canonical(requirement.name)
            assert name in pins, f"constraints.txt names no version of {name}"
            assert requirement.specifier.contains(Version(pins[name])), (
                f"{name}=={pins[name]} of constraints.txt is not {requirement}"
            )


def test_one_script_for_every_ci():
    workflows = (ROOT / ".github" / "workflows").glob("*.yml")
    text = "".join(path.read_text(encoding="utf-8") for path in workflows)
    assert "bash .ci/run" in text
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^\./run test\b", script, re.MULTILINE)
    assert all(f'"{version}"' in text for version in ("3.11", "3.12", "3.13"))


def test_licence():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    for words in ("Apache License", "Version 2.0, January 2004", "END OF TERMS AND CONDITIONS"):
        assert words in text
