"Panels without a browser: controls, figures, errors, widths."

import pytest
import torch

pytest.importorskip("anywidget", reason="panels need pip install 'dfsbir[explore]'")

import ipywidgets as W

from dfsbir.explore.panels import Panel, control, figure_inches
from dfsbir.explore.pictures import tiles
from dfsbir.explore.views import View
from dfsbir.explore.worker import Worker


@pytest.fixture
def worker():
    return Worker(pause=0.0)


def draw(label, step, width, seed=0):
    if step == 3:
        raise ValueError("three is not drawn")
    return tiles([torch.rand(2, 1, 8, 8)], title=f"{label} {step} {seed}", width=width)


def table(label, step, **values):
    return f"<p>{label} {step}</p>"


def panel_of(worker, **more):
    choices = {"label": ["x", "y"], "step": range(5), **more}
    panel = Panel(View("A sentence.", draw, table, **choices), worker)
    return panel


def test_a_panel_draws_and_says_what_it_shows(worker):
    panel = panel_of(worker)
    assert panel.figure.busy and not panel.figure.svg  # nothing is shown before it is drawn
    worker.wait()
    assert "A sentence." in panel.children[0].value
    assert "<image" in panel.figure.svg and "x 0 0" in panel.figure.svg
    assert panel.table.value == "<p>x 0</p>" and not panel.figure.busy


def test_controls_set_the_view_and_errors_are_shown_in_words(worker):
    panel = panel_of(worker)
    panel.controls["label"].value = "y"
    panel.controls["step"].value = 3
    worker.wait()
    assert panel.view.values == {"label": "y", "step": 3}
    assert panel.figure.error == "three is not drawn"
    panel.controls["step"].value = 2
    worker.wait()
    assert not panel.figure.error and "y 2 0" in panel.figure.svg


def test_the_random_button_draws_another_seed(worker):
    panel = panel_of(worker, seed=range(1000))
    worker.wait()
    (button,) = [w for w in panel.children[1].children if isinstance(w, W.Button)]
    button.click()
    worker.wait()
    seed = panel.view.values["seed"]
    assert panel.controls["seed"].value == seed and f"x 0 {seed}" in panel.figure.svg


def test_steps_can_be_played(worker):
    def draw(step, width):
        return tiles([torch.rand(1, 1, 8, 8)], title=f"step {step}", width=width)

    panel = Panel(View("A sentence.", draw, step=[60, 30, 10]), worker)
    (player,) = [w for w in panel.children[1].children if isinstance(w, W.Play)]
    assert (player.min, player.max, player.value) == (0, 2, 2)  # it shows the last step
    shown = []
    for tick in range(3):
        player.value = tick
        worker.wait()
        shown.append(panel.view.values["step"])
    assert shown == [10, 30, 60] and "step 60" in panel.figure.svg


def test_what_takes_long_is_said(worker):
    def doing(label, **values):
        return f"training for {label} ..."

    panel = Panel(View("A sentence.", draw, doing=doing, label=["x", "y"], step=range(5)), worker)
    assert panel.figure.busy and panel.figure.doing == "training for x ..."
    worker.wait()
    assert not panel.figure.busy


def test_the_next_key_goes_through_the_seeds_and_around(worker):
    panel = panel_of(worker, seed=range(3))
    seen = []
    for _ in range(4):
        panel.figure.receive({"next": True})  # what the browser sends for the key N
        worker.wait()
        seen.append(panel.view.values["seed"])
        assert panel.controls["seed"].value == seen[-1]
        assert f"x 0 {seen[-1]}" in panel.figure.svg
    assert seen == [1, 2, 0, 1] and panel.figure.next_of == "seed"


def test_the_next_key_goes_to_the_next_step_or_class(worker):
    def draw(width, **values):
        return tiles([torch.rand(1, 1, 8, 8)], title=str(values), width=width)

    def after_next(**choices):
        panel = Panel(View("A sentence.", draw, **choices), worker)
        panel.figure.receive({"next": True})
        worker.wait()
        return panel.figure.next_of, panel.view.values

    assert after_next(step=[60, 30, 10]) == ("step", {"step": 10})  # the first follows the last
    assert after_next(label=["x", "y"], who=["a", "b"]) == ("label", {"label": "y", "who": "a"})
    assert after_next() == ("", {})


def test_without_a_seed_there_is_no_random_button(worker):
    panel = panel_of(worker)
    assert not [w for w in panel.children[1].children if isinstance(w, W.Button)]


def test_a_figure_is_drawn_for_the_width_of_the_page(worker):
    panel = panel_of(worker)
    worker.wait()
    wide = panel.figure.picture.width
    panel.figure.width = 360  # as a phone's browser reports
    worker.wait()
    narrow = panel.figure.picture
    assert narrow.width < 360 / 96 + 0.01 < wide
    panel.figure.width = 370  # a scroll bar went: not worth another figure
    worker.wait()
    assert panel.figure.picture is narrow


@pytest.mark.parametrize("pixels", [200, 358, 641, 1200, 5000])
def test_figures_are_no_wider_than_the_page(pixels):
    inches = figure_inches(pixels)
    assert 3.0 <= inches <= 12.0 and (inches == 3.0 or inches * 96 <= pixels)


@pytest.mark.parametrize(
    "choices, value, kind",
    [
        (["a", "b"], "b", W.Dropdown),
        (range(3, 9), 4, W.IntSlider),
        ([4.0, 0.5], 0.5, W.SelectionSlider),
        ([False, True], True, W.Checkbox),
    ],
)
def test_each_kind_of_choice_has_its_widget(choices, value, kind):
    widget = control("name", choices, value)
    assert isinstance(widget, kind) and widget.value == value and widget.description == "name"
