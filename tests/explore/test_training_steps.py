"Saved pictures and logs of a run."

import json

import pytest
import torch
import torch.nn.functional as F

from dfsbir.core.checkpoint import load_state
from dfsbir.core.types import MODALITIES
from dfsbir.crossx.build import build_crossx
from dfsbir.explore.runs import Run
from dfsbir.explore.training_steps import (
    action_of_step,
    preview_classes,
    read_preview,
    show_curves,
    show_step,
)


def test_a_preview_is_cut_into_the_images_that_were_saved(run):
    "The last one, beside what the loaded run draws."
    crossx = build_crossx(*run.teachers.values(), run.config)
    state = load_state(run.path / "checkpoints" / "last.safetensors")
    crossx.pairs.load_state_dict(state["pairs"])
    pairs = crossx.preview()
    rows = read_preview(run.previews[max(run.previews)])
    assert [run.classes[k] for k in pairs.label] == preview_classes(run, len(pairs.label))
    for m, row in zip(MODALITIES, rows):
        images = pairs.of(m).expand(-1, 3, -1, -1)
        wanted = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
        torch.testing.assert_close(torch.stack(row), wanted, atol=0.5 / 255 + 1e-5, rtol=0)


def test_classes_are_named_under_the_saved_pairs(run, paper):
    captions = [ax.get_xlabel() for ax in show_step(run, max(run.previews)).axes[:16]]
    assert {text for text in captions if text} == set(run.classes)
    assert set(preview_classes(paper, 16)) == {""}  # its generators are given no class


def test_a_step_is_marked_at_its_own_action(paper):
    "Estimator steps alternate with steps of the students, and the log counts them all."
    plan = paper.config.plan()
    assert "distill" in plan[: len(plan) - plan[::-1].index("synthesize")]  # else nothing is tested
    for step in paper.previews:
        action = action_of_step(paper, step)
        assert plan[action - 1] == "synthesize" and plan[:action].count("synthesize") == step
        (line,) = [
            line
            for line in show_step(paper, step).axes[-1].lines
            if len(set(line.get_xdata())) == 1
        ]
        assert line.get_xdata()[0] == action
    with pytest.raises(ValueError, match="9999"):
        action_of_step(paper, 9999)


def test_steps_and_logs_that_are_not_there(run, tmp_path):
    with pytest.raises(ValueError, match="7777"):
        show_step(run, 7777)
    (tmp_path / "config.json").write_text(json.dumps({"parameters": {}, "crossx": {}}))
    empty = Run(tmp_path)
    with pytest.raises(ValueError, match="logged nothing"):
        show_curves(empty)


@pytest.mark.parametrize("width", [3.25, 9.0, 12.0])
def test_a_legend_leaves_half_of_a_narrow_plot_free(run, width):
    picture = show_curves(run, width)
    picture.figure.draw_without_rendering()
    for ax in picture.axes:
        legend, plot = ax.get_legend().get_window_extent(), ax.get_window_extent()
        assert plot.x0 <= legend.x0 and legend.x1 <= plot.x1
        assert legend.width < 0.75 * plot.width
