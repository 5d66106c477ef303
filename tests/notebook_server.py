"""Runs notebooks, each in a fork of a process that has imported the large libraries already.

Importing torch, timm and nbdev takes longer than most notebooks do. A line of standard input is a
job as JSON: "notebook", "tree" (the folder to run in), "env" (its whole environment) and "log" (a
file for all output). Its exit code is answered as a line of standard output.
"""

import importlib
import json
import os
import sys
import traceback

LARGE = ("torch", "torchvision", "timm", "lightning_fabric", "matplotlib.pyplot", "nbdev.test")


def become_a_fresh_process(job):
    "What `python -c` would have found: its folder, environment, paths, and no file as __main__."
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["tree"])
    sys.path[:1] = ["", job["tree"]]
    sys.argv = ["-c", job["notebook"]]
    del sys.modules["__main__"].__file__


def run_here(job):
    "nbdev_test on one notebook; its exit code."
    from nbdev.test import nbdev_test

    become_a_fresh_process(job)
    try:
        nbdev_test(path=job["notebook"], n_workers=0)
    except SystemExit as e:
        return e.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    for name in LARGE:
        importlib.import_module(name)
    assert "dfsbir" not in sys.modules, "the package is imported from the tree of each job"
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.exit(run_here(job))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
