"""The base of all configs: ranges, alternatives, dotted names, and what an error must name."""

import copy
import json
import pickle
from typing import ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from dfsbir.core.config import Config, ConfigError, Setting, flatten, nearest_name, read_table


class Square(Config):
    kind: Literal["square"] = "square"
    side: int = Field(4, ge=1, le=9, description="in pixels")


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: float = Field(1.0, gt=0, description="in pixels")
    filled: bool = Field(True, description="or the rim alone")


class Pen(Config):
    width: float = Field(0.5, ge=0, lt=1, description="share of the side")
    colour: Literal["black", "red"] = Field("black", description="of the line")


class Files(Config):
    kind: Literal["files"] = "files"
    folder: str = Field(description="where the pictures lie")


class Nothing(Config):
    kind: Literal["nothing"] = "nothing"


class Drawing(Config):
    PRESETS: ClassVar[dict] = {
        "plain": {},
        "round": {"shape.kind": "circle", "shape.radius": 2.0, "pen.width": 0.1},
    }
    seed: int = Field(0, ge=0, description="of everything")
    name: str = Field("", description="of the picture")
    margin: int | None = Field(None, ge=8, description="in pixels; null: none")
    words: tuple[str, ...] = Field((), description="below the picture")
    place: tuple[float, float] = Field((0.0, 1.0), description="of the words, x and y")
    shape: Square | Circle = Field(Square(), discriminator="kind", description="what is drawn")
    pen: Pen = Field(Pen(width=0.2), description="with what")
    back: Files | Nothing | None = Field(None, discriminator="kind", description="behind it")

    @model_validator(mode="after")
    def _a_wide_pen_needs_space(self):
        if self.pen.width > 0.8 and self.margin is None:
            raise ValueError("pen.width above 0.8 needs a margin: set margin")
        return self


# ---- values


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", -1),
        ("seed", 1.0),
        ("seed", True),
        ("seed", "1"),
        ("seed", None),
        ("name", 3),
        ("name", None),
        ("margin", 7),
        ("margin", 8.5),
        ("words", "one"),
        ("words.0", [3]),
        ("place.1", [0.5, "x"]),
        ("place", [0.5]),
        ("shape.side", 0),
        ("shape.side", 10),
        ("pen.width", 1.0),
        ("pen.width", -0.1),
        ("pen.width", "0.5"),
        ("pen.width", True),
        ("pen.width", float("nan")),
        ("pen.width", float("inf")),
        ("pen.colour", "blue"),
        ("shape.kind", "triangle"),
        ("back.kind", "folders"),
    ],
)
def test_a_wrong_value_is_refused_by_its_dotted_name(name, value):
    given = {name.rstrip(".01"): value}
    with pytest.raises(ConfigError) as e:
        Drawing().changed(**given)
    assert str(e.value).startswith(name)
    if not isinstance(value, list):
        assert repr(value) in str(e.value)


def test_a_whole_number_is_good_enough_for_a_fraction():
    width = Drawing(pen={"width": 0}).pen.width
    assert width == 0.0 and type(width) is float


def test_every_mistake_is_in_one_error():
    with pytest.raises(ConfigError) as e:
        Drawing(seed=-1, nmae="x", shape={"kind": "circle", "radius": -1, "fild": 1}, pen=3)
    lines = str(e.value).splitlines()
    assert len(lines) == 5
    for name in ("seed", "'nmae'", "shape.radius", "'shape.fild'", "pen"):
        assert any(name in line for line in lines)


def test_a_required_setting_says_what_it_is():
    with pytest.raises(ConfigError, match="back.folder") as e:
        Drawing().changed(**{"back.kind": "files"})
    assert "where the pictures lie" in str(e.value)


def test_a_part_without_its_kind_names_the_kinds():
    for given in ({"back": {"folder": "x"}}, {"shape": {"side": 3}}):
        with pytest.raises(ConfigError, match="kind") as e:
            Drawing(**given)
        assert "files" in str(e.value) or "square" in str(e.value)


def test_a_rule_over_several_settings_is_checked_after_every_change():
    wide = Drawing(margin=10, pen=Pen(width=0.9))
    with pytest.raises(ConfigError, match="margin"):
        wide.changed(margin=None)
    with pytest.raises(ConfigError, match="margin"):
        Drawing().changed(**{"pen.width": 0.9})


def test_a_config_cannot_be_altered():
    drawing = Drawing()
    with pytest.raises(ValueError):
        drawing.seed = 3
    with pytest.raises(ValueError):
        drawing.pen.width = 0.3
    assert drawing == Drawing() and hash(drawing) == hash(Drawing())


def test_copies_and_pickles_are_equal():
    drawing = Drawing.preset("round", words=["a"])
    assert pickle.loads(pickle.dumps(drawing)) == drawing == copy.deepcopy(drawing)


# ---- names


@pytest.mark.parametrize(
    "given, meant",
    [
        ("sede", "seed"),
        ("pen.widht", "pen.width"),
        ("width", "pen.width"),
        ("pn.width", "pen.width"),
        ("pen_width", "pen.width"),
        ("radius", "shape.radius"),
        ("shape.kimd", "shape.kind"),
    ],
)
def test_a_misspelt_name_suggests_the_nearest(given, meant):
    with pytest.raises(ConfigError, match=f"{given}.*{meant}"):
        Drawing().changed(**{given: 1})


def test_a_name_like_no_other_lists_what_there_is():
    with pytest.raises(ConfigError) as e:
        Drawing().changed(xyzzy=1)
    assert all(s.name in str(e.value) for s in Drawing.settings())


def test_a_setting_of_another_kind_says_where_it_belongs():
    with pytest.raises(ConfigError, match="shape.radius.*shape.kind.*circle"):
        Drawing().changed(**{"shape.radius": 2.0})


def test_nearest_name_of_nothing_near():
    assert nearest_name("qqq", ["seed", "pen.width"]) is None


# ---- changes


def test_another_kind_takes_its_own_defaults():
    big = Drawing().changed(**{"shape.side": 9})
    assert big.changed(**{"shape.kind": "square"}).shape.side == 9, "the same kind changes nothing"
    assert big.changed(**{"shape.kind": "circle"}).shape == Circle()
    back = big.changed(**{"shape.kind": "circle"}).changed(**{"shape.kind": "square"})
    assert back.shape == Square()


def test_the_order_of_changes_does_not_matter():
    for changes in (
        {"shape.radius": 3.0, "shape.kind": "circle"},
        {"shape.kind": "circle", "shape.radius": 3.0},
        {"shape": {"radius": 3.0, "kind": "circle"}},
        {"shape": Circle(radius=3.0)},
    ):
        assert Drawing().changed(**changes).shape == Circle(radius=3.0)


def test_layers_are_laid_over_one_another_and_checked_once():
    drawing = Drawing().changed({"pen.width": 0.9}, {"margin": 9}, seed=2)
    assert (drawing.pen.width, drawing.margin, drawing.seed) == (0.9, 9, 2)
    assert Drawing().changed({"seed": 1}, {"seed": 2}).seed == 2


def test_an_optional_part_is_turned_on_and_off():
    on = Drawing().changed(**{"back.kind": "files", "back.folder": "x"})
    assert on.back == Files(folder="x")
    assert on.changed(back=None).back is None
    assert on.changed(**{"back.kind": "nothing"}).back == Nothing()


def test_a_change_leaves_the_rest_alone():
    before = Drawing.preset("round", name="x")
    after = before.changed(seed=5)
    assert {k for k, v in before.flat().items() if after.flat()[k] != v} == {"seed"}
    assert before.seed == 0


def test_presets():
    assert Drawing.preset("plain") == Drawing()
    assert Drawing.preset("round", **{"pen.width": 0.3}).pen.width == 0.3
    with pytest.raises(ValueError, match="round"):
        Drawing.preset("rond")


# ---- files


@pytest.mark.parametrize(
    "changes", [{}, {"back.kind": "nothing"}, {"words": ["a", "b"], "place": [0, 1]}]
)
def test_flat_and_back(changes):
    drawing = Drawing().changed(**changes)
    text = json.dumps(drawing.flat())
    assert Drawing.from_flat(json.loads(text)) == drawing
    assert all("." in k or not isinstance(v, dict) for k, v in json.loads(text).items())


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}}, "d": None, "e": [1]}) == {"a.b.c": 1, "d": None, "e": [1]}


# ---- what help texts are made of


def test_settings_describe_every_alternative():
    settings = {s.name: s for s in Drawing.settings()}
    assert list(settings) == [
        "seed",
        "name",
        "margin",
        "words",
        "place",
        "shape.kind",
        "shape.side",
        "shape.radius",
        "shape.filled",
        "pen.width",
        "pen.colour",
        "back.kind",
        "back.folder",
    ]
    assert settings["shape.radius"] == Setting(
        "shape.radius", 1.0, "a number above 0", "in pixels", {"shape": "circle"}
    )
    assert settings["pen.width"].default == 0.2, "as the whole has it, not the part by itself"
    assert settings["shape.kind"].default == "square" and settings["back.kind"].default is None
    assert settings["back.folder"].shown_default == "required"
    for name, words in {
        "seed": ("whole", "from 0 up"),
        "margin": ("from 8 up", "null"),
        "shape.side": ("from 1 to 9",),
        "words": ("texts",),
        "place": ("2 numbers",),
        "pen.width": ("from 0 to below 1",),
        "pen.colour": ("'black'", "'red'"),
        "shape.filled": ("true", "false"),
        "back.kind": ("'files'", "'nothing'", "null"),
    }.items():
        assert all(w in settings[name].wanted for w in words), settings[name]


def test_tables_for_notebooks():
    table = Drawing.settings()._repr_markdown_()
    assert all(f"`{s.name}`" in table for s in Drawing.settings())
    shown = Drawing.preset("round")._repr_markdown_()
    assert "`shape.radius` | 2.0" in shown and "shape.side" not in shown


def test_a_table_is_json_or_a_file_of_it(tmp_path):
    (tmp_path / "t.json").write_text('{"a": "b"}')
    for text in (str(tmp_path / "t.json"), '{"a": "b"}', ' {"a": "b"}'):
        assert read_table(text, "x") == {"a": "b"}
    assert read_table(" ", "x") == {}
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": "b"}')
    assert read_table(str(tmp_path / "marked.json"), "x") == {"a": "b"}  # as Windows writes it
    (tmp_path / "list.json").write_text("[1]")
    for bad in ("{a}", str(tmp_path / "none.json"), str(tmp_path), str(tmp_path / "list.json")):
        with pytest.raises(ValueError, match="the table"):
            read_table(bad, "the table")
