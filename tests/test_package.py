"""Wheel and sdist: built from a copy, they hold every module and work without the repository."""

import configparser
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from conftest import ROOT, copy_parts

MODULES = sorted(
    ".".join(path.relative_to(ROOT / "dfsbir").with_suffix("").parts)
    for path in (ROOT / "dfsbir").rglob("*.py")
    if not path.name.startswith("_")
)
FILES = {f"dfsbir/{name.replace('.', '/')}.py" for name in MODULES}
ABSENT = ["fastcore", "nbdev", "execnb", "IPython", "ipykernel", "papermill", "nbconvert"]
ABSENT += ["psutil", "pytest", "sklearn", "torchmetrics", "onnx", "onnxruntime", "onnx2torch"]
ABSENT += ["efficientnet_lite_pytorch", "faiss", "opacus", "pyarrow", "ray", "skimage"]
ABSENT += ["ipywidgets", "anywidget", "voila", "jupyterlab", "playwright"]
IMPORTS = f"""
import importlib
import sys
from importlib.metadata import version
for name in {ABSENT}:
    sys.modules[name] = None
import dfsbir
asked = []
for name in {MODULES}:
    try:
        importlib.import_module("dfsbir." + name)
    except ImportError as e:  # widgets ask for their extra
        assert name.startswith("explore.") and "pip install 'dfsbir[explore]'" in str(e), e
        asked.append(name)
assert "explore.explorer" in asked, "the explorer was imported without its widgets"
print(dfsbir.__version__ == version("dfsbir"), dfsbir.__file__)
"""


def plain_env():
    "This process's environment without its Python paths."
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def call(*line, **kw):
    "Output of a command that must succeed."
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, **kw)
    assert done.returncode == 0, f"{line}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Folder with the sdist of a copy of the tree, and the wheel made from that sdist alone."
    top, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    copy_parts(top)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, top)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "Python of a fresh environment that holds the wheel, and of this one only the dependencies."
    folder = tmp_path_factory.mktemp("installed")
    call(sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / Path(sys.executable).name
    python = python if python.exists() else python.with_name("python")
    site = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    # A venv sees the packages of the base Python alone. Those of this environment come last, and
    # its editable installs not at all, since no .pth is read there.
    here = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "dependencies.pth").write_text(f"import sys; sys.path += {here!r}\n")
    wheel = next(built.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    call(*pip, "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    return python


def test_sdist_holds_what_a_build_needs(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    files = {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert names >= files | FILES


def test_wheel_holds_every_module_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= FILES | {"dfsbir/__init__.py", "dfsbir/_modidx.py"}
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dfsbir"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for name in ("run_experiment", "explorer", "tour"):
        assert f"dfsbir/notebooks/{name}.ipynb" in names, "a command starts it"


def test_wheel_says_what_settings_say(built):
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = parser["DEFAULT"]
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        meta = Parser().parsestr(archive.read(name).decode())
    assert (meta["Name"], meta["Version"]) == (settings["lib_name"], settings["version"])
    assert meta["Requires-Python"] == ">=" + settings["min_python"]
    assert "Apache-2.0" in (meta["License"], meta["License-Expression"])
    optional = {key.removesuffix("_requirements") for key in settings if "_requirements" in key}
    assert set(meta.get_all("Provides-Extra")) == optional

    required = meta.get_all("Requires-Dist")
    plain = [line for line in required if "extra ==" not in line]
    assert len(plain) == len(settings["requirements"].strip().splitlines())

    def of_extra(extra):
        return {line.split(";")[0].strip() for line in required if f'extra == "{extra}"' in line}

    for extra in optional:
        assert of_extra(extra) <= of_extra("dev"), "the tests need every extra"


def test_wheel_imports_without_the_repository(installed, tmp_path):
    "Every module, from another folder, with the developers' tools and all extras made absent."
    same, where = call(installed, "-c", IMPORTS, cwd=tmp_path, env=plain_env()).split(maxsplit=1)
    assert same == "True"
    assert Path(where.strip()).resolve().is_relative_to(installed.parent.parent.resolve())


def test_explorer_and_tour_come_from_the_package(installed, tmp_path):
    code = (
        "from dfsbir.explore.opening import copy_tour, explorer_command, packaged_notebook\n"
        "print(packaged_notebook('tour.ipynb'), explorer_command()[0][3], copy_tour('here'))"
    )
    found = call(installed, "-c", code, cwd=tmp_path, env=plain_env()).split()
    environment = installed.parent.parent.resolve()
    assert all(Path(name).resolve().is_relative_to(environment) for name in found[:2])
    assert (tmp_path / found[2]).is_file()


def test_console_script_answers(installed, tmp_path):
    def dfsbir(*words):
        return call(installed.with_name("dfsbir"), *words, cwd=tmp_path, env=plain_env())

    text = dfsbir("--help")
    assert "usage" in text.lower() and all(word in text for word in ("run", "teacher", "evaluate"))
    assert "toy_images = " in dfsbir("run", "--help"), "the package's notebook has its parameters"
