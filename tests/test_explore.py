"""The explorer without a browser: runs opened, pictures drawn, state apart from display, a worker that never blocks."""

import asyncio
import io
import json
import shutil
import threading
from dataclasses import asdict

import ipywidgets as W
import pytest
import torch
from PIL import Image

from dfsbir.core.checkpoint import load_state
from dfsbir.core.run_folder import RunFolder
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.trainer import CrossX
from dfsbir.explore.analysis import (
    EmbeddingMap,
    compare_runs,
    confusion,
    disagreement,
    guide_more,
    measured,
    show_map,
)
from dfsbir.explore.explorer import Explorer, explore, measured_images
from dfsbir.explore.finder import Finder, Found, show_found
from dfsbir.explore.panels import Panel, Worker
from dfsbir.explore.photo_map import map_of
from dfsbir.explore.pictures import tiles
from dfsbir.explore.runs import find_runs, tiny_run
from dfsbir.explore.samples import Run, _between, show_curves, show_step
from dfsbir.explore.sketch_pad import DrawPanel, found_html
from dfsbir.explore.views import View, views

pytest.importorskip(
    "anywidget", reason="the explorer needs anywidget and ipywidgets: pip install 'dfsbir[explore]'"
)

from dfsbir.core.types import MODALITIES, Modality
from dfsbir.data.toy import toy_pairs
from dfsbir.evaluation.results import append_results
from dfsbir.inversion.generators import PixelGenerator
from dfsbir.inversion.strokes import draw_strokes
from dfsbir.search.indexing import index_photos
from dfsbir.search.searcher import Searcher

CLASSES = ("bottle", "car", "fish")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with two runs, the second (an unconditioned one with pixel sketches) inside the first."
    top = tmp_path_factory.mktemp("runs")
    tiny_run(top / "one", classes=CLASSES, images=75, epochs=2, warmup=12, student_steps=4)
    teachers = Run(top / "one").teachers
    config = CrossXConfig.preset(
        "paper",
        device="cpu",
        photo_size=32,
        sketch_size=32,
        width=8,
        rounds=3,
        new_pairs=12,
        student_batch=12,
        batch=12,
        bank=12,
        sample_every=1,
        log_every=1,
    )
    CrossX(*teachers.values(), config).fit(
        RunFolder(top / "one" / "paper", asdict(config)), progress=False
    )
    return top


@pytest.fixture(scope="module")
def run(home):
    return Run(home / "one")


@pytest.fixture(scope="module")
def paper(home):
    return Run(home / "one" / "paper")


@pytest.fixture(scope="module")
def runs(run, paper):
    return {"one": run, "one/paper": paper}


@pytest.fixture(scope="module")
def sets():
    return toy_pairs(45, size=32, classes=CLASSES, split="test")


@pytest.fixture(scope="module")
def finder(run, sets, tmp_path_factory):
    return Finder(
        Searcher(
            index_photos(
                tmp_path_factory.mktemp("gallery"),
                sets[0],
                run.encoders[Modality.PHOTO],
                progress=False,
            ),
            run.encoders,
        )
    )


LINE = [[0.1, 0.2], [0.8, 0.7]]


def is_png(data):
    with Image.open(io.BytesIO(data)) as picture:
        return picture.format == "PNG" and min(picture.size) > 50


# runs


def test_runs_are_found_by_name_and_nothing_is_written(home, run):
    before = sorted(p for p in home.rglob("*"))
    assert list(find_runs(home)) == ["one", "one/paper"]
    assert list(find_runs(home / "one" / "paper")) == ["paper"]
    assert run.generators and run.teachers and run.encoders and run.metrics() and run.strips
    assert sorted(p for p in home.rglob("*")) == before


def test_generators_come_back_as_they_were_saved(home, run):
    "The watched pairs drawn from the loaded generators are those of the last strip of pictures."
    crossx = CrossX(*run.teachers.values(), run.config)
    crossx.load_state_dict(load_state(run.path / "checkpoints" / "last.safetensors"))
    noise, label = crossx.watched
    for m in MODALITIES:
        assert torch.equal(crossx.watch().of(m), run.generators[m](noise, label))


def test_what_is_no_run_is_refused(tmp_path, home):
    with pytest.raises(FileNotFoundError, match="is no run: wanted a folder with config.json"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"parameters": {}}))
    with pytest.raises(FileNotFoundError, match="has no folder teachers/"):
        Run(tmp_path).teachers
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        explore(str(tmp_path))
    with pytest.raises(ValueError, match="no finished run to explore"):
        Explorer({}, None, None)


def test_a_tiny_run_is_opened_again_not_made_again(home, run):
    before = (run.path / "encoders" / "photo.safetensors").stat().st_mtime_ns
    assert tiny_run(home / "one").classes == run.classes
    assert (run.path / "encoders" / "photo.safetensors").stat().st_mtime_ns == before


def test_test_images_of_a_run_inside_a_run_are_those_of_the_outer_one(run, paper):
    for r in (run, paper):
        photos, sketches = measured_images(r, 6)
        assert len(photos) == len(sketches) == 6 and set(photos.classes) == set(CLASSES)


# pictures


def test_pairs_are_reproducible_and_of_their_class(run, paper):
    a, b, c = (run.pairs("fish", 3, seed) for seed in (1, 1, 2))
    assert (
        torch.equal(a.photo, b.photo)
        and torch.equal(a.sketch, b.sketch)
        and not torch.equal(a.photo, c.photo)
    )
    label = max(CLASSES, key=lambda name: len(paper.pairs(name, 3)))
    some = paper.pairs(label, 3)
    said = sum(paper.posteriors("teacher", m, some.of(m)) for m in MODALITIES)
    assert len(some) and (said.argmax(1) == paper.classes.index(label)).all()


def test_teacher_scores_are_its_softmax(run):
    "Both teachers know the same classes in the same order, so their posterior is the softmax at the run's temperature."
    x = run.pairs("car", 4).photo
    wanted = (run.teachers[Modality.PHOTO](x).logits / run.config.temperature).softmax(1)
    torch.testing.assert_close(run.posteriors("teacher", "photo", x), wanted)


def test_every_view_draws_for_every_end_of_its_knobs(run, runs, sets):
    for title, view in views(run, lambda r: sets, runs).items():
        assert is_png(view.picture().png()), title
        view.set(**{k: v[-1] for k, v in view.knobs.items()})
        assert is_png(view.picture().png()), title


def test_views_of_an_unconditioned_pixel_run(paper, runs, sets):
    drawn = views(paper, lambda r: sets, runs)
    best = max(CLASSES, key=lambda name: len(paper.pairs(name, 3)))
    drawn["Remembered"].set(label=best)
    for title in ("Remembered", "Training", "Walk", "Guidance", "Curves"):
        assert is_png(drawn[title].picture().png()), title
    with pytest.raises(ValueError, match="pixels without strokes"):
        paper.drawing(best)


def test_a_drawing_is_what_the_generator_draws(run):
    "The polylines, drawn with a hard pen, cover the estimate's dark pixels."
    svg, strokes = run.drawing("car", 2, faint=0.0)
    assert svg.count("<path") == len(strokes) == run.config.strokes
    drawn = run.generators[Modality.SKETCH].strokes(
        torch.randn(1, run.config.latent, generator=torch.Generator().manual_seed(2)),
        torch.tensor([1]),
    )
    dark = draw_strokes(drawn, 64)[0, 0] < 0.5
    lines = torch.tensor(strokes).reshape(-1, 2)
    grid = torch.stack(
        torch.meshgrid((torch.arange(64) + 0.5) / 64, (torch.arange(64) + 0.5) / 64, indexing="xy"),
        -1,
    )[dark]
    assert len(grid) and (torch.cdist(grid, lines).min(1).values < 0.12).all()


def test_a_walk_begins_and_ends_at_its_classes(run):
    noise = torch.randn(1, run.config.latent, generator=torch.Generator().manual_seed(0))
    for m in MODALITIES:
        g = run.generators[m]
        torch.testing.assert_close(
            _between(g, 0, 2, 1.0)(noise, torch.tensor([0])), g(noise, torch.tensor([2]))
        )
        assert torch.equal(
            _between(g, 0, 2, 0.0)(noise, torch.tensor([0])), g(noise, torch.tensor([0]))
        )
        assert not torch.equal(
            _between(g, 0, 2, 0.5)(noise, torch.tensor([0])), g(noise, torch.tensor([0]))
        )


@pytest.mark.parametrize("classes, channels", [(12, 3), (4, 1), (16, 3)])
def test_a_walk_leaves_alone_what_all_classes_share(classes, channels):
    "Even where a convolution happens to have as many channels as there are classes."
    torch.manual_seed(0)
    g, noise = (
        PixelGenerator(classes, channels, 16, 8, 8).eval().requires_grad_(False),
        torch.randn(1, 8),
    )
    for p in g.tables():
        p.normal_(1, 0.3)
    torch.testing.assert_close(
        _between(g, 0, 1, 1.0)(noise, torch.tensor([0])), g(noise, torch.tensor([1]))
    )


def test_guidance_changes_copies_alone(run):
    before = {
        m: {k: v.clone() for k, v in g.state_dict().items()} for m, g in run.generators.items()
    }
    made = guide_more(run, 3.0, steps=2)
    assert guide_more(run, 3.0) is made
    for m, g in run.generators.items():
        assert all(torch.equal(v, g.state_dict()[k]) for k, v in before[m].items())
        assert any(not torch.equal(v, made[m].state_dict()[k]) for k, v in before[m].items())


def test_disagreement_is_total_variation(run):
    pairs = run.pairs("fish", 5)
    apart, said = disagreement(run, pairs)
    for i in range(5):
        slow = (
            sum(
                abs(float(said["teacher"][m][i, k]) - float(said["student"][m][i, k]))
                for m in MODALITIES
                for k in range(3)
            )
            / 4
        )
        assert apart[i].item() == pytest.approx(slow, abs=1e-6)


def test_confusion_counts_by_hand_and_leaves_strangers_out(run):
    photos, sketches = toy_pairs(
        40, size=32, classes=("fish", "cup", "bottle", "car"), split="test"
    )
    for images in (photos, sketches):
        counts, own, said, place = confusion(run, images)
        assert (
            len(place) == 30
            and images.classes[1] == "cup"
            and not (images.labels[place] == 1).any()
        )
        slow = torch.zeros(3, 3, dtype=torch.long)
        for t, p in zip(own, said.argmax(1)):
            slow[t, p] += 1
        assert torch.equal(counts, slow) and counts.sum(1).tolist() == [10, 10, 10]
    with pytest.raises(ValueError, match="no class in common"):
        confusion(run, toy_pairs(4, size=32, classes=("cup", "star"), split="test")[0])


def test_steps_and_logs_that_are_not_there(run, tmp_path):
    with pytest.raises(ValueError, match="kept pictures of steps"):
        show_step(run, 7777)
    (tmp_path / "config.json").write_text(json.dumps({"parameters": {}}))
    with pytest.raises(ValueError, match="has logged nothing"):
        show_curves(Run(tmp_path))


def test_measured_precision_of_a_run_and_of_the_one_inside_it(home, tmp_path):
    shutil.copytree(home / "one", tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    config["parameters"]["preset"] = "both"
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    outer, inner = Run(tmp_path / "one"), Run(tmp_path / "one" / "paper")
    assert measured(outer) is None and measured(inner) is None
    row = dict(dataset="toy", seed=0, metric="mAP@all", seconds=1.0, device="cpu", run_id="x")
    append_results(
        tmp_path / "one" / "results.csv",
        [
            row | {"method": "crossx-paper", "value": 0.25},
            row | {"method": "crossx-dfsbir", "value": 0.5},
        ],
    )
    assert (measured(outer), measured(inner)) == (0.5, 0.25)
    assert is_png(compare_runs(outer, inner).png())


# the map


def test_map_neighbours_are_the_nearest_and_never_oneself(run, sets):
    place = EmbeddingMap(run, *sets)
    assert place.xy.min() >= 0 and place.xy.max() <= 1 and place.sketch.sum() == 45
    for i in (0, 44, 45, 89):
        assert torch.equal(place.image(i), sets[i >= 45][i % 45][0])
        for sketches in (False, True):
            score = {
                j: float(place.vectors[i] @ place.vectors[j])
                for j in range(90)
                if j != i and bool(place.sketch[j]) == sketches
            }
            found = place.neighbours(i, sketches, 4)
            assert i not in found and [score[j] for j in found] == pytest.approx(
                sorted(score.values(), reverse=True)[:4], abs=1e-5
            )
    with pytest.raises(ValueError, match="no place is chosen"):
        place.neighbourhood()
    with pytest.raises(ValueError, match="has 90 places; found 90"):
        place.choose(90)
    place.choose(50)
    assert is_png(place.neighbourhood().png()) and is_png(show_map(place).png())
    _, widget = map_of(place)
    assert (
        len(widget.xy) == 90 * 2 * 4
        and len(widget.kind) == len(widget.label) == 90
        and widget.chosen == -1
    )
    with Image.open(io.BytesIO(widget.atlas)) as atlas:
        assert atlas.size == (25 * 32, 4 * 32)


# drawing and finding


def test_finder_finds_undoes_and_clears(finder):
    finder.clear()
    assert finder.find() == [] and "waiting: draw something" in finder.status()
    finder.put([LINE, [], [[0.5, 0.5]]])
    assert len(finder.strokes) == 2  # an empty stroke is none, a dot is one
    found = finder.find()
    assert len(found) == 12 and [f.score for f in found] == sorted(
        (f.score for f in found), reverse=True
    )
    assert finder.status().startswith("2 strokes; best 12 of 45 photos in")
    assert is_png(show_found(finder).png())
    finder.label = "car"
    assert {f.label for f in finder.find()} == {"car"}
    finder.label = None
    finder.undo()
    assert finder.strokes == [LINE]
    finder.clear()
    finder.undo()
    assert finder.strokes == [] and finder.find() == []
    with pytest.raises(ValueError, match="nothing is drawn yet"):
        show_found(finder)


def test_cards_escape_what_files_are_called():
    picture = Image.new("RGB", (8, 8))
    cards = found_html([Found(picture, "<b>", 0.5, 'a"><script>.jpg')], 3)
    assert "<script>" not in cards and "&lt;b&gt; .50" in cards


def test_view_refuses_what_its_knobs_do_not_know():
    view = View(lambda a, b: (a, b), a=["x", "y"], b=range(3))
    assert view.picture() == ("x", 0)
    view.set(b=2)
    assert view.picture() == ("x", 2)
    with pytest.raises(ValueError, match="there is no knob 'c'"):
        view.set(c=1)
    with pytest.raises(ValueError, match="b is one of"):
        view.set(a="y", b=9)
    assert view.values == {"a": "x", "b": 2}  # nothing is half set


# the worker


def test_worker_keeps_the_latest_of_each_asker():
    worker, gate, done = Worker(pause=0.0), threading.Event(), []
    worker.submit("a", gate.wait, lambda result, error: done.append("gate"))
    while not worker.busy:
        pass
    for i in range(50):
        worker.submit("a", lambda i=i: i, lambda result, error: done.append(result))
    worker.submit("b", lambda: 1 / 0, lambda result, error: done.append(type(error)))
    assert done == []  # asking comes back at once, though the thread is held
    gate.set()
    worker.wait()
    assert done == ["gate", 49, ZeroDivisionError]


def test_worker_delivers_on_the_loop_of_who_asked():
    worker, threads = Worker(pause=0.0), []

    async def kernel():
        worker.submit(
            "a",
            threading.get_ident,
            lambda result, error: threads.append((result, threading.get_ident())),
        )
        ticks = 0
        while not threads:
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks

    assert asyncio.run(kernel()) >= 1
    ((worked, delivered),) = threads
    assert delivered == threading.get_ident() != worked


@pytest.mark.filterwarnings("ignore:an answer could not be shown")
def test_worker_survives_a_closed_loop_and_a_failing_delivery():
    worker, done = Worker(pause=0.0), []

    async def leave():
        worker.submit("a", lambda: 1, lambda result, error: done.append("lost"))

    asyncio.run(leave())
    worker.submit("b", lambda: 2, lambda result, error: 1 / 0)
    worker.submit("c", lambda: 3, lambda result, error: done.append(result))
    worker.wait()
    assert done[-1] == 3
    worker.submit("d", threading.Event().wait, print)
    with pytest.raises(TimeoutError, match="still at work"):
        worker.wait(0.05)


# widgets, without a browser


def test_draw_panel_searches_puts_undoes_and_clears(run, finder):
    worker = Worker(pause=0.0)
    finder.clear()
    panel = DrawPanel(run, finder, worker)
    panel.pad.strokes = [LINE]
    worker.wait()
    assert panel.predict_log_probs.value.count("<img") == 12 and panel.status.value.startswith(
        "1 stroke;"
    )
    buttons = {name: b for b in find_widgets(panel, W.Button) for name in b._dom_classes}
    buttons["dfs-put"].click()
    worker.wait()
    assert (
        panel.pad.strokes
        == finder.strokes
        == [[list(p) for p in line] for line in run.drawing(run.classes[0], 0)[1]]
    )
    buttons["dfs-undo"].click()
    worker.wait()
    assert len(panel.pad.strokes) == len(run.drawing(run.classes[0], 0)[1]) - 1
    buttons["dfs-clear"].click()
    worker.wait()
    assert panel.pad.strokes == [] and panel.predict_log_probs.value.count("<img") == 0
    panel.pad.strokes = [[[5.0, 5.0], [6.0, 6.0]]]  # strokes outside the canvas: said, not raised
    worker.wait()
    assert "no stroke touches the canvas" in panel.status.value


def test_panel_turns_its_view_and_shows_errors():
    worker = Worker(pause=0.0)

    def draw(label, step):
        if step == 3:
            raise ValueError("three is not drawn")
        return tiles([torch.rand(2, 1, 8, 8)], title=label)

    panel = Panel(View(draw, label=["x", "y"], step=range(5)), worker)
    worker.wait()
    assert is_png(panel.image.value) and panel.status.value == ""
    panel.controls["label"].value = "y"
    panel.controls["step"].value = 3
    worker.wait()
    assert (
        panel.view.values == {"label": "y", "step": 3}
        and panel.status.value == "three is not drawn"
    )


def test_explorer_makes_a_tab_when_it_is_looked_at(home):
    page = explore(str(home))
    page.worker.wait()
    assert isinstance(page.tabs.children[0].children[0], DrawPanel)
    assert [bool(box.children) for box in page.tabs.children] == [True] + [False] * (
        len(page.titles) - 1
    )
    page.tabs.selected_index = page.titles.index("Map")
    page.worker.wait()
    spot = page.tabs.children[1].children[0]
    spot.map.chosen = 7
    page.worker.wait()
    assert is_png(spot.image.value) and spot.status.value.startswith("photo 7, ")
    page.tabs.selected_index = page.titles.index("Remembered")
    page.worker.wait()
    page.picker.value = "one/paper"
    page.worker.wait()
    assert page.run.path.name == "paper" and page.titles[page.tabs.selected_index] == "Remembered"
    page.tabs.selected_index = 0
    page.worker.wait()
    assert isinstance(page.tabs.children[0].children[0], DrawPanel)


def test_without_a_run_a_tiny_one_is_made(run, monkeypatch, tmp_path):
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    monkeypatch.setattr("dfsbir.explore.runs.tiny_run", lambda folder: run)
    page = explore()
    page.worker.wait()
    assert page.picker.options == ("tiny",) and isinstance(
        page.tabs.children[0].children[0], DrawPanel
    )
    (tmp_path / "runs").symlink_to(run.path.parent, target_is_directory=True)
    page = explore()  # runs/ beside nbs/ is found from nbs/
    page.worker.wait()
    assert page.picker.options == ("one", "one/paper")


def test_a_gallery_of_another_encoder_is_said_where_the_paper_would_be(home, sets, paper, tmp_path):
    index_photos(tmp_path / "other", sets[0], paper.encoders[Modality.PHOTO], progress=False)
    page = explore(str(home), str(tmp_path / "other"))
    page.worker.wait()
    (note,) = page.tabs.children[0].children
    assert "was made by another photo encoder" in note.value


def find_widgets(box, kind):
    "All widgets of a kind below a box."
    own = [box] if isinstance(box, kind) else []
    return own + [w for child in getattr(box, "children", ()) for w in find_widgets(child, kind)]
