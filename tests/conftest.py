"""What the tests share: one thread per process, copies of the tree, real data, seconds per file."""

import os

# before torch is imported: tests run side by side, one core each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
PARTS = (  # the project without its tests
    "nbs",
    "dfsbir",
    "run",
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "constraints.txt",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)
SLOW = (  # files and folders of tests that take minutes, the slowest first
    "app/test_sweep.py",
    "test_notebooks.py",
    "explore/test_browser.py",
    "explore/test_tour.py",
    "finegrained",
    "crossx",
    "experiments",
    "test_readme.py",
    "test_docs.py",
    "test_package.py",
)


def copy_parts(top):
    "Copies the project without its tests, and without what runs have left behind, into a folder."
    left = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, top / part, ignore=left)
        else:
            shutil.copy2(ROOT / part, top / part)


@pytest.fixture(scope="session")
def root():
    "The top of the repository; for reading only."
    return ROOT


@pytest.fixture
def tree(tmp_path):
    "A copy of the project that a test may change; nothing in it points back to the repository."
    top = tmp_path / "tree"
    top.mkdir()
    copy_parts(top)
    return top


@pytest.fixture
def elsewhere(tree):
    "The environment of a process in `tree`: the package from there, no real data, no download."
    left_out = ("DFSBIR_DATA", "IN_TEST", "PYTEST_", "COV_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {
        "PYTHONPATH": str(tree),
        "HF_HUB_OFFLINE": "1",
        "XDG_CONFIG_HOME": str(tree.parent / "config"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def data_dir():
    "The folder of real photos and drawings; tests that need it skip where it is absent."
    folder = Path(os.environ.get("DFSBIR_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (DFSBIR_DATA names the folder)")
    return folder


def pytest_collection_modifyitems(items):
    "Slow files first, so that the worker processes end together."

    def rank(item):
        place = item.path.relative_to(TESTS)
        ranks = [i for i, name in enumerate(SLOW) if place.is_relative_to(name)]
        return min(ranks, default=len(SLOW))

    items.sort(key=rank)


def pytest_terminal_summary(terminalreporter):
    "Seconds per test file, added up over the workers."
    seconds, count = defaultdict(float), defaultdict(int)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                name = report.nodeid.split("::")[0]
                seconds[name] += report.duration
                count[name] += report.when == "call"
    terminalreporter.section("seconds per file")
    for name in sorted(seconds, key=seconds.get, reverse=True):
        terminalreporter.write_line(f"{seconds[name]:8.1f} s {count[name]:4d} tests  {name}")
