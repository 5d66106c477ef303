"""The README keeps its word: Python blocks run, commands exist and know their options, links lead somewhere."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SHELL = ("sh", "bash", "console")
SHOWN = ("text", "json", "bibtex", "mermaid")  # blocks that are looked at, not run
ANYWHERE = (
    "cd",
    "export",
    "git",
    "source",
)  # commands of the shell, and what the README asks for beforehand


def blocks(text):
    "(language, source) of every fenced block."
    return re.findall(r"^```[ ]*(\S*)[^\n]*\n(.*?)^```[ ]*$", text, re.MULTILINE | re.DOTALL)


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


def dfsbir_faults(rest):
    "Sub-commands and options that `dfsbir ... --help` does not know."
    sub = [word for word in rest[:1] if not word.startswith("-")]
    code = "import sys; sys.argv[0] = 'dfsbir'; from dfsbir.app.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *sub, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        return [f"dfsbir {' '.join(sub)} --help: {done.stderr[-300:]}"]
    return [
        f"dfsbir {' '.join(sub)} has no {word}"
        for word in rest
        if word.startswith("--") and word.split("=")[0] not in done.stdout
    ]


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


README = ROOT / "README.md"
BLOCKS = blocks(README.read_text(encoding="utf-8"))
COMMANDS = [words for language, source in BLOCKS if language in SHELL for words in commands(source)]
PYTHON = [source for language, source in BLOCKS if language == "python"]


def test_every_block_is_of_a_known_kind():
    assert {language for language, _ in BLOCKS} <= {"python", *SHELL, *SHOWN}, (
        "name each block's language, so that none escapes the tests"
    )
    assert README.read_text(encoding="utf-8").count("```") == 2 * len(BLOCKS)


def test_the_two_commands_are_there():
    assert ["./run", "job"] in COMMANDS and ["./run", "test"] in COMMANDS


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_command(words):
    assert not command_faults(words)


@pytest.mark.skipif(not PYTHON, reason="README.md has no Python block")
def test_python_blocks_run_one_after_the_other(tmp_path, elsewhere):
    (tmp_path / "cwd").mkdir()
    code = "import json, sys\nspace = {'__name__': '__main__'}\nfor i, source in enumerate(json.load(sys.stdin), 1):\n    exec(compile(source, f'README.md, Python block {i}', 'exec'), space)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(PYTHON),
        cwd=tmp_path / "cwd",
        env=elsewhere | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_links_lead_to_files():
    text = re.sub(
        r"^```.*?^```", "", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    lost = [
        target
        for target in targets
        if not re.match(r"https?://|#|mailto:", target)
        and not (ROOT / target.split("#")[0]).exists()
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
    text = "```sh\n$ git clone x && cd y  # why\nA=1 ./run job \\\n  -p seed 1\n```\n\n```python\nx = 1\n```\n"
    assert [language for language, _ in blocks(text)] == ["sh", "python"]
    assert list(commands(blocks(text)[0][1])) == [
        ["git", "clone", "x"],
        ["cd", "y"],
        ["A=1", "./run", "job", "-p", "seed", "1"],
    ]
