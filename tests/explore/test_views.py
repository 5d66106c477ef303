"Views: every figure for every end of its controls."

import pytest

from dfsbir.explore.samples import sample_pairs
from dfsbir.explore.views import View, views


def test_every_view_draws_for_every_end_of_its_controls(run, runs, sets, is_png):
    for title, view in views(run, lambda run: sets, runs).items():
        assert is_png(view.picture().png()), title
        view.set(**{name: choices[-1] for name, choices in view.choices.items()})
        assert is_png(view.picture().png()), title


def test_views_of_an_unconditioned_pixel_run(paper, runs, sets, is_png):
    found = views(paper, lambda run: sets, runs)
    best = max(paper.classes, key=lambda name: len(sample_pairs(paper, name, 3)))
    found["Samples"].set(label=best)
    for title in ("Samples", "Training", "Walk", "Guidance", "Curves"):
        assert is_png(found[title].picture().png()), title


def test_view_refuses_what_is_no_choice():
    view = View(lambda a, b: (a, b), a=["x", "y"], b=range(3))
    assert view.picture() == ("x", 0)
    view.set(b=2)
    assert view.picture() == ("x", 2)
    with pytest.raises(ValueError, match="'c'"):
        view.set(c=1)
    with pytest.raises(ValueError, match="b is one of"):
        view.set(a="y", b=9)
    assert view.values == {"a": "x", "b": 2}  # nothing is half set
