"""Small teachers, configs of ten actions, and what a run leaves behind."""

import os
import signal

import pytest
import torch
from torch import nn

from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher

SIDE, CLASSES = 16, list(TOY_CLASSES[:4])
SIZES = {"device": "cpu", "pairs.photo.size": SIDE, "pairs.sketch.size": SIDE}
ROUNDS = {
    "buffer.capacity": 16,
    "schedule.rounds": 2,
    "schedule.new_pairs": 10,
    "schedule.distill_steps": 2,
    "students.dim": 16,
    "students.batch": 8,
    "students.views": 2,
    "logging.log_every": 1,
    "logging.sample_every": 2,
    "logging.save_every": 3,
}
ESTIMATES = {
    "pairs.photo.width": 8,
    "pairs.latent": 8,
    "pairs.batch": 8,
    "pairs.warmup_steps": 2,
    "pairs.synthesis_steps": 1,
}
STROKES = {"pairs.sketch.strokes": 3, "pairs.sketch.templates_per_class": 2}
CONFIGS = {
    "dfsbir": CrossXConfig.preset("dfsbir", SIZES, ROUNDS, ESTIMATES, STROKES),
    "paper": CrossXConfig.preset(
        "paper",
        SIZES,
        ROUNDS,
        ESTIMATES,
        {"pairs.sketch.width": 8, "pairs.guidance.kind": "teachers"},
    ),
}
OPEN = CrossXConfig.preset("open", SIZES, ROUNDS, {"pairs.sketch.size": 12})
PLAN = CONFIGS["dfsbir"].plan()  # two steps of synthesis, then twice: synthesize, fill, distill x 2


def make_teacher(modality, classes=CLASSES, net="tiny", size=SIDE, normalizer=None, seed=0):
    "An untrained teacher; a module of one's own has no source in its card."
    torch.manual_seed(seed)
    if isinstance(net, nn.Module):
        return Teacher(net, classes, normalizer or input_of(None, size), modality)
    source, _, name = net.rpartition("/")
    source = source or "dfsbir"
    return Teacher(
        build_net(source, name, len(classes)),
        classes,
        normalizer or input_of(source, size, name=name),
        modality,
        card={"source": source, "name": name},
    )


def without_batch_norm(channels, classes=4):
    "A small net without batch norm, as a module of one's own."
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, classes),
    )


def begin(teachers, config, folder):
    "A trainer and its run folder."
    return build_crossx(*teachers, config), RunFolder(folder, config.flat())


def result(run):
    "Everything that a run leaves behind, bytes where bytes are promised."
    return (
        {m: e.state_dict() for m, e in load_encoders(run.encoders).items()},
        (run.path / "metrics.jsonl").read_bytes(),
        {p.name: p.read_bytes() for p in run.samples.iterdir()},
    )


def assert_same(a, b):
    "Two results are equal to the last bit."
    for m in MODALITIES:
        assert a[0][m].keys() == b[0][m].keys()
        for k in a[0][m]:
            assert torch.equal(a[0][m][k], b[0][m][k]), (m, k)
    assert a[1] == b[1], "metrics.jsonl differs"
    assert a[2] == b[2], "pictures differ"


def assert_unit_embeddings(encoders, dim=16):
    "Both encoders give embeddings of length 1."
    for m, e in encoders.items():
        z = e(torch.rand(3, m.channels, 20, 20))
        assert z.shape == (3, dim) and torch.allclose(z.norm(dim=1), torch.ones(3), atol=1e-5), m


def press_during(crossx, at):
    "Ctrl-C in the middle of action number `at`, from 0."
    run_step = crossx.run_step

    def pressed(action):
        if crossx.position == at:
            os.kill(os.getpid(), signal.SIGINT)
        return run_step(action)

    crossx.run_step = pressed


def weights(crossx):
    return [v.clone() for v in crossx.distiller.averaged.state_dict().values()]


def assert_resumes(teachers, config, stop, folder):
    "A run that was stopped after so many actions ends like an uninterrupted one."
    whole = build_crossx(*teachers, config)
    whole.fit(RunFolder(folder / "whole", config.flat()), progress=False)

    class Stop(Exception):
        pass

    def stop_there(crossx, action, scalars):
        if crossx.position == stop:
            raise Stop

    with pytest.raises(Stop), RunFolder(folder / "cut", config.flat()) as run:
        build_crossx(*teachers, config).fit(run, [stop_there], progress=False)
    again = build_crossx(*teachers, config)
    again.fit(RunFolder(folder / "cut", config.flat()), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
