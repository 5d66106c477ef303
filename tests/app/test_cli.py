"""The dfsbir command: help, nothing heavy before it is needed, errors in a user's words."""

import ast
import json
import os
import subprocess
import sys

import pytest
from app.helpers import call
from conftest import ROOT

import dfsbir
from dfsbir.app import cli
from dfsbir.app.cli import describe_error, main, make_parser
from dfsbir.app.parameters import notebook_parameters
from dfsbir.core.types import MODALITIES

COMMANDS = (
    "run",
    "teacher",
    "inspect",
    "evaluate",
    "audit",
    "index",
    "search",
    "explore",
    "atlas",
    "tour",
    "sweep",
)


def command(cwd, *words):
    "The finished process of the command."
    return subprocess.run(
        [sys.executable, "-m", "dfsbir.app.cli", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


# ---- help


def test_the_bare_command_shows_its_help(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: dfsbir") and all(f"\n    {name} " in text for name in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"dfsbir {dfsbir.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(capsys, name):
    "Every option is described; examples stand on lines of their own, as they are typed."
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    _, _, after = text.partition("example")
    examples = [line for line in after.splitlines() if line.startswith("  dfsbir")]
    assert examples and all(f"{line} ".startswith(f"  dfsbir {name} ") for line in examples)
    (commands,) = [a for a in make_parser()._actions if a.choices and name in a.choices]
    for action in commands.choices[name]._actions:
        assert action.help, action.dest


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_accepted(name):
    (commands,) = [a for a in make_parser()._actions if a.choices and name in a.choices]
    epilog = commands.choices[name].epilog.replace("\\\n", " ")
    lines = [line.split() for line in epilog.splitlines() if line.startswith("  dfsbir")]
    for words in lines:
        assert make_parser().parse_args(words[1:]).does


def test_run_help_lists_every_parameter_with_its_comment(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    for p in notebook_parameters():
        assert p.comment and f"{p.name} = {json.dumps(p.default)}\n      {p.comment}" in text


def test_no_such_command_or_option(capsys):
    for words in (["fly"], ["evaluate", "--fly"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2 and "usage" in capsys.readouterr().err


# ---- nothing heavy before it is needed


COUNT = """
import contextlib, io, json, sys
from dfsbir.app.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    with contextlib.redirect_stderr(io.StringIO()):
        main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["--version"],
        ["serach"],
        ["run", "-p", "sead", "1"],
        ["run", "-p", "seed", "x"],
        ["search"],
        *([name, "--help"] for name in COMMANDS),
        *([name, "--typo"] for name in COMMANDS),
    ],
    ids=" ".join,
)
def test_help_and_typos_import_nothing_but_the_standard_library(words):
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    modules = json.loads(done.stdout)
    heavy = {"torch", "numpy", "PIL", "pydantic", "papermill", "tqdm", "ipywidgets"} & set(modules)
    assert not heavy and len(modules) < 300


@pytest.mark.parametrize(
    "words, near",
    [("serch photos", "search"), ("teacher skech toy out", "sketch"), ("xyzzyq", None)],
)
def test_the_nearest_of_the_choices_is_offered(words, near, capsys):
    with pytest.raises(SystemExit) as e:
        cli.make_parser().parse_args(words.split())
    said = capsys.readouterr().err
    assert e.value.code == 2 and "choose from" in said
    assert ("did you mean" in said) == bool(near)
    assert not near or said.rstrip().endswith(f"{near!r}?")


def test_the_copied_names_of_modalities_are_those_of_the_core():
    assert [str(m) for m in MODALITIES] == list(cli.MODALITIES)


def test_every_command_has_a_function():
    (commands,) = [a for a in make_parser()._actions if a.choices and "run" in a.choices]
    for parser in commands.choices.values():
        module, function = parser.get_default("does").split(":")
        source = (ROOT / "dfsbir" / "app" / f"{module}.py").read_text()
        assert function in [getattr(node, "name", "") for node in ast.parse(source).body]


# ---- errors


def test_as_a_process(tmp_path):
    "Exit code and message as a shell sees them."
    done = command(tmp_path, "evaluate", "nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    assert not done.stdout


def test_traceback_on_demand(tmp_path):
    with pytest.raises(FileNotFoundError):
        call("--traceback", "evaluate", tmp_path)


@pytest.mark.parametrize(
    "error, text",
    [
        (ValueError("k is 0"), "k is 0"),
        (FileNotFoundError("there is no x.png"), "there is no x.png"),
        (PermissionError(13, "Permission denied", "x.png"), "x.png: Permission denied"),
        (ImportError("needs an extra"), "needs an extra"),
        (RuntimeError("cell 3"), "cell 3"),
    ],
)
def test_errors_of_users_are_their_messages(error, text):
    assert describe_error(error) == text


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("no"), AttributeError("a"), ValueError()]
)
def test_errors_of_the_program_say_what_they_are(error):
    text = describe_error(error)
    assert type(error).__name__ in text and "--traceback" in text
