"""Runs, test images and a gallery of the toy set, small enough to be made by every process."""

import io
import shutil

import pytest
from PIL import Image

from dfsbir.baselines import data_dependent
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import Modality
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.data.toy import toy_pairs
from dfsbir.explore.finder import Finder
from dfsbir.explore.runs import Run, tiny_run
from dfsbir.search.indexing import index_photos
from dfsbir.search.searcher import Searcher
from dfsbir.teachers.loading import save_teacher

CLASSES = ("bottle", "car", "fish")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    "A folder with two runs, the second (unconditioned, with pixel sketches) inside the first."
    top = tmp_path_factory.mktemp("runs")
    tiny_run(top / "one", classes=CLASSES, images=75, epochs=2, warmup=12, student_steps=4)
    teachers = Run(top / "one").teachers
    config = CrossXConfig.preset(
        "paper",
        {
            "device": "cpu",
            "pairs.photo.size": 32,
            "pairs.photo.width": 8,
            "pairs.sketch.size": 32,
            "pairs.sketch.width": 8,
            "pairs.batch": 12,
            "buffer.capacity": 12,
            "schedule.rounds": 3,
            "schedule.new_pairs": 12,
            "students.batch": 12,
            "logging.sample_every": 1,
            "logging.log_every": 1,
        },
    )
    folder = RunFolder(top / "one" / "paper", config.flat())
    build_crossx(*teachers.values(), config).fit(folder, progress=False)
    return top


@pytest.fixture(scope="session")
def objects(home, tmp_path_factory):
    "A run of preset `open`, which learnt from procedural objects; it has no estimators."
    config = CrossXConfig.preset(
        "open",
        {
            "device": "cpu",
            "pairs.photo.size": 32,
            "pairs.sketch.size": 32,
            "buffer.capacity": 32,
            "schedule.new_pairs": 32,
            "schedule.distill_steps": 2,
            "students.batch": 16,
            "logging.log_every": 1,
        },
    )
    teachers = Run(home / "one").teachers
    outer = tmp_path_factory.mktemp("objects")
    for m, teacher in teachers.items():
        save_teacher(teacher, outer / "teachers" / f"{m}.safetensors")
    with RunFolder(outer / "open", config.flat()) as folder:
        build_crossx(*teachers.values(), config).fit(folder, progress=False)
    return Run(outer / "open")


@pytest.fixture(scope="session")
def ceiling(home, tmp_path_factory):
    "A run whose newest part is the ceiling, made of real images, as `dfsbir run` leaves it."
    top = tmp_path_factory.mktemp("measured") / "one"
    shutil.copytree(home / "one", top, ignore=shutil.ignore_patterns("paper"))
    teachers = Run(top).teachers.values()
    config = CrossXConfig.preset(
        "dfsbir",
        {
            "device": "cpu",
            "schedule.new_pairs": 32,
            "schedule.distill_steps": 2,
            "logging.log_every": 1,
        },
    )
    real = toy_pairs(45, size=32, classes=CLASSES, seed=5)
    trainer = data_dependent(*teachers, config, *real)
    with RunFolder(top / "ceiling", trainer.config.flat()) as folder:
        trainer.fit(folder, progress=False)
    return Run(top / "ceiling")


@pytest.fixture(scope="session")
def run(home):
    return Run(home / "one")


@pytest.fixture(scope="session")
def paper(home):
    "The unconditioned run."
    return Run(home / "one" / "paper")


@pytest.fixture(scope="session")
def runs(run, paper):
    return {"one": run, "one/paper": paper}


@pytest.fixture(scope="session")
def sets():
    "Test photos and test sketches, 45 each."
    return toy_pairs(45, size=32, classes=CLASSES, split="test")


@pytest.fixture
def is_png():
    "Whether bytes are a PNG file with a picture in it."

    def check(data):
        with Image.open(io.BytesIO(data)) as picture:
            return picture.format == "PNG" and min(picture.size) > 50

    return check


@pytest.fixture(scope="session")
def gallery(run, sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    return index_photos(folder, sets[0], run.encoders[Modality.PHOTO], progress=False)


@pytest.fixture
def finder(run, gallery):
    return Finder(Searcher(gallery, run.encoders))
