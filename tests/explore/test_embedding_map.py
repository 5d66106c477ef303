"Places and neighbours of the embedding map."

import pytest
import torch
from matplotlib.colors import to_rgb

from dfsbir.explore.embedding_map import EmbeddingMap, class_colours, show_map
from dfsbir.explore.pictures import png_bytes


@pytest.fixture(scope="module")
def embedding_map(run, sets):
    return EmbeddingMap(run, *sets)


def test_places_lie_on_the_plane_and_hold_the_images(embedding_map, sets):
    xy = embedding_map.xy
    assert xy.shape == (90, 2) and xy.min() >= 0 and xy.max() <= 1
    assert embedding_map.is_sketch.sum() == 45
    for i in (0, 44, 45, 89):
        assert torch.equal(embedding_map.image(i), sets[i >= 45][i % 45][0])


@pytest.mark.parametrize("sketches", [False, True])
@pytest.mark.parametrize("i", [0, 44, 45, 89])
def test_neighbours_are_the_nearest_and_never_oneself(embedding_map, i, sketches):
    vectors = embedding_map.vectors
    score = {
        j: float(vectors[i] @ vectors[j])
        for j in range(90)
        if j != i and bool(embedding_map.is_sketch[j]) == sketches
    }
    found = embedding_map.neighbours(i, sketches, 4)
    best = sorted(score.values(), reverse=True)[:4]
    assert i not in found and [score[j] for j in found] == pytest.approx(best, abs=1e-5)


def test_a_place_is_chosen_and_shown(embedding_map, is_png):
    embedding_map.choose(None)
    with pytest.raises(ValueError, match="no place is chosen"):
        embedding_map.neighbourhood()
    with pytest.raises(ValueError, match="90"):
        embedding_map.choose(90)
    embedding_map.choose(50)
    assert is_png(png_bytes(show_map(embedding_map)))
    picture = embedding_map.neighbourhood(width=4.0)
    captions = [ax.get_xlabel() for ax in picture.axes]
    name = embedding_map.names[embedding_map.label[50]]
    assert captions.count(f"{name}\nchosen") == 2
    assert sum("similarity" in text for text in captions) == 12


@pytest.mark.parametrize("n", [2, 10, 40])
def test_colours_are_readable_on_white_and_on_dark_pages(n):
    "Contrast of 3 or more, as WCAG asks of graphics."

    def luminance(colour):
        linear = [v / 12.92 if v <= 0.04 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear)) + 0.05

    colours = class_colours(n)
    assert len(set(colours)) == n
    for colour in colours:
        assert luminance("white") / luminance(colour) >= 3
        assert luminance(colour) / luminance("#111111") >= 3
