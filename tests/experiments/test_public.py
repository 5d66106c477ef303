"""The notebook of two public classifiers on a made-up miniature: from two files to its rows."""

import json

import matplotlib
import pytest
import torch
from conftest import ROOT
from IPython.core.interactiveshell import InteractiveShell
from torchvision.utils import save_image

from dfsbir.core.types import Normalizer
from dfsbir.data.toy import toy_pairs
from dfsbir.evaluation.results import read_results
from dfsbir.teachers.loading import save_teacher
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher

SHARED, UNSEEN = ("cup", "fish", "house"), ("boat", "key")
CHANGES = {
    "pairs.photo.size": 16,
    "pairs.sketch.size": 16,
    "pairs.steps": 2,
    "pairs.batch": 6,
    "schedule.new_pairs": 6,
    "schedule.distill_steps": 2,
    "buffer.capacity": 6,
    "students.net": "dfsbir/tiny",
    "students.sketch_net": "dfsbir/tiny",
    "students.batch": 4,
    "logging.sample_every": 1,
    "logging.log_every": 1,
}


def write_folder(folder, images):
    "Class folders of an image set."
    for i, (pixels, label) in enumerate(images):
        target = folder / images.classes[label]
        target.mkdir(parents=True, exist_ok=True)
        save_image(pixels.float(), target / f"{i}.png")


def write_world(top):
    "Two classifiers of different names, a table, galleries and drawings."
    torch.manual_seed(0)
    card = {"source": "dfsbir", "name": "tiny"}
    photo_names = ["mug", "fish", "house", "teacup", "star"]  # a star that is none of the drawn
    net = build_net("dfsbir", "tiny", 5)
    save_teacher(
        Teacher(net, photo_names, Normalizer(16), "photo", card=card), top / "p.safetensors"
    )
    sketch_net = build_net("dfsbir", "grey", 6).eval()
    torch.jit.trace(sketch_net, torch.rand(2, 1, 16, 16)).save(str(top / "s.ts"))
    sketch_card = {
        "classes": [*SHARED, "star", *UNSEEN],
        "input": {"size": 16, "channels": 1, "mean": [0.5], "std": [0.5]},
    }
    (top / "s.json").write_text(json.dumps(sketch_card))
    places = {"cup": [0, 3], "fish": [1], "house": [2]}
    table = {c: {"imagenet": places[c], "quickdraw": c} for c in SHARED}
    (top / "table.json").write_text(json.dumps({"classes": table}))
    photos, _ = toy_pairs(4, size=28, classes=SHARED[:2], split="test")
    write_folder(top / "gallery", photos)
    photos, _ = toy_pairs(4, size=28, classes=UNSEEN, split="test")
    write_folder(top / "unseen", photos)
    for classes in (SHARED, UNSEEN):
        write_folder(top / "drawings", toy_pairs(6, size=28, classes=classes, split="test")[1])


def run_cells(parameters):
    "The notebook's cells in this process, with these parameters; gives what they leave behind."
    path = ROOT / "nbs" / "experiments" / "public.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    injected = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    shell = InteractiveShell()
    shell.user_ns["In"] = ["", sources[0], injected]
    for source in (sources[0], injected, *sources[1:]):
        shell.run_cell(source).raise_error()
    return shell.user_ns


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_notebook_on_a_made_up_pair(tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_world(tmp_path)
    parameters = {
        "photo_teacher": "p.safetensors",
        "sketch_teacher": "s.ts",
        "sketch_card": "s.json",
        "pen": 0.05,
        "class_table": "table.json",
        "gallery": "gallery",
        "unseen_gallery": "unseen",
        "drawings": "drawings",
        "name": "made",
        "size": 16,
        "changes": json.dumps(CHANGES),
        "device": "cpu",
        "run_folder": "out",
    }
    scope = run_cells(parameters)
    assert sorted(scope["first"].classes) == sorted(SHARED)
    assert scope["renamed"] == ["star (photo)"]
    assert scope["first"].encoders["sketch"].normalizer.pen == 0.05
    rows = {(r["dataset"], r["method"], r["variant"]) for r in read_results("out/results.csv")}
    for dataset in ("made", "made/photo-unseen"):
        for method, variant in (
            ("random", ""),
            ("teacher-logits", ""),
            ("teacher-posteriors", ""),
            ("crossx-dfsbir", "cold"),
        ):
            assert (dataset, method, variant) in rows
    assert ("made", "teacher-posteriors", "classes of the gallery") in rows
    assert ("made", "crossx-dfsbir", "cold, classes of the gallery") in rows
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert set(record["reached"]) == {"cold", "cold, classes of the gallery"}
    assert record["costs"]["photo student (cold)"]["multiplications"] > 0

    again = {**parameters, "pairs_from": "out/two", "run_folder": "again"}
    run_cells(again)
    made, taken = (
        (tmp_path / run / "two" / "metrics.jsonl").read_text() for run in ("out", "again")
    )
    assert "estimator/" in made and "estimator/" not in taken and "student/" in taken
