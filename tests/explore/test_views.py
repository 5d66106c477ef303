"Views: every figure for every end of its controls, at every width."

import json
import shutil

import pytest

from dfsbir.crossx.config import CrossXConfig
from dfsbir.explore.pictures import png_bytes
from dfsbir.explore.runs import Run
from dfsbir.explore.samples import sample_pairs
from dfsbir.explore.views import ABOUT, View, views


def test_every_view_draws_for_every_end_of_its_controls(run, runs, sets):
    found = views(run, lambda run: sets, runs)
    samples = found["Samples"]
    samples.choices = {**samples.choices, "teachers at least": [0.0]}  # these ones are not sure
    for title, view in found.items():
        assert view.picture(width=9.0).svg().count('<g id="axes'), title
        view.set(**{name: choices[-1] for name, choices in view.choices.items()})
        assert view.picture(width=3.5).svg().count('<g id="axes'), title


def test_every_view_says_what_it_shows_and_what_to_look_for(run, runs, sets, objects):
    for shown in (run, objects):
        for title, view in views(shown, lambda run: sets, runs).items():
            assert view.about == ABOUT[title] and "Look" in view.about and len(view.about) > 80


def test_views_of_an_unconditioned_pixel_run(paper, runs, sets, is_png):
    found = views(paper, lambda run: sets, runs)
    best = max(paper.classes, key=lambda name: len(sample_pairs(paper, name, 3)))
    found["Samples"].set(**{"class": best})
    for title in ("Samples", "Training", "Walk", "Guidance", "Curves"):
        assert is_png(png_bytes(found[title].picture())), title


def test_views_of_a_run_on_objects(objects, sets, is_png):
    found = views(objects, lambda run: sets)
    assert list(found) == ["Objects", "Confusion", "Curves", "Compare"]
    for title, view in found.items():
        assert is_png(png_bytes(view.picture())), title
    assert "objects" in found["Compare"].table(**found["Compare"].values)


def test_views_of_a_run_on_a_pyramid(home, tmp_path, sets):
    "It has saved pictures, but no generators that could make others."
    folder = tmp_path / "cold"
    shutil.copytree(home / "one", folder, ignore=shutil.ignore_patterns("paper"))
    config = json.loads((folder / "config.json").read_text())
    config["crossx"] = CrossXConfig.preset("cold").flat()
    (folder / "config.json").write_text(json.dumps(config))
    found = views(Run(folder), lambda run: sets)
    assert list(found) == ["Training", "Confusion", "Curves", "Compare"]
    assert found["Training"].picture().svg().count("<image") == 32


def test_view_refuses_what_is_no_choice():
    view = View("about", lambda a, b, width: (a, b, width), a=["x", "y"], b=range(3))
    assert view.picture(4.0) == ("x", 0, 4.0)
    view.set(b=2)
    assert view.picture() == ("x", 2, 9.0)
    with pytest.raises(ValueError, match="'c'"):
        view.set(c=1)
    with pytest.raises(ValueError, match="b is one of"):
        view.set(a="y", b=9)
    assert view.values == {"a": "x", "b": 2}  # nothing is half set
