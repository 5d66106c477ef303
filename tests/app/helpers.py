"""What the tests of the commands share: small notebooks, an untrained pair of encoders."""

import json

import torch

from dfsbir.app.cli import main
from dfsbir.app.grid import read_grid
from dfsbir.core.types import MODALITIES, Normalizer
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.students.encoder import encoder_from_teacher
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher

SIDE = 28  # px of the encoders' input

PARAMETERS = """
method = "plain"     # plain, crash, die, sleep
rate = 0.1           # of nothing
options = ""         # JSON
seed = 0
run_folder = "runs/x"
"""
BODY = """
import json, os, signal, time
from pathlib import Path
run = Path(run_folder)
with open(run / "times.txt", "a") as f: print(os.getpid(), os.environ["OMP_NUM_THREADS"], file=f)
again = len((run / "times.txt").read_text().splitlines()) > 1
assert method != "crash" or again, "it broke"
if method == "die": os.kill(os.getpid(), signal.SIGKILL)
if method == "sleep" and not again: time.sleep(300)
row = "d,%s,%s,%d,mAP@all,%.6f,1.0,cpu,%s" % (method, "", seed, .5 + seed / 10, run.name)
header = "dataset,method,variant,seed,metric,value,seconds,device,run_id"
(run / "results.csv").write_text(header + "\\n" + row + "\\n")
"""


def notebook_of(*sources):
    "A papermill notebook of these cells, the first one its parameters."
    cells = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "metadata": {"tags": ["parameters"] if not i else []},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        for i, source in enumerate(sources)
    ]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    metadata = {"kernelspec": kernel}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def grid_of(folder, text, name="g.yaml"):
    "A grid of the small notebook, which lies in the folder."
    (folder / name).write_text("notebook: small.ipynb\n" + text)
    return read_grid(folder / name)


def times(job):
    "How often a job was begun."
    file = job.folder / "times.txt"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def untrained_pair():
    "{modality: Encoder} of untrained nets."
    classes = list(TOY_CLASSES)
    torch.manual_seed(0)
    teachers = {}
    for m in MODALITIES:
        net, card = build_net("dfsbir", "tiny", 10), {"source": "dfsbir", "name": "tiny"}
        teachers[m] = Teacher(net, classes, Normalizer(SIDE), m, card=card)
    space, shared = MetricSpace.random(10, 12), align_classes(classes, classes)
    return {m: encoder_from_teacher(teachers[m], shared, space) for m in MODALITIES}


def call(*words):
    "Exit code of the command."
    return main([str(word) for word in words])


def fails(capsys, *words):
    "What a mistake prints: one message, no traceback, exit code 2."
    assert call(*words) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    _, mark, message = text.rpartition("dfsbir: ")  # after a progress bar, perhaps
    assert mark
    return message
