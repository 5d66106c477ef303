"Figures outside of pyplot."

import matplotlib.pyplot as plt
import pytest
import torch

from dfsbir.explore.pictures import short, tiles


def test_a_picture_is_unknown_to_pyplot(is_png):
    before = plt.get_fignums()
    picture = tiles([torch.rand(3, 1, 8, 8), torch.rand(2, 3, 8, 8)], title="two rows")
    assert is_png(picture.png()) and plt.get_fignums() == before


@pytest.mark.parametrize(
    "number, text", [(0.934, ".93"), (1.0, "1.0"), (0.999, "1.0"), (0, ".00"), (-0.25, "-.25")]
)
def test_short_numbers(number, text):
    assert short(number) == text
