"""Everything that only a graphics card can show, in one command of a few minutes.

    python tests/benchmarks/on_cuda.py               # all of it
    python tests/benchmarks/on_cuda.py --only steps  # a part

Each part is a process of its own, and what fails does not stop the others. `tests` are the tests
that skip without CUDA: whole runs with own teachers, resumed, in three precisions, and no waits in
any action. `steps` is step_cost.py at 64, 96 and 224 px with two teacher sizes, beside floors that
are replayed from a captured graph. `growth` is growth.py on the card. `processes` trains one run in
two processes where there are two cards.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS = ["tests/crossx/test_cuda.py", "tests/inversion/test_cost.py", "tests/crossx/test_steps.py"]
TESTS += ["tests/data/test_polyline_kernels.py"]
BEFORE = "before: estimator step 63 ms, student step 18 ms, filling with 1,024 pairs 880 ms (H200)"


def options():
    "The command line."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="+", choices=list(parts("")), help="some of the parts")
    return p.parse_args()


def parts(folder):
    "Name and commands of each part."
    step_cost = [str(HERE / "step_cost.py"), "--device", "cuda", "--steps", "20"]
    toy = ["-p", "run_folder", f"{folder}/run", "-p", "device", "cuda", "-p", "ceiling", "False"]
    short = ["-p", "toy_images", "300", "-p", "photo_epochs", "3", "-p", "sketch_epochs", "3"]
    two = ["-p", "changes", '{"processes": 2}']
    return {
        "tests": [["-m", "pytest", "-q", "-rs", *TESTS]],
        "steps": [
            [*step_cost, "--sizes", "64", "96"],
            [*step_cost, "--sizes", "224", "--precision", "bf16-mixed"],
            [*step_cost, "--sizes", "64", "--nets", "dfsbir/small", "--precision", "16-mixed"],
        ],
        "growth": [
            [str(HERE / "growth.py"), "--device", "cuda", "--file", f"{folder}/growth.jsonl"]
            + ["--parts", "classes", "side", "pairs"]
        ],
        "processes": [["-m", "dfsbir.app.cli", "run", *toy, *short, *two]],
    }


def main():
    args = options()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing here can be shown on the CPU")
    print(
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
    )
    print(f"{BEFORE}; with the toy set at 64 px, batch 40", flush=True)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name, commands in parts(folder).items():
            if args.only and name not in args.only:
                continue
            if name == "processes" and torch.cuda.device_count() < 2:
                print("\n== processes: left out, there is one card")
                continue
            for command in commands:
                print(f"\n== {name}: python {' '.join(command)}", flush=True)
                start = time.perf_counter()
                code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
                print(f"== {time.perf_counter() - start:.0f} s, exit code {code}", flush=True)
                failed += [name] * bool(code)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
