"""Whole runs on a graphics card: own teachers, precision, resuming, and no waits in any action."""

import pytest
import torch
from crossx.helpers import CONFIGS, OPEN, SIDE, SIZES, begin, make_teacher, press_during
from torch import nn

from dfsbir.core.device import make_fabric
from dfsbir.core.types import MODALITIES, Modality
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.taken_pairs import take_pairs
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.embeddings import teacher_embeddings
from dfsbir.teachers.loading import load_teacher, save_teacher
from dfsbir.teachers.nets import build_net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = {"device": "cuda"}
COLD = CrossXConfig.preset(
    "cold",
    SIZES,
    {"pairs.steps": 2, "pairs.batch": 8, "schedule.new_pairs": 8, "schedule.distill_steps": 2},
    {"students.batch": 8, "students.net": "dfsbir/tiny", "buffer.capacity": 16},
)
PRESETS = {
    **CONFIGS,
    "open": OPEN.changed({"pairs.sketch.size": SIDE}),
    "cold": COLD,
    "cold with objects": COLD.changed({"students.objects": 0.5}),
    "cold, sketches evolve": COLD.changed({"pairs.sketch.evolved": 8}),
    "evolved": COLD.changed(
        {"pairs.kind": "evolved", "students.teach": "sketch", "pairs.batch": 8},
        {f"pairs.{m}.size": SIDE for m in MODALITIES},
    ),
}


@pytest.fixture
def from_files(teachers, tmp_path):
    "Own teachers, as they come from files: on the CPU."
    for m, teacher in zip(MODALITIES, teachers):
        save_teacher(teacher, tmp_path / f"{m}.safetensors")
    return [load_teacher(tmp_path / f"{m}.safetensors") for m in MODALITIES]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_is_stopped_and_resumed(from_files, tmp_path, preset, precision):
    config = PRESETS[preset].changed(CUDA, {"precision": precision})
    crossx, run = begin(from_files, config, tmp_path / "run")
    press_during(crossx, len(config.plan()) - 2)  # every optimiser has made a step
    with pytest.raises(KeyboardInterrupt):
        crossx.fit(run, progress=False)
    crossx, run = begin(from_files, config, tmp_path / "run")
    encoders = crossx.fit(run, progress=False)
    assert crossx.position == len(config.plan())
    for m, encoder in load_encoders(run.encoders).items():
        z = encoder(torch.rand(3, m.channels, SIDE, SIDE))
        assert z.isfinite().all()
        on_gpu = encoders[m](torch.rand(2, m.channels, SIDE, SIDE, device="cuda"))
        assert on_gpu.device.type == "cuda"


@pytest.mark.parametrize("start", ["warm", "cold"])
@pytest.mark.parametrize("head", ["posterior", "feature", "joint"])
def test_every_head_of_own_teachers(from_files, tmp_path, head, start):
    change = {"students.head.kind": head, "students.start.kind": start}
    crossx, run = begin(from_files, CONFIGS["dfsbir"].changed(CUDA, change), tmp_path / "run")
    crossx.fit(run, progress=False)


def test_a_module_of_ones_own(teachers, tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    own = make_teacher(Modality.PHOTO, net=net)
    change = {"students.start.kind": "cold", "students.start.net": "dfsbir/tiny"}
    config = CONFIGS["dfsbir"].changed(CUDA, change)
    crossx, run = begin([own, teachers[1]], config, tmp_path / "run")
    crossx.fit(run, progress=False)


def test_no_action_waits_for_the_device(from_files):
    config = CONFIGS["dfsbir"].changed(CUDA, {"logging.log_every": 1000})
    crossx = build_crossx(*from_files, config)
    actions = ("synthesize", "fill", "distill")
    for action in actions * 3:
        crossx.run_step(action)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for action in actions:
            crossx.run_step(action)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_posteriors_are_those_of_the_cpu(from_files):
    "To rounding, and so are the students that begin as copies of the teachers."
    pairs = build_crossx(*from_files, CONFIGS["dfsbir"]).pairs.sample(8)
    found = {}
    for device in ("cpu", "cuda"):
        crossx = build_crossx(*from_files, CONFIGS["dfsbir"].changed({"device": device}))
        log_probs = crossx.predict_log_probs(pairs.to(device))
        found[device] = {m: p.detach().cpu() for m, p in log_probs.items()}
    for m in MODALITIES:
        torch.testing.assert_close(found["cuda"][m], found["cpu"][m], rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_files_as_others_publish_them(from_files, tmp_path, precision):
    "A program as the sketch teacher, students of other input sides, embeddings, taken pairs."
    net = build_net("dfsbir", "grey", len(from_files[1].classes)).eval()
    torch.jit.trace(net, torch.rand(2, 1, 28, 28)).save(str(tmp_path / "s.ts"))
    card = {
        "classes": from_files[1].classes,
        "modality": "sketch",
        "input": {"size": 28, "channels": 1, "mean": [0.5], "std": [0.5], "pen": 0.05},
    }
    pair = from_files[0], load_teacher(tmp_path / "s.ts", card)
    sizes = {"students.input_size": 20, "students.sketch_input_size": 24}
    config = COLD.changed(CUDA, {"precision": precision}, sizes)
    fabric = make_fabric("cuda", precision)
    class_map = align_classes(pair[0].classes, pair[1].classes)
    images = torch.rand(5, 3, 40, 40), torch.rand(4, 1, 40, 40)
    spaces, _ = teacher_embeddings(dict(zip(MODALITIES, pair)), class_map, *images, fabric)
    assert spaces["teacher-posteriors", ""]["sketch"].isfinite().all()
    crossx, run = begin(pair, config, tmp_path / "run")
    crossx.fit(run, progress=False)
    shared = config.changed({"students.sketch_input_size": None, "students.shared": True})
    other, run = begin(pair, shared, tmp_path / "other")
    take_pairs(other, tmp_path / "run")
    encoders = other.fit(run, progress=False)
    assert encoders["sketch"].normalizer.pen == 0.05
