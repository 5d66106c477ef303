"Names that may mean the same are offered, with a reason, and never taken."

import json
import os
from pathlib import Path

import pytest

from dfsbir.teachers.class_map import align_classes, match_classes, plain_name
from dfsbir.teachers.shared_names import OFFERED, alias_table, offer_aliases
from dfsbir.teachers.zoo import imagenet_names

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = Path(os.environ.get("DFSBIR_DATA", ROOT.parent / "shared" / "data")) / "public181"

PAIRS = [
    ("crane (517)", "Crane", "note"),
    ("jersey, T-shirt", "t_shirt", "list"),
    ("fire truck", "firetruck", "blanks"),
    ("flip-flop", "flip flops", "number"),
    ("leaves", "leaf", "number"),
    ("sofa", "couch", "synonym"),
    ("acoustic_guitar", "guitar", "last word"),
    ("wall clocks", "clock", "last word"),
    ("Chihuahua", "dog", "ImageNet group"),
    ("tennis racket", "tennis racquet", "spelling"),
]


@pytest.mark.parametrize("own, other, why", PAIRS)
@pytest.mark.parametrize("swapped", [False, True])
def test_every_rule_in_both_directions(own, other, why, swapped):
    both = (["unicorn", own], [other, "zzz"])
    offers = offer_aliases(*(reversed(both) if swapped else both))
    assert [(o.why, {o.own, o.shared}) for o in offers] == [(why, {own, other})]


def test_nothing_is_taken_before_a_person_says_so():
    photo, sketch = ["sports car", "hot dog", "cup"], ["car", "dog", "cup"]
    offers = offer_aliases(photo, sketch)
    table = json.loads(json.dumps(alias_table(offers, {"mug": "cup"})))
    assert table["mug"] == "cup"
    assert match_classes(photo, sketch, table).classes == ["cup"]
    accepted = {name.removeprefix(OFFERED): to for name, to in table.items() if to != "dog"}
    assert set(match_classes(photo, sketch, accepted).classes) == {"car", "cup"}
    assert [o.own for o in offer_aliases(photo, sketch, accepted)] == ["hot dog"]


def test_vocabularies_without_anything_in_common():
    assert offer_aliases(["unicorn"], ["zzz"]) == []
    assert match_classes(["unicorn"], ["zzz"]).classes == []
    with pytest.raises(ValueError, match="dfsbir inspect"):
        align_classes(["unicorn"], ["zzz"])


def test_equal_names_are_not_offered():
    assert offer_aliases(["Cup", "ice-cream"], ["cup", "ice_cream"]) == []


def test_most_of_what_a_person_matched_is_offered():
    if not PUBLIC.is_dir():
        pytest.skip(f"real data: no folder {PUBLIC}")
    by_hand = json.loads((PUBLIC / "class_map.json").read_text())["classes"].values()
    drawn = json.loads((PUBLIC / "sketch_teacher.json").read_text())["classes"]
    names = imagenet_names()
    matched = {(names[i], row["quickdraw"]) for row in by_hand for i in row["imagenet"]}
    equal = {(n, c) for n in names for c in drawn if plain_name(n) == plain_name(c)}
    offers = {(o.own, o.shared) for o in offer_aliases(names, drawn)}
    left = matched - equal
    assert len(offers & left) > 0.85 * len(left)
    assert len({c for _, c in (offers | equal) & matched}) >= 150
    assert len(offers - left) < 0.3 * len(offers)
