"Drawing and finding without a widget."

import pytest

from dfsbir.explore.finder import Found, show_found
from dfsbir.explore.pictures import png_bytes

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
    assert is_png(png_bytes(show_found(finder)))


def found_with(finder, scores):
    "As if a search had found photos with these scores."
    finder.put([LINE])
    finder.found = [Found(None, "car", score, "file") for score in scores]
    return finder


def test_ties_are_reported(finder):
    assert "tied" not in found_with(finder, [0.9, 0.8, 0.7]).status()
    status = found_with(finder, [1.0, 1.0, 0.8, 0.5, 0.5, 0.5]).status()
    assert "5 of them are tied" in status and "gallery" in status


def test_scores_that_look_alike_get_more_digits(finder):
    def captions(*scores):
        return found_with(finder, scores).captions()

    assert captions(0.9, 0.3) == ["car\nsimilarity .90", "car\nsimilarity .30"]
    assert captions(0.9999, 0.9975) == ["car\nsimilarity .9999", "car\nsimilarity .9975"]
    assert captions(1.0, 1.0) == ["car\nsimilarity 1.0"] * 2


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
