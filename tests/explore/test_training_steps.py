"Saved pictures and logs of a run."

import json

import pytest

from dfsbir.explore.runs import Run
from dfsbir.explore.training_steps import show_curves, show_step


def test_steps_and_logs_that_are_not_there(run, tmp_path):
    with pytest.raises(ValueError, match="7777"):
        show_step(run, 7777)
    (tmp_path / "config.json").write_text(json.dumps({"parameters": {}}))
    empty = Run(tmp_path)
    with pytest.raises(ValueError, match="logged nothing"):
        show_curves(empty)
