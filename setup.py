"""Installs dfsbir.  Everything it says about itself is read from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def lines(key):
    "The entries of a setting, one a line (an entry may hold blanks)."
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


OPTIONAL = ("run", "onnx", "privacy", "imagenet", "search", "ray", "finegrained", "explore", "docs")
extras = {name: lines(f"{name}_requirements") for name in OPTIONAL}
extras["dev"] = lines("dev_requirements") + sum(extras.values(), [])  # the tests need them all


class BuildWithNotebook(build_py):
    """Puts the notebooks into the wheel that `dfsbir run`, `dfsbir explore` and `tour` start.

    An editable install finds them in nbs/.
    """

    NOTEBOOKS = ("run_experiment.ipynb", "explorer.ipynb", "tour.ipynb")

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / settings["lib_path"] / "notebooks"
            self.mkpath(str(folder))
            for name in self.NOTEBOOKS:
                self.copy_file(str(HERE / settings["nbs_path"] / name), str(folder))


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    cmdclass={"build_py": BuildWithNotebook},
    packages=find_packages(include=[settings["lib_path"], settings["lib_path"] + ".*"]),
    include_package_data=True,
    python_requires=">=" + settings["min_python"],
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
)
