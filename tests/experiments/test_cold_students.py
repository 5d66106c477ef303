"The study of cold students, as small as it can be: a part ends and its rows are results."

import subprocess
import sys

from conftest import ROOT

from dfsbir.evaluation.results import read_results

STUDY = ROOT / "tests" / "benchmarks" / "cold_students.py"
SMALL = (
    "--device cpu --precision 32-true --seeds 0 --size 28 --teacher-net tiny --toy-images 40 "
    "--epochs .03 --pictures 128 --picture-steps 2 --picture-batch 16 --steps 8 --batch 8"
)


def test_a_part_of_the_study(tmp_path):
    command = [sys.executable, STUDY, "--out", tmp_path, "--jobs", "toy:all", *SMALL.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = (tmp_path / "toy-0-all.log").read_text()
    assert done.returncode == 0 and "failed: none" in done.stdout, done.stderr + log
    rows = read_results(tmp_path / "results.csv")
    assert {r["dataset"] for r in rows} == {"toy28-tiny"}
    arms = {(r["method"], r["variant"]): r["value"] for r in rows if r["metric"] == "views"}
    assert arms["crossx-dfsbir", "cold"] == arms["data-dependent", "cold"] == 4 * 8
    scores = {(r["method"], r["variant"]) for r in rows if r["metric"] == "mAP@all"}
    assert set(arms) < scores and ("teacher-posteriors", "cold") in scores
    assert {"uni-modal", "gaussian-prior", "meta-data"} <= {method for method, _ in arms}
