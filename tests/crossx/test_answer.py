"The answer of an experiment: the best of each kind, its sentence, its chart."

import pytest

from dfsbir.crossx.answer import answer_in_words, best_of_each_kind, show_answer

VALUES = {
    ("data-dependent", ""): 0.9,
    ("crossx-paper", ""): 0.5,
    ("crossx-dfsbir", "open"): 0.8,
    ("teacher-features", ""): 0.3,
    ("teacher-posteriors", "mirror"): 0.7,
    ("random", ""): 0.1,
}


def test_the_best_of_each_kind_from_floor_to_ceiling():
    best = best_of_each_kind(VALUES)
    assert [b.value for b in best.values()] == [0.1, 0.7, 0.8, 0.9]
    assert best["ours"].name == "crossx-dfsbir open"


@pytest.mark.parametrize("missing", ["random", "teacher", "crossx", "data-dependent"])
def test_what_was_not_measured_is_left_out(missing):
    some = {key: value for key, value in VALUES.items() if not key[0].startswith(missing)}
    assert len(best_of_each_kind(some)) == 3
    assert best_of_each_kind({}) == {}


def test_the_sentence_has_every_number_and_what_it_is_of():
    text = answer_in_words(best_of_each_kind(VALUES), "pets", 1200, 3400)
    for word in ("pets", "1,200", "3,400", "0.100", "0.700", "0.800", "0.900"):
        assert text.count(word) == 1, word
    assert "teacher-posteriors mirror" in text and "crossx-dfsbir open" in text
    assert text.endswith(".") and text.count(". ") == 0, "one sentence"


def test_without_a_number_of_ours_there_is_no_answer():
    some = {key: value for key, value in VALUES.items() if not key[0].startswith("crossx")}
    with pytest.raises(ValueError, match="ours"):
        answer_in_words(best_of_each_kind(some), "pets", 1, 1)


def test_the_chart_has_a_bar_for_each_kind():
    best = best_of_each_kind(VALUES)
    (ax,) = show_answer(best).axes
    assert [bar.get_width() for bar in ax.patches] == [b.value for b in best.values()]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert all(name in label for (name, label) in zip(best, labels, strict=True))
