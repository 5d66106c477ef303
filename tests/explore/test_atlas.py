"""The atlas: pages sorted by confidence, one HTML file that is whole, escaped and small."""

import html.parser
import re
from argparse import Namespace

import pytest
import torch

from dfsbir.app.atlas import atlas_command
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES, Modality
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.explore.atlas import (
    AtlasPage,
    AtlasRow,
    atlas_page,
    atlas_view,
    class_pairs,
    last_terms,
    measured_images,
    show_atlas,
)
from dfsbir.explore.atlas_html import atlas_html, thumbnail, write_atlas
from dfsbir.explore.runs import Run

EVIL = "<script>alert('x')</script> & \"co\""


COLD = {
    "device": "cpu",
    "pairs.photo.size": 32,
    "pairs.sketch.size": 16,
    "pairs.batch": 9,
    "schedule.distill_steps": 1,
    "students.batch": 3,
    "students.net": "dfsbir/tiny",
    "logging.log_every": 1,
}


def cold_run(home, name, changes):
    "A run of cold students in the folder of the first run, removed again afterwards."
    config = CrossXConfig.preset("cold", {**changes, **COLD})
    folder = home / "one" / name
    with RunFolder(folder, config.flat()) as run:
        build_crossx(*Run(home / "one").teachers.values(), config).fit(run, progress=False)
    yield Run(folder)
    for file in sorted(folder.rglob("*"), reverse=True):  # other tests count the runs
        file.unlink() if file.is_file() else file.rmdir()
    folder.rmdir()


@pytest.fixture(scope="module")
def cold(home):
    "On pictures of a pyramid, which are in its buffer."
    sizes = {"schedule.new_pairs": 9, "buffer.capacity": 9}
    yield from cold_run(home, "cold", {"pairs.steps": 2, **sizes})


@pytest.fixture(scope="module")
def evolved(home):
    "On drawings that evolved."
    sizes = {"schedule.new_pairs": 90, "buffer.capacity": 90}
    kind = {"pairs.kind": "evolved", "pairs.elites": 2, "students.teach": "sketch"}
    yield from cold_run(home, "evolved", {**kind, **sizes})


def row(n, channels=3, side=32, **more):
    return AtlasRow(torch.rand(n, channels, side, side), torch.linspace(1, 0, n), **more)


# ---- pages


@pytest.mark.parametrize("kind", ["run", "cold"])
def test_the_most_confident_come_first(request, kind):
    run = request.getfixturevalue(kind)
    page = atlas_page(run, "car", n=2, candidates=3)
    pairs = class_pairs(run, "car", 3)
    assert page.candidates == len(pairs) == 3
    assert (pairs.label == run.classes.index("car")).all()
    for m in MODALITIES:
        own = run.posteriors("teacher", m, pairs.of(m))[:, run.classes.index("car")]
        best = own.sort(descending=True).values[:2]
        torch.testing.assert_close(page.rows[m].confidence, best)
        assert page.rows[m].verified is None and page.rows[m].nearest is None


def test_pictures_of_the_buffer_are_those_that_were_taught(cold):
    pairs = class_pairs(cold, "fish", 99)
    assert len(pairs) == 3 and pairs.sketch.shape[-1] == 16
    assert {"photo/class", "sketch/class"} <= set(last_terms(cold))


def test_an_atlas_of_drawings_that_evolved_shows_the_latest_and_no_photo(evolved):
    page = atlas_page(evolved, "fish", n=2, candidates=4)
    assert set(page.rows) == {Modality.SKETCH} and page.candidates == 4
    kept = evolved.computed("kept pairs", lambda: pytest.fail("the pairs were read before"))
    latest = kept.sketch[kept.label == evolved.classes.index("fish")][-4:]
    assert torch.equal((class_pairs(evolved, "fish", 4).sketch * 255).round().byte(), latest)
    assert "elites" in last_terms(evolved)
    assert evolved.learnt_from == "drawings that evolved"


def test_the_verifiers_word_and_the_nearest_photo(run, sets):
    judge = run.teachers[Modality.PHOTO]
    page = atlas_page(run, "fish", 3, 6, sets[0], {Modality.PHOTO: judge})
    photo = page.rows[Modality.PHOTO]
    assert (photo.verified[photo.recognised] >= 1 / 3).all(), "the largest of three"
    assert (photo.verified[~photo.recognised] <= 1 / 2).all()
    assert len(photo.nearest) == 3 and photo.nearest[0][1] in run.classes
    assert page.rows[Modality.SKETCH].verified is None
    text = atlas_html([page], "a")
    assert text.count("verifier ") == 3 and "recognised by the verifier" in text
    assert text.count("similarity ") == 3


def test_a_verifier_that_does_not_know_the_class_says_nothing(run):
    class Other:
        classes = ["zebra"]

    assert (
        atlas_page(run, "fish", 2, 2, verifiers={"photo": Other()}).rows["photo"].verified is None
    )


def test_runs_of_which_no_atlas_can_be_made(objects):
    with pytest.raises(ValueError, match="objects"):
        atlas_page(objects, objects.classes[0])


def test_a_class_without_a_picture(run, monkeypatch):
    empty = class_pairs(run, "fish", 2)[:0]
    monkeypatch.setattr("dfsbir.explore.atlas.class_pairs", lambda *a: empty)
    page = atlas_page(run, "fish")
    assert not page.rows and "no picture" in atlas_html([page], "a")
    with pytest.raises(ValueError, match="fish"):
        show_atlas(run, "fish")


def test_the_tab_of_the_explorer(cold, run, sets):
    view = atlas_view(cold, lambda run: sets)
    assert list(view.choices["class"]) == sorted(cold.classes) and "verifier" not in view.choices
    assert len(view.picture().axes) == 6
    view.set(**{"beside the nearest test photo": True, "class": "fish"})
    assert len(view.picture().axes) == 9
    judged = atlas_view(cold, lambda run: sets, lambda _: run.teachers)
    judged.set(verifier=True)
    assert len(judged.picture().axes) == 6


# ---- the file


class Reader(html.parser.HTMLParser):
    "Tags that are not closed, ids, links and addresses of pictures."

    VOID = ("meta", "img", "input", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.sources = [], [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.sources += [found["src"]] if "src" in found else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(text):
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def pages():
    both = {Modality.PHOTO: row(4), Modality.SKETCH: row(4, 1)}
    return [AtlasPage("ant", both, 9), AtlasPage(EVIL, both, 9), AtlasPage("cow", {}, 0)]


def test_every_link_leads_to_a_class_and_nothing_leads_out():
    text = atlas_html(pages(), "Atlas", ["a line"])
    reader = read(text)
    assert sorted(set(reader.links)) == ["#c0", "#c1", "#c2", "#index"]
    assert set(reader.ids) == {"index", "count", "c0", "c1", "c2"}
    assert all(source.startswith("data:image/jpeg;base64,") for source in reader.sources)
    assert not re.search(r"https?:|@import|url\(", text)
    assert text.count("<script>") == 1


def test_names_are_escaped_everywhere():
    text = atlas_html(pages(), EVIL, [EVIL])
    read(text)
    assert EVIL not in text and "alert('x')" not in text
    assert text.count("&lt;script&gt;") >= 5


def test_a_run_without_sketches():
    text = atlas_html([AtlasPage("ant", {Modality.PHOTO: row(2)}, 2)], "a")
    read(text)
    assert "Photos" in text and "Drawings" not in text and "sketch" not in text


def test_an_atlas_has_a_class():
    with pytest.raises(ValueError, match="at least"):
        atlas_html([], "a")


def test_thumbnails_are_small_whatever_the_picture():
    noise = torch.rand(3, 224, 224)
    assert len(thumbnail(noise)) < 14_000 and len(thumbnail(noise, 48)) < 4_500
    assert len(thumbnail(torch.rand(1, 20, 30) * 3 - 1)) < 3_000


def test_the_file_stays_within_its_bound():
    "Noise is the worst case: eight photos and eight drawings of 96 px."
    noisy = {Modality.PHOTO: row(8, side=96), Modality.SKETCH: row(8, 1, side=96)}
    assert len(atlas_html([AtlasPage("ant", noisy, 8)] * 3, "a")) < 3 * 180_000 + 20_000


def test_the_command_writes_the_run(home, run, tmp_path, capsys):
    out = tmp_path / "atlas.html"
    args = Namespace(run=home / "one", out=out, photos="", no_photos=False, images=2, candidates=4)
    assert atlas_command(args) == 0
    reader = read(out.read_text(encoding="utf-8"))
    assert {"c0", "c1", "c2"} <= set(reader.ids)
    assert "3 classes" in capsys.readouterr().out
    args.no_photos = True
    atlas_command(args)
    assert "Nearest" not in out.read_text(encoding="utf-8")
    args.images = 0
    with pytest.raises(ValueError, match="--images"):
        atlas_command(args)


def test_photos_of_a_named_folder(home, tmp_path, sets):
    from torchvision.utils import save_image

    for name in ("car", "fish"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        save_image(sets[0][0][0].float(), tmp_path / "photos" / name / "1.png")
    args = Namespace(run=home / "one", out=tmp_path / "a.html", no_photos=False)
    args.photos, args.images, args.candidates = str(tmp_path / "photos"), 2, 2
    assert atlas_command(args) == 0
    assert "Nearest" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_what_a_finished_run_without_verifier_says(run, tmp_path):
    text = write_atlas(run, tmp_path / "a.html", 1, 1).read_text(encoding="utf-8")
    assert "No verifier" in text
    photos, sketches = measured_images(run, 6)
    assert len(photos) == len(sketches) == 6
