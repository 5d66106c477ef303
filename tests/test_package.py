"""Wheel and sdist: they build from a copy, hold every module, and the wheel works where the repository is not."""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from conftest import PARTS, ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT / "dfsbir").with_suffix("").parts)
    for path in (ROOT / "dfsbir").rglob("*.py")
    if not path.name.startswith("_")
)
FILES = {f"dfsbir/{name.replace('.', '/')}.py" for name in MODULES}
WIDGETS = [f"explore.{name}" for name in ("panels", "sketch_pad", "photo_map", "explorer")]


def call(*line, **kw):
    "Output of a command that must succeed."
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, **kw)
    assert done.returncode == 0, f"{line}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Folder with the sdist of a copy of the tree, and the wheel made from that sdist alone."
    top, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for part in PARTS:
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy2)(ROOT / part, top / part)
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
    # a venv sees the packages of the base Python alone; those of this environment come last, its editable installs not at all (no .pth is read there)
    (site / "dependencies.pth").write_text(
        f"import sys; sys.path += {sorted({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')})!r}\n"
    )
    wheel = next(built.glob("*.whl"))
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        wheel,
    )
    return python


def test_sdist_holds_what_a_build_needs(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {
        "settings.ini",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    } <= names
    assert names >= FILES


def test_wheel_holds_every_module_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert (
        FILES
        | {
            "dfsbir/__init__.py",
            "dfsbir/_modidx.py",
        }
        <= names
    )
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dfsbir"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "dfsbir/notebooks/run_experiment.ipynb" in names, "dfsbir run starts it"


def test_wheel_says_what_settings_say(built):
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = parser["DEFAULT"]
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        meta = Parser().parsestr(
            next(
                archive.read(name).decode()
                for name in archive.namelist()
                if name.endswith("METADATA")
            )
        )
    assert (meta["Name"], meta["Version"]) == (settings["lib_name"], settings["version"])
    assert meta["Requires-Python"] == ">=" + settings["min_python"] and "Apache-2.0" in (
        meta["License"],
        meta["License-Expression"],
    )
    optional = {"run", "onnx", "imagenet", "search", "ray", "finegrained", "explore", "docs"}
    assert set(meta.get_all("Provides-Extra")) == {"dev", *optional}
    required = meta.get_all("Requires-Dist")
    assert (
        sum("extra ==" not in line for line in required)
        == len(settings["requirements"].split("\n")) - 1
    )
    dev = {line.split(";")[0].strip() for line in required if 'extra == "dev"' in line}
    for extra in optional:
        assert {
            line.split(";")[0].strip() for line in required if f'extra == "{extra}"' in line
        } <= dev, "the tests need every extra"


def test_wheel_imports_without_the_repository(installed, tmp_path):
    "Every module, from another folder, with the developers' tools and all extras made absent."
    code = f"""
import sys
for name in ("fastcore", "nbdev", "execnb", "IPython", "ipykernel", "papermill", "nbconvert", "psutil", "pytest", "onnx", "onnxruntime", "onnx2torch", "efficientnet_lite_pytorch", "sklearn", "torchmetrics",
             "faiss", "pyarrow", "ray", "skimage", "ipywidgets", "anywidget", "voila", "jupyterlab", "playwright"):
    sys.modules[name] = None
import importlib, dfsbir
WIDGETS = {WIDGETS!r}
for name in {MODULES!r}:
    if name not in WIDGETS: importlib.import_module("dfsbir." + name)
try: import dfsbir.explore.explorer  # a page of widgets: it asks for its extra
except ImportError as e: assert "pip install 'dfsbir[explore]'" in str(e), e
else: sys.exit("the explorer was imported without its widgets")
from importlib.metadata import version
print(dfsbir.__version__ == version("dfsbir"), dfsbir.__file__)
"""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    same, where = call(installed, "-c", code, cwd=tmp_path, env=env).split(maxsplit=1)
    assert same == "True" and Path(where.strip()).resolve().is_relative_to(
        installed.parent.parent.resolve()
    )


def test_console_script_answers(installed, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    text = call(installed.with_name("dfsbir"), "--help", cwd=tmp_path, env=env)
    assert "usage" in text.lower() and all(word in text for word in ("run", "teacher", "evaluate"))
    assert "toy_images = " in call(
        installed.with_name("dfsbir"), "run", "--help", cwd=tmp_path, env=env
    ), "the notebook that came with the package tells its parameters"
