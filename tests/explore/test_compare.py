"Two runs side by side."

import json
import shutil

from dfsbir.evaluation.results import append_results
from dfsbir.explore.compare import compare_runs, measured_map
from dfsbir.explore.runs import Run


def test_measured_precision_of_a_run_and_of_the_one_inside_it(home, tmp_path, is_png):
    folder = tmp_path / "one"
    shutil.copytree(home / "one", folder)
    config = json.loads((folder / "config.json").read_text())
    config["parameters"]["preset"] = "both"
    (folder / "config.json").write_text(json.dumps(config))
    outer, inner = Run(folder), Run(folder / "paper")
    assert measured_map(outer) is None and measured_map(inner) is None
    row = {"dataset": "toy", "seed": 0, "metric": "mAP@all"}
    row |= {"seconds": 1.0, "device": "cpu", "run_id": "x"}
    rows = [
        row | {"method": "crossx-paper", "value": 0.25},
        row | {"method": "crossx-dfsbir", "value": 0.5},
    ]
    append_results(folder / "results.csv", rows)
    assert (measured_map(outer), measured_map(inner)) == (0.5, 0.25)
    assert is_png(compare_runs(outer, inner).png())
