"Drawing and finding without a widget."

import pytest

from dfsbir.explore.finder import show_found

LINE = [[0.1, 0.2], [0.8, 0.7]]


def test_nothing_drawn_finds_nothing(finder):
    assert finder.find() == [] and "draw something" in finder.status()
    with pytest.raises(ValueError, match="nothing is drawn"):
        show_found(finder)


def test_photos_are_found_best_first(finder, is_png):
    finder.put([LINE, [], [[0.5, 0.5]]])
    assert len(finder.strokes) == 2  # an empty stroke is none, a dot is one
    found = finder.find()
    scores = [f.score for f in found]
    assert len(found) == 12 and scores == sorted(scores, reverse=True)
    assert "2 strokes" in finder.status() and "12 of 45 photos" in finder.status()
    assert is_png(show_found(finder).png())


def test_photos_of_one_class(finder):
    finder.put([LINE])
    finder.label = "car"
    assert {f.label for f in finder.find()} == {"car"}


def test_undo_and_clear(finder):
    finder.put([LINE, [[0.5, 0.5]]])
    finder.undo()
    assert finder.strokes == [LINE]
    finder.clear()
    finder.undo()
    assert finder.strokes == [] and finder.find() == []
