"""Chooses the posterior read-out's temperature and mirror on images that its teachers' training held out, never on test images.

Reads a finished run folder of nbs/run_experiment.ipynb: its parameters say which images the teachers were trained on, so that the same
tenth can be held out again.  The held-out sketches search the held-out photos; the teachers stand as the run left them.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dfsbir.core.types import MODALITIES
from dfsbir.data.folders import read_folder
from dfsbir.data.toy import toy_pairs
from dfsbir.evaluation.report import evaluate_retrieval
from dfsbir.evaluation.retrieval import embed
from dfsbir.students.encoder import HeadSpec, encoder_from_teacher
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.loading import load_teacher

TEMPERATURES = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)


def held_out(p, modality):
    "The tenth of the training images on which `train_teacher` chose its epoch."
    at = MODALITIES.index(modality)
    data = (
        toy_pairs(p["toy_images"], p["size"], seed=at)[at]
        if p["dataset"] == "toy"
        else read_folder(p[f"{modality}_train"], modality, p["size"], on_error=p["broken"])
    )
    return data.split(0.1, p["seed"] + 1000 * at)[1]


def table(run):
    "mAP@all on held-out images, {(mirror, temperature): value}, and how many images it stands on."
    p = json.loads((run / "config.json").read_text())["parameters"]
    teachers = {m: load_teacher(run / "teachers" / f"{m}.safetensors") for m in MODALITIES}
    class_map = align_classes(*(t.classes for t in teachers.values()))
    K, images = len(class_map.classes), {m: held_out(p, m) for m in MODALITIES}
    metric_space = MetricSpace.random(K, K + 2, 0)
    found = {}
    for mirror in (False, True):
        for T in TEMPERATURES:
            space = {
                m: embed(
                    encoder_from_teacher(
                        teachers[m],
                        class_map,
                        metric_space,
                        HeadSpec(temperature=T),
                        flip_tta=mirror,
                    ),
                    images[m],
                )
                for m in MODALITIES
            }
            photo, sketch = MODALITIES
            found[mirror, T] = evaluate_retrieval(
                space[sketch], space[photo], images[sketch].labels, images[photo].labels
            ).metrics["mAP@all"]
    return found, {m: len(d) for m, d in images.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="finished run folders of one data set")
    tables = [table(run) for run in parser.parse_args().runs]
    for run, (_, counts) in zip(parser.parse_args().runs, tables):
        print(f"{run.name}: " + ", ".join(f"{n} held-out {m} images" for m, n in counts.items()))
    print("mean mAP@all  " + "".join(f"T={T:<7g}" for T in TEMPERATURES))
    for mirror in (False, True):
        print(
            f"{'with mirror' if mirror else 'one look':13s} "
            + "".join(
                f"{sum(t[mirror, T] for t, _ in tables) / len(tables):<9.4f}" for T in TEMPERATURES
            )
        )
    best = max(tables[0][0], key=lambda k: sum(t[k] for t, _ in tables))
    print(
        f"best: temperature {best[1]:g}, {'image and mirror image together' if best[0] else 'one look'}"
    )


if __name__ == "__main__":
    main()
