"""README and guides: Python blocks run, commands and options exist, links lead to files."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from textwrap import dedent

import pytest
from conftest import ROOT

from dfsbir.crossx.config import CrossXConfig
from dfsbir.finegrained.config import FineGrainedConfig

SHELL = ("sh", "bash", "console")
SHOWN = ("text", "json", "bibtex", "mermaid")  # blocks that are looked at, not run
ANYWHERE = ("cd", "export", "git", "source")  # of the shell, or asked for beforehand


def blocks(text):
    "(language, source) of every fenced block, of those in lists as well."
    fence = r"^([ ]*)```[ ]*(\S*)[^\n]*\n(.*?)^\1```[ ]*$"
    found = re.findall(fence, text, re.MULTILINE | re.DOTALL)
    return [(language, dedent(source)) for _, language, source in found]


def commands(source):
    "The simple commands of a shell block, as lists of words."
    source = re.sub(r"\\\n", " ", source)
    for line in source.splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        command = []
        for word in [*words, ";"]:
            if word in ("&&", "||", "|", ";"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def parameters(notebook):
    "The names in a notebook's cell tagged `parameters`."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    for node in ast.parse("".join(cell["source"])).body:
        if isinstance(node, ast.Assign):
            yield node.targets[0].id
        elif isinstance(node, ast.AnnAssign):
            yield node.target.id


def papermill_faults(notebook, rest):
    "A notebook that is not there, and -p names that its parameters cell lacks."
    if not (ROOT / notebook).is_file():
        return [f"there is no {notebook}"]
    known = set(parameters(ROOT / notebook))
    named = [
        rest[i + 1]
        for i, word in enumerate(rest[:-1])
        if word in ("-p", "--parameters", "-r", "--parameters_raw")
    ]
    return [f"{notebook} has no parameter {name}" for name in named if name not in known]


@cache
def dfsbir_help(*sub):
    "(exit code, what was printed) of `dfsbir SUB --help`."
    code = "import sys; sys.argv[0] = 'dfsbir'; from dfsbir.app.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *sub, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def dfsbir_faults(rest):
    "Sub-commands and options that `dfsbir ... --help` does not know."
    sub = [word for word in rest[:1] if not word.startswith("-")]
    failed, text = dfsbir_help(*sub)
    if failed:
        return [f"dfsbir {' '.join(sub)} --help: {text[-300:]}"]
    faults = [
        f"dfsbir {' '.join(sub)} has no {word}"
        for word in rest
        if word.startswith("--") and word.split("=")[0] not in text
    ]
    return faults + (papermill_faults("nbs/run_experiment.ipynb", rest) if sub == ["run"] else [])


def command_faults(words):
    "What is wrong with one command of the README, judged without running it."
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words:
        return []
    if re.fullmatch(r"python[\d.]*", words[0]) and words[1:2] == ["run"]:
        words[:2] = ["./run"]
    first, rest = words[0], words[1:]
    if lost := [
        word
        for word in rest
        if re.match(r"(nbs|tests|docs)/|dfsbir/.*\.", word) and not (ROOT / word).exists()
    ]:
        return [f"there is no {word}" for word in lost]
    if first == "./run":
        help_text = subprocess.run(
            [sys.executable, ROOT / "run"], capture_output=True, text=True
        ).stderr
        if not rest or not re.search(rf"\./run {re.escape(rest[0])}\b", help_text):
            return [f"./run knows no {rest[:1]}"]
        if rest[0] == "exec":
            return command_faults(rest[1:])
        return (
            papermill_faults("nbs/run_experiment.ipynb", rest[1:])
            if rest[0] == "job" and rest[1:]
            else []
        )
    if first == "papermill":
        return (
            papermill_faults(rest[0], rest[1:])
            if len(rest) > 1 and rest[1].endswith(".ipynb")
            else ["papermill wants a notebook and where to write it"]
        )
    if first == "dfsbir":
        return dfsbir_faults(rest)
    return [] if first in ANYWHERE or shutil.which(first) else [f"{first} is not a command here"]


def inline_commands(text):
    "Commands that stand in a sentence or a table, as lists of words."
    text = re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.MULTILINE | re.DOTALL)
    for source in re.findall(r"`((?:papermill|dfsbir|\./run|python) [^`]+)`", text):
        if not re.search(r"\b[A-Z]{3,}\b", source):  # a word in capitals stands for something
            yield from commands(source)


README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {
    name: [(language, source) for language, source in blocks(text) if not language.startswith("{")]
    for name, text in TEXT.items()
}
COMMANDS = {
    name: [
        words
        for language, source in BLOCKS[name]
        if language in SHELL
        for words in commands(source)
    ]
    for name in TEXT
}
INLINE = {name: list(inline_commands(text)) for name, text in TEXT.items()}
EVERY = sorted(
    {
        shlex.join(words)
        for found in (COMMANDS, INLINE)
        for lines in found.values()
        for words in lines
    }
)
PYTHON = {
    name: [source for language, source in found if language == "python"]
    for name, found in BLOCKS.items()
}


def test_the_readme_is_short():
    text = TEXT["README.md"]
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1600, (
        "the rest belongs into docs/"
    )


@pytest.mark.parametrize("name", TEXT)
def test_every_block_is_of_a_known_kind(name):
    assert {language for language, _ in BLOCKS[name]} <= {"python", *SHELL, *SHOWN}, (
        "name each block's language, so that none escapes the tests"
    )
    assert TEXT[name].count("```") == 2 * len(blocks(TEXT[name]))


def test_the_two_commands_are_there():
    assert ["./run", "job"] in COMMANDS["README.md"] and ["./run", "test"] in COMMANDS["README.md"]


@pytest.mark.parametrize("line", EVERY)
def test_command(line):
    assert not command_faults(shlex.split(line))


def changes(text):
    "What `-p changes` is given somewhere in a text, with the preset named before it, if any."
    found = re.findall(r"(?:-p\s+preset\s+(\w+)\s+)?-p\s+changes\s+'(\{[^']*\})'", text)
    return [(preset or "dfsbir", json.loads(words)) for preset, words in found]


@pytest.mark.parametrize("name", TEXT)
def test_changes_are_settings(name):
    "They belong to fine-grained retrieval on the pages about it."
    for preset, change in changes(TEXT[name]):
        fine = "fine_grained" in name
        config = FineGrainedConfig() if fine else CrossXConfig.preset(preset)
        config.changed(change)


def test_some_page_shows_a_change():
    assert any(changes(text) for text in TEXT.values())


RUNNER = """
import json, os, pathlib, sys
for name, sources in json.load(sys.stdin).items():
    folder = pathlib.Path(sys.argv[1], name.replace("/", "-"))
    folder.mkdir(parents=True)
    os.chdir(folder)
    space = {"__name__": "__main__"}
    for i, source in enumerate(sources, 1):
        exec(compile(source, f"{name}, Python block {i}", "exec"), space)
"""


@pytest.mark.parametrize(
    "names",
    [["README.md"], [name for name in TEXT if name != "README.md"]],
    ids=["README.md", "docs"],
)
def test_python_blocks_run_one_after_the_other(names, tmp_path, elsewhere):
    "The pages of docs share a process, since importing takes longest, but no folder and no names."
    pages = {name: PYTHON[name] for name in names if PYTHON[name]}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, tmp_path / "cwd"],
        input=json.dumps(pages),
        cwd=tmp_path,
        env=elsewhere | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert pages and done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(
        r"^[ ]*```.*?^[ ]*```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    lost = [
        target
        for target in targets
        if not re.match(r"https?://|#|mailto:", target)
        and not (page.parent / target.split("#")[0]).exists()
    ]
    assert not lost


@pytest.mark.parametrize(
    "line",
    [
        "./run jbo",
        "papermill nbs/run_experiment.ipynb",
        "papermill nbs/none.ipynb runs/a.ipynb",
        "no-such-command --x",
        "./run exec no-such-command",
    ],
)
def test_wrong_commands_are_seen(line):
    assert command_faults(shlex.split(line))


def test_the_parser_of_blocks():
    text = "```sh\n$ git clone x && cd y  # why\nA=1 ./run job \\\n  -p seed 1\n```\n\n"
    text += "- a list\n\n  ```python\n  x = 1\n  ```\n"
    assert [language for language, _ in blocks(text)] == ["sh", "python"]
    assert list(commands(blocks(text)[0][1])) == [
        ["git", "clone", "x"],
        ["cd", "y"],
        ["A=1", "./run", "job", "-p", "seed", "1"],
    ]
