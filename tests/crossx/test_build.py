"""Runs made from a config: teachers of all kinds, any number of classes, precision, processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from crossx.helpers import (
    CONFIGS,
    OPEN,
    PLAN,
    SIDE,
    assert_same,
    assert_unit_embeddings,
    begin,
    make_teacher,
    press_during,
    result,
    without_batch_norm,
)
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision

from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES, Modality, Normalizer
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.pairs import ProceduralPairs
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.loading import save_teacher

DFSBIR = CONFIGS["dfsbir"]
FEW = DFSBIR.changed({"pairs.warmup_steps": 1, "schedule.rounds": 1})
COLD_TINY = {"students.start.kind": "cold", "students.start.net": "dfsbir/tiny"}
LAYERS = {
    "schedule.distill_steps": 0,
    "students.start.wise_ft_alpha": 1.0,
    "students.head.kind": "intermediate",
    "students.head.layers": "blocks.0.bn1, blocks.0.bn2",
    "students.head.bn_center_weight": 0.2,
    "students.input_size": 24,
    "students.loss.infonce": 0.0,
    "students.loss.consistency": 0.0,
}


# ---- all switches


def test_published_terms_on_pictures_of_a_pyramid(teachers, tmp_path):
    pairs = {"kind": "pyramid", "steps": 2, "batch": 4, "guidance": {"kind": "procedural"}}
    changes = {"pairs": pairs, "schedule": {"rounds": 2, "new_pairs": 4, "distill_steps": 1}}
    losses = {f"pairs.loss.{k}": 1.0 for k in ("class_", "align", "modality", "adversarial")}
    small = {f"pairs.{m}.size": SIDE for m in MODALITIES}
    small |= {"students.batch": 4, "logging.log_every": 1}
    config = CrossXConfig.preset("paper", changes, losses, small)
    crossx, run = begin(teachers, config, tmp_path / "run")
    crossx.fit(run, progress=False)
    logged = {k for line in run.metrics() for k in line}
    assert {f"estimator/{m}/adversarial" for m in MODALITIES} <= logged
    assert "student/proxy_anchor" in logged
    assert all(p.grad is None for p in crossx.distiller.averaged.parameters())


def test_every_term_is_logged(teachers, tmp_path):
    on = {f"pairs.loss.{k}": 0.1 for k in ("one_hot", "class_balance", "activation")}
    on |= {f"pairs.loss.{k}": 0.1 for k in ("modality", "adversarial")}
    on |= {f"students.loss.{k}": 0.1 for k in ("proxy_anchor", "contrast", "infonce")}
    config = DFSBIR.changed(on, {"pairs.guidance.kind": "teachers", "students.head.kind": "joint"})
    crossx, run = begin(teachers, config, tmp_path / "run")
    crossx.fit(run, progress=False)
    logged = {k for line in run.metrics() for k in line}
    assert {f"estimator/{k}" for k in config.pairs.loss.weights()} <= logged
    assert {f"student/{k}" for k in config.students.loss.weights()} <= logged


def test_sgd_for_generators_and_students(teachers, tmp_path):
    config = DFSBIR.changed({"pairs.optimizer.kind": "sgd", "students.optimizer.kind": "sgd"})
    crossx, run = begin(teachers, config, tmp_path / "run")
    made = [*crossx.pairs.optimisers.values(), crossx.distiller.optimizer]
    assert all(o.param_groups[0]["momentum"] == 0.9 for o in made)
    assert_unit_embeddings(crossx.fit(run, progress=False))


def test_wise_ft_alpha_0_keeps_the_teachers(teachers, tmp_path):
    "The students move, what is kept does not: its posteriors are the teachers'."
    config = OPEN.changed({"students.start.wise_ft_alpha": 0.0, "students.lr": 1e-2})
    crossx, run = begin(teachers, config, tmp_path / "run")
    encoders = crossx.fit(run, progress=False)
    for m, t in zip(MODALITIES, teachers):
        x = torch.rand(5, m.channels, SIDE, SIDE)
        wanted = crossx.class_map.posteriors(t(x).logits, m)
        kept = encoders[m].predict_log_probs(x)[1].exp()
        torch.testing.assert_close(kept, wanted, atol=1e-5, rtol=1e-3)
        student = crossx.distiller.students.get_submodule(m).eval()
        assert (student.predict_log_probs(x)[1].exp() - wanted).abs().max() > 1e-3


def test_the_intermediate_head_is_calibrated_and_nothing_is_trained(teachers, tmp_path):
    crossx, run = begin(teachers, OPEN.changed(LAYERS), tmp_path / "run")
    encoders = crossx.fit(run, progress=False)
    assert_unit_embeddings(encoders)
    for m, e in encoders.items():
        assert e.head.shape.mean.abs().sum() > 0 and e.normalizer.size == 24
        loaded = load_encoders(run.encoders)[m]
        torch.testing.assert_close(loaded.head.shape.mean, e.head.shape.mean)
        before = {
            k: v for k, v in crossx.teachers[m].net.state_dict().items() if not k.startswith("fc")
        }
        after = e.net.net.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items()), "the teacher's net"


def test_layers_without_statistics_fail_at_once(teachers, tmp_path):
    config = OPEN.changed(LAYERS, {"students.head.layers": "blocks.0.one, blocks.0.bn2"})
    with pytest.raises(ValueError, match="Conv2d"):
        begin(teachers, config, tmp_path / "run")


def test_objects_are_drawn_with_the_pen_of_the_teacher(teachers, monkeypatch):
    monkeypatch.setattr(teachers[1].normalizer, "pen", 0.05)  # all tests share these teachers
    assert build_crossx(*teachers, OPEN).pairs.pen == 0.05


# ---- pairs that are passed


def test_pairs_that_are_passed_take_the_place_of_the_config_s(teachers, tmp_path):
    "The random numbers of everything else stay those of the run with the config's pairs."
    own = build_crossx(*teachers, DFSBIR)
    pairs = ProceduralPairs(DFSBIR.sizes, own.fabric, seed=0)
    crossx = build_crossx(*teachers, DFSBIR, pairs=pairs)
    assert crossx.pairs is pairs and crossx.config.pairs.kind == "given"
    assert crossx.config.plan() == [a for a in PLAN if a != "synthesize"]
    assert torch.equal(crossx.random_state["cpu"], own.random_state["cpu"])
    run = RunFolder(tmp_path / "run", crossx.config.flat())
    assert_unit_embeddings(crossx.fit(run, progress=False))


def test_a_config_of_given_pairs_needs_them(teachers):
    with pytest.raises(ValueError, match="pairs"):
        build_crossx(*teachers, DFSBIR.changed({"pairs.kind": "given"}))


# ---- teachers of all kinds


def test_partial_overlap_and_many_to_one(tmp_path):
    photo = make_teacher(Modality.PHOTO, ["poodle", "beagle", "car", "tree", "moon"])
    sketch = make_teacher(Modality.SKETCH, ["dog", "automobile", "fish", "tree"])
    aliases = {"poodle": "dog", "beagle": "dog", "automobile": "car"}
    crossx = build_crossx(photo, sketch, FEW, aliases=aliases)
    encoders = crossx.fit(RunFolder(tmp_path / "run", FEW.flat()), progress=False)
    assert crossx.class_map.classes == ["dog", "car", "tree"]
    assert crossx.class_map.dropped == {"photo": ["moon"], "sketch": ["fish"]}
    kept = crossx.buffer.all()
    assert kept.label.max() < 3 and kept.photo_target.shape[1] == 3
    assert torch.allclose(kept.sketch_target.sum(1), torch.ones(len(kept)), atol=1e-5)
    assert all(e.card["classes"] == ["dog", "car", "tree"] for e in encoders.values())
    stranger = make_teacher(Modality.SKETCH, ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="share no class"):
        build_crossx(photo, stranger, FEW)


@pytest.mark.parametrize("classes", [21, 126])
def test_any_number_of_classes_works_with_a_small_batch(tmp_path, classes):
    "Eight pairs a step are four classes twice, so that diversity has something to compare."
    names = [f"class {i}" for i in range(classes)]
    pair = [make_teacher(m, names, seed=k) for k, m in enumerate(MODALITIES)]
    crossx, run = begin(pair, FEW, tmp_path / "run")
    _, label = crossx.pairs.sample_inputs(8, twice=True)
    assert sorted(label.bincount()[label.unique()].tolist()) == [2] * 4
    dim = max(16, classes + 2)
    assert_unit_embeddings(crossx.fit(run, progress=False), dim)
    assert any("estimator/diversity" in line for line in run.metrics())


def test_a_thousand_classes_train_at_batch_64():
    "A batch is 32 classes twice; over the batches every class occurs; both steps change weights."
    names = [f"class {i}" for i in range(1000)]
    pair = [make_teacher(m, names, seed=k) for k, m in enumerate(MODALITIES)]
    sizes = ("pairs.batch", "students.batch", "schedule.new_pairs", "buffer.capacity")
    config = DFSBIR.changed(dict.fromkeys(sizes, 64))
    crossx = build_crossx(*pair, config)
    drawn = torch.cat([crossx.pairs.sample_inputs(64, twice=True)[1] for _ in range(200)])
    assert all((batch.bincount()[batch.unique()] == 2).all() for batch in drawn.split(64))
    assert len(drawn.unique()) > 900
    nets = [*crossx.pairs.generators.values(), crossx.distiller.students]
    before = [[p.detach().clone() for p in net.parameters()] for net in nets]
    for action in ("synthesize", "fill", "distill"):
        crossx.run_step(action)
    for net, old in zip(nets, before):
        assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), old))
    kept = crossx.buffer.all()
    assert kept.photo_target.shape == (64, 1000)
    torch.testing.assert_close(kept.photo_target.sum(1), torch.ones(64))


@pytest.mark.parametrize("head", ["posterior", "feature", "joint"])
@pytest.mark.parametrize("start", ["warm", "cold"])
def test_teachers_of_different_nets_sizes_and_inputs(tmp_path, head, start):
    pair = (
        make_teacher(Modality.PHOTO, net="small", size=24),
        make_teacher(
            Modality.SKETCH,
            net="torchvision/squeezenet1_1",
            normalizer=Normalizer(33, 3, 0.5, 0.5, dark_on_light=False),
        ),
    )
    config = FEW.changed(
        {
            "students.head.kind": head,
            "students.start.kind": start,
            "students.loss.proxy_anchor": 0.1,
        }
    )
    crossx, run = begin(pair, config, tmp_path / "run")
    assert_unit_embeddings(crossx.fit(run, progress=False))
    assert_unit_embeddings(load_encoders(run.encoders))
    own = crossx.distiller.students.sketch.normalizer
    assert own.size == 33 and not own.dark_on_light


@pytest.mark.parametrize("head", ["posterior", "feature"])
def test_modules_of_one_and_three_channels_without_batch_norm(tmp_path, head):
    grey = Normalizer(28, 1, 0.1, 0.3, dark_on_light=False)
    pair = (
        make_teacher(Modality.PHOTO, net=without_batch_norm(3), size=20),
        make_teacher(Modality.SKETCH, net=without_batch_norm(1), normalizer=grey),
    )
    config = FEW.changed({"students.head.kind": head})
    with pytest.warns(UserWarning, match="random weights"):
        assert build_crossx(*pair, config).config.students.kind == "cold"
    config = config.changed(COLD_TINY)
    with pytest.raises(ValueError, match="batch norm"):
        build_crossx(*pair, config).fit(progress=False)
    config = config.changed({"pairs.loss.bn": 0.0})
    crossx, run = begin(pair, config, tmp_path / "run")
    assert_unit_embeddings(crossx.fit(run, progress=False))
    assert_unit_embeddings(load_encoders(run.encoders))


def test_one_teacher_with_batch_norm_is_prior_enough(teachers, tmp_path):
    config = FEW.changed(COLD_TINY)
    pair = teachers[0], make_teacher(Modality.SKETCH, net=without_batch_norm(3))
    crossx, run = begin(pair, config, tmp_path / "run")
    assert_unit_embeddings(crossx.fit(run, progress=False))
    guided = {"pairs.loss.modality": 1.0, "pairs.guidance.kind": "teachers"}
    with pytest.raises(ValueError, match="batch norm"):
        build_crossx(*pair, config.changed(guided))


def test_swapped_teachers_are_named(teachers):
    with pytest.raises(ValueError, match="wanted a photo teacher"):
        build_crossx(*reversed(teachers), DFSBIR)


def test_the_space_grows_to_what_the_classes_need(teachers):
    crossx = build_crossx(*teachers, DFSBIR.changed({"students.dim": 2}))
    assert crossx.distiller.students.photo.head.proxies.shape == (4, 6)
    crossx = build_crossx(*teachers, OPEN.changed({"students.dim": 2}))
    assert crossx.distiller.students.photo.head.proxies.shape == (4, 8)


# ---- precision and processes


@pytest.mark.parametrize("config", [*CONFIGS.values(), OPEN], ids=[*CONFIGS, "open"])
def test_bf16_on_the_cpu(teachers, tmp_path, config):
    config = config.changed({"precision": "bf16-mixed", "pairs.sketch.size": SIDE})
    crossx, run = begin(teachers, config, tmp_path / "run")
    assert_unit_embeddings(crossx.fit(run, progress=False))
    for e in load_encoders(run.encoders).values():
        assert all(v.dtype in (torch.float32, torch.int64) for v in e.state_dict().values())


def test_the_loss_scale_goes_on_where_it_stopped(teachers, tmp_path):
    "16-mixed as on a GPU: a scaler that grows every second step."
    config = DFSBIR.changed({"precision": "16-mixed"})

    def begin16(folder):
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
        return build_crossx(*teachers, config, fabric=fabric), RunFolder(folder, config.flat())

    straight, run = begin16(tmp_path / "whole")
    straight.fit(run, progress=False)
    stopped, part = begin16(tmp_path / "part")
    press_during(stopped, 5)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(part, progress=False)
    again, part = begin16(tmp_path / "part")
    again.fit(part, progress=False)
    scales = [c.fabric.strategy.precision.scaler.get_scale() for c in (straight, stopped, again)]
    assert scales[0] == scales[2] > scales[1] > 16
    assert_same(result(part), result(run))


TWO = """
import json, signal, sys
from pathlib import Path
import torch
from dfsbir.baselines import gaussian_prior
from dfsbir.core.device import make_fabric
from dfsbir.core.run_folder import RunFolder
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.config import CrossXConfig
from dfsbir.teachers.loading import load_teacher

home = Path(sys.argv[1])
teachers = [load_teacher(home / f"{m}.safetensors") for m in ("photo", "sketch")]
fabric = make_fabric("cpu", processes=2)
rank = fabric.global_rank

def begin(config, name):
    return build_crossx(*teachers, config, fabric=fabric), RunFolder(home / name, config.flat())

def nets(crossx):
    return [crossx.distiller.students, *crossx.pairs.generators.values()]

def config_of(name):
    return CrossXConfig.from_flat(json.loads((home / f"{name}.json").read_text()))

for name in ("dfsbir", "paper"):
    crossx, run = begin(config_of(name), name)
    positions = []
    crossx.fit(run, [lambda c, *_: positions.append(c.position)], progress=False)
    weights = [p.detach().clone() for n in nets(crossx) for p in n.parameters()]
    found = {"weights": weights, "pairs": crossx.buffer.all().photo, "positions": positions}
    torch.save(found, home / f"{name}{rank}.pt")

config = config_of("paper").changed(seed=1)
crossx, run = begin(config, "stopped")
if rank == 1:  # Ctrl-C reaches one process before the other
    run_step = crossx.run_step
    def press(action):
        if crossx.position == 4:
            signal.raise_signal(signal.SIGINT)
        return run_step(action)
    crossx.run_step = press
try:
    crossx.fit(run, progress=False)
except KeyboardInterrupt:
    pass
first = crossx.position
again, run = begin(config, "stopped")
again.fit(run, progress=False)
straight, run = begin(config, "straight")
straight.fit(run, progress=False)

def parameters(crossx):
    return [p for net in nets(crossx) for p in net.parameters()]

same = all(torch.equal(a, b) for a, b in zip(parameters(again), parameters(straight)))
(home / f"resumed{rank}.json").write_text(json.dumps([first, same]))

objects = {"pairs.kind": "objects", "pairs.photo.size": 16, "pairs.sketch.size": 16}
off = {"students.loss.proxy_anchor": 0.0, "students.loss.consistency": 1.0}
joint = {"students.head.kind": "joint"}
contrast = {"students.loss.consistency": 0.0, "students.loss.contrast": 1.0}
for change in (joint, contrast):  # weights that no term reaches do not stall the other process
    odd = build_crossx(*teachers, config.changed(objects, off, change), fabric=fabric)
    for action in ("fill", "distill", "distill", "distill"):
        odd.run_step(action)

noise = gaussian_prior(*teachers, config, fabric=fabric).pairs
torch.save(noise.sample(4).photo, home / f"noise{rank}.pt")
"""


def test_two_processes_agree(teachers, tmp_path):
    for m, t in zip(MODALITIES, teachers):
        save_teacher(t, tmp_path / f"{m}.safetensors")
    for name, config in CONFIGS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config.flat()))
    (tmp_path / "two.py").write_text(TWO)
    cluster = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")
    env = {k: v for k, v in os.environ.items() if k not in cluster}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "two.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=env | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert not done.returncode, done.stderr
    for name in CONFIGS:
        one, two = (
            torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert one["positions"] == two["positions"] == list(range(1, len(PLAN) + 1))
        assert len(one["weights"]) == len(two["weights"]) > 20
        for a, b in zip(one["weights"], two["weights"]):
            assert torch.equal(a, b)
        assert not torch.equal(one["pairs"], two["pairs"]), "each process has pairs of its own"
        assert_unit_embeddings(load_encoders(tmp_path / name / "encoders"))
    noise = [torch.load(tmp_path / f"noise{rank}.pt", weights_only=True) for rank in range(2)]
    assert not torch.equal(*noise), "and noise of its own"
    (first, same), other = (
        json.loads((tmp_path / f"resumed{rank}.json").read_text()) for rank in range(2)
    )
    assert first == 5 and same and other == [first, same], "stopped together, and resumed"
