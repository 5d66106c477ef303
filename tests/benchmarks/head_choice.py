"""Chooses temperature and mirror image of the posterior head on images that training held out.

Reads finished run folders of nbs/run_experiment.ipynb: their parameters say which images the
teachers were trained on, so that the same tenth can be held out again, and no test image is used.
The held-out sketches search the held-out photos; the teachers stand as the run left them.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dfsbir.core.types import MODALITIES
from dfsbir.crossx.experiment import Setup
from dfsbir.evaluation.report import evaluate_retrieval
from dfsbir.evaluation.retrieval import embed
from dfsbir.students.encoder import HeadSpec, encoder_from_teacher
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.loading import load_teacher

TEMPERATURES = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)


def held_out(setup, modality):
    "The tenth of the training images on which `train_teacher` chose its epoch."
    return setup.data.training(modality).split(0.1, setup.recipes[modality].seed)[1]


def table(run):
    "mAP@all on held-out images, {(flip_tta, temperature): value}, and how many images there are."
    parameters = json.loads((run / "config.json").read_text())["parameters"]
    setup = Setup.of(parameters)
    teachers = {m: load_teacher(run / "teachers" / f"{m}.safetensors") for m in MODALITIES}
    class_map = align_classes(*(t.classes for t in teachers.values()))
    images = {m: held_out(setup, m) for m in MODALITIES}
    space = MetricSpace.random(len(class_map.classes), len(class_map.classes) + 2)
    found = {}
    for flip_tta in (False, True):
        for temperature in TEMPERATURES:
            head = HeadSpec("posterior", temperature)
            photos, sketches = (
                embed(
                    encoder_from_teacher(teachers[m], class_map, space, head, flip_tta=flip_tta),
                    images[m],
                )
                for m in MODALITIES
            )
            labels = [images[m].labels for m in reversed(MODALITIES)]
            report = evaluate_retrieval(sketches, photos, *labels)
            found[flip_tta, temperature] = report.metrics["mAP@all"]
    return found, {m: len(d) for m, d in images.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders of one data set")
    runs = parser.parse_args().runs
    tables = [table(run) for run in runs]
    for run, (_, counts) in zip(runs, tables):
        print(f"{run.name}: " + ", ".join(f"{n} held-out {m} images" for m, n in counts.items()))
    means = {k: sum(t[k] for t, _ in tables) / len(tables) for k in tables[0][0]}
    print("mean mAP@all       " + "".join(f"T={t:<7g}" for t in TEMPERATURES))
    for flip_tta, name in ((False, "image alone"), (True, "with mirror image")):
        print(f"{name:19s}" + "".join(f"{means[flip_tta, t]:<9.4f}" for t in TEMPERATURES))
    best = max(means, key=means.get)
    print(f"best: temperature {best[1]:g}, {'with' if best[0] else 'without'} the mirror image")


if __name__ == "__main__":
    main()
