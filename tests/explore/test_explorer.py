"The page of all panels, without a browser."

import os
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("anywidget", reason="the explorer needs pip install 'dfsbir[explore]'")

from dfsbir.core.types import MODALITIES, Modality
from dfsbir.explore.explorer import Explorer, explore, measured_images, verifiers_of
from dfsbir.explore.page import ScrollHere
from dfsbir.explore.sketch_pad import DrawPanel
from dfsbir.search.indexing import index_photos


@pytest.fixture
def page(home):
    page = explore(str(home))
    page.worker.wait()
    return page


def front(page):
    "The panel of the tab in front."
    return page.tabs.children[page.tabs.selected_index].children[0]


def look_at(page, title):
    page.tabs.selected_index = page.titles.index(title)
    page.worker.wait()
    return front(page)


def test_a_tab_is_made_when_it_is_looked_at(page):
    assert isinstance(front(page), DrawPanel)
    made = [bool(box.children) for box in page.tabs.children]
    assert made == [True] + [False] * (len(page.titles) - 1)
    panel = look_at(page, "Map")
    panel.map.chosen = 7
    page.worker.wait()
    assert panel.figure.svg


def test_the_tab_in_front_stays_when_the_run_changes(page):
    page.picker.value = "one"
    look_at(page, "Samples")
    page.picker.value = "one/paper"
    page.worker.wait()
    assert page.run.path.name == "paper" and page.titles[page.tabs.selected_index] == "Samples"
    assert isinstance(look_at(page, "Draw and find"), DrawPanel)


@pytest.mark.parametrize("file", ["encoders/sketch.safetensors", "results.csv"])
def test_a_run_that_cannot_be_read_says_so_and_the_others_open(file, home, tmp_path):
    for name in ("one", "two"):
        folder = tmp_path / name
        shutil.copytree(home / "one", folder, ignore=shutil.ignore_patterns("paper"))
    (tmp_path / "two" / file).write_bytes(b"half")
    os.utime(tmp_path / "one" / "encoders" / "photo.safetensors", (1, 1))
    page = explore(str(tmp_path))  # the newest run comes first
    assert page.picker.value == "two" and page.tabs.children == ()
    assert file.split("/")[-1] in page.facts.value
    page.picker.value = "one"
    page.worker.wait()
    assert isinstance(front(page), DrawPanel) and "classes" in page.facts.value
    compare = look_at(page, "Compare").figure.error  # of all runs, so this one stands there too
    assert file.split("/")[-1] in compare
    page.picker.value = "two"
    assert page.tabs.children == () and "classes" not in page.facts.value


def test_samples_of_a_toy_run_are_judged_by_a_network_made_for_it(page, monkeypatch, run):
    "The verifier is trained when it is asked for, by other images, and kept."
    page.picker.value = "one"
    panel = look_at(page, "Samples")
    assert "verifier" not in panel.figure.svg
    trained = []

    def train(images, **settings):
        trained.append(images)
        return run.teachers[images.modality]

    monkeypatch.setattr("dfsbir.explore.explorer.train_teacher", train)
    for verdict in ("shown", "recognises both", "shown"):
        panel.set(verifier=verdict)
        page.worker.wait()
    assert "verifier" in panel.figure.svg and [s.modality for s in trained] == list(MODALITIES)
    assert not panel.figure.error


def test_a_run_of_own_images_has_the_verifiers_of_its_folder_alone():
    own = SimpleNamespace(verifiers={}, experiment={"dataset": "folder"})
    assert verifiers_of(own) is None
    own.verifiers = {"photo": object()}
    assert verifiers_of(own)(own) == own.verifiers


def test_without_runs_there_is_nothing_to_explore(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        explore(str(tmp_path))
    with pytest.raises(ValueError, match="no finished run"):
        Explorer({}, None, None)


def test_runs_beside_the_notebooks_are_found(run, monkeypatch, tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "runs").symlink_to(run.path.parent, target_is_directory=True)
    monkeypatch.chdir(tmp_path / "nbs")
    page = explore()
    page.worker.wait()
    assert sorted(page.picker.options) == ["one", "one/paper"]


def test_without_a_run_a_tiny_one_is_made(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dfsbir.explore.explorer.tiny_run", lambda folder, report: run)
    page = explore()
    page.worker.wait()
    assert page.picker.options == ("tiny",) and isinstance(front(page), DrawPanel)


def test_a_run_on_objects_has_its_own_tabs(objects):
    page = explore(str(objects.path))
    page.worker.wait()
    assert page.titles == ["Draw and find", "Map", "Objects", "Confusion", "Curves", "Compare"]
    assert "procedural objects" in page.facts.value
    assert look_at(page, "Objects").figure.svg
    assert look_at(page, "Compare").table.value


def test_a_ceiling_is_explored(ceiling):
    page = explore(str(ceiling.path.parent))
    page.picker.value = next(name for name in page.runs if name.endswith("ceiling"))
    page.worker.wait()
    assert isinstance(front(page), DrawPanel) and "the ceiling" in page.facts.value
    for title in page.titles[2:]:
        figure = look_at(page, title).figure
        assert figure.svg and not figure.error, title


def test_the_page_moves_to_the_explorer_where_that_is_asked_for(home):
    assert [isinstance(explore(str(home), scroll=s).children[0], ScrollHere) for s in (0, 1)] == [
        0,
        1,
    ]


def test_a_tab_that_the_next_run_lacks_gives_way_to_the_first(home, objects):
    page = explore(str(home))
    page.runs["open"] = objects
    page.picker.options = [*page.picker.options, "open"]
    page.picker.value = "one"
    look_at(page, "Walk")
    page.picker.value = "open"
    page.worker.wait()
    assert page.title == "Draw and find" and isinstance(front(page), DrawPanel)


def test_a_gallery_of_another_encoder_is_reported_in_its_tab(home, sets, paper, tmp_path):
    encoder = paper.encoders[Modality.PHOTO]
    index_photos(tmp_path / "other", sets[0], encoder, progress=False)
    page = explore(str(home), str(tmp_path / "other"))
    page.picker.value = "one"
    page.worker.wait()
    assert "another photo encoder" in front(page).value


def test_test_images_of_a_run_inside_a_run_are_those_of_the_outer_one(run, paper):
    for r in (run, paper):
        photos, sketches = measured_images(r, 6)
        assert len(photos) == len(sketches) == 6 and set(photos.classes) == set(run.classes)
