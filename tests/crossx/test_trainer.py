"""The loop: interruption in every phase, faults, used folders, the data-free law."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from crossx.helpers import (
    CLASSES,
    CONFIGS,
    OPEN,
    PLAN,
    ROUNDS,
    SIDE,
    assert_same,
    assert_unit_embeddings,
    begin,
    make_teacher,
    press_during,
    result,
)
from torchvision.utils import save_image

import dfsbir.core.checkpoint
from dfsbir.core.data_guard import DataFreeViolation
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES, Modality, PairBatch
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.trainer import mixup_pairs, weights_digest
from dfsbir.data.toy import toy_pairs
from dfsbir.inversion.estimator import EstimatorCollapsed
from dfsbir.losses.weighted_sum import NonFiniteTerm
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.loading import load_teacher, save_teacher

DFSBIR = CONFIGS["dfsbir"]
SAVE_EVERY = ROUNDS["logging.save_every"]


@pytest.fixture(scope="module")
def whole(teachers, tmp_path_factory):
    "Uninterrupted runs of both presets."
    found = {}
    for name, config in CONFIGS.items():
        crossx, run = begin(teachers, config, tmp_path_factory.mktemp(name) / "run")
        crossx.fit(run, progress=False)
        found[name] = result(run)
    return found


# ---- stopping and going on


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("at", [0, 3, 5, 9], ids=lambda i: f"{i}-{PLAN[i]}")
def test_ctrl_c_and_resume_equal_an_uninterrupted_run(teachers, whole, tmp_path, preset, at):
    crossx, run = begin(teachers, CONFIGS[preset], tmp_path / "run")
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs this in the background
    press_during(crossx, at)
    with pytest.raises(KeyboardInterrupt) as stop:
        crossx.fit(run, progress=False)
    assert f"action {at + 1} of {len(PLAN)}" in str(stop.value)
    assert str(run.path) in str(stop.value), "the message says how to go on"
    assert signal.getsignal(signal.SIGINT) is before
    assert run.load_checkpoint("last")["position"] == at + 1
    torch.manual_seed(999)
    again, run = begin(teachers, CONFIGS[preset], tmp_path / "run")
    torch.rand(7)  # what a notebook draws between two cells
    again.fit(run, progress=False)
    assert_same(result(run), whole[preset])


def test_resume_in_the_same_object(teachers, whole, tmp_path):
    crossx, run = begin(teachers, DFSBIR, tmp_path / "run")
    press_during(crossx, 4)
    with pytest.raises(KeyboardInterrupt):
        crossx.fit(run, progress=False)
    torch.rand(5)
    crossx.fit(run, progress=False)
    assert_same(result(run), whole["dfsbir"])


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("after", [2, 7])
def test_a_killed_run_goes_on_from_its_last_checkpoint(teachers, whole, tmp_path, preset, after):
    def die(crossx, action, scalars):
        if crossx.position == after:
            raise SystemExit("killed")

    crossx, run = begin(teachers, CONFIGS[preset], tmp_path / "run")
    with pytest.raises(SystemExit):
        crossx.fit(run, [die], progress=False)
    kept = run.load_checkpoint("last")["position"] if run.has_checkpoint("last") else 0
    assert kept == after // SAVE_EVERY * SAVE_EVERY and len(run.metrics()) == after
    with open(run.path / "metrics.jsonl", "a") as f:
        f.write('{"step": 8, "cut sho')  # as a kill leaves it
    again, run = begin(teachers, CONFIGS[preset], tmp_path / "run")
    again.fit(run, progress=False)
    assert_same(result(run), whole[preset])


@pytest.mark.parametrize("config", [DFSBIR, OPEN], ids=["dfsbir", "open"])
def test_stopped_at_every_action(teachers, tmp_path, config):
    crossx, run = begin(teachers, config, tmp_path / "whole")
    crossx.fit(run, progress=False)
    uninterrupted = result(run)
    for at in range(len(config.plan())):
        crossx, run = begin(teachers, config, tmp_path / "run")
        press_during(crossx, at)
        with pytest.raises(KeyboardInterrupt):
            crossx.fit(run, progress=False)
        torch.rand(5)
    crossx, run = begin(teachers, config, tmp_path / "run")
    crossx.fit(run, progress=False)
    assert_same(result(run), uninterrupted)


def test_a_finished_run_changes_nothing_when_it_is_called_again(teachers, whole, tmp_path):
    seen = []
    for _ in range(2):
        crossx, run = begin(teachers, DFSBIR, tmp_path / "run")
        crossx.fit(run, [lambda crossx, action, scalars: seen.append(action)], progress=False)
        assert_same(result(run), whole["dfsbir"])
    assert seen == PLAN


def test_callbacks_that_draw_and_look_change_no_number(teachers, whole, tmp_path):
    def meddle(crossx, action, scalars):
        torch.rand(3)
        crossx.preview()

    crossx, run = begin(teachers, DFSBIR, tmp_path / "run")
    crossx.fit(run, [meddle], progress=False)
    assert_same(result(run), whole["dfsbir"])


def test_without_a_folder_the_encoders_are_the_same(teachers, whole):
    encoders = build_crossx(*teachers, DFSBIR).fit(progress=False)
    for m in MODALITIES:
        for k, v in encoders[m].state_dict().items():
            assert torch.equal(v, whole["dfsbir"][0][m][k])


SCRIPT = """
import json, signal, sys
from pathlib import Path
from dfsbir.core.run_folder import RunFolder
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.teachers.loading import load_teacher
home = Path(sys.argv[1])
config = CrossXConfig.from_flat(json.loads((home / "config.json").read_text()))
teachers = [load_teacher(home / f"{m}.safetensors") for m in ("photo", "sketch")]

def wait(crossx, action, scalars):
    print(action, flush=True)
    if action == "fill":
        sys.stdin.readline()  # until the signal was sent

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
build_crossx(*teachers, config).fit(RunFolder(home / "run", config.flat()), [wait])
"""


@pytest.fixture
def home(teachers, tmp_path):
    "A folder with two saved teachers and a config."
    for m, t in zip(MODALITIES, teachers):
        save_teacher(t, tmp_path / f"{m}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DFSBIR.flat()))
    return tmp_path


def test_sigint_to_a_process(home, whole):
    command = [sys.executable, "-c", SCRIPT, str(home)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True) as process:
        for line in process.stdout:
            if line.strip() == "fill":
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate("\n", timeout=120)
    assert process.returncode not in (0, None)
    assert "saved" in err and str(home / "run") in err
    position = RunFolder(home / "run").load_checkpoint("last")["position"]
    assert PLAN.index("fill") < position < len(PLAN)
    loaded = [load_teacher(home / f"{m}.safetensors") for m in MODALITIES]
    crossx, run = begin(loaded, DFSBIR, home / "run")
    crossx.fit(run, progress=False)
    assert_same(result(run), whole["dfsbir"])


# ---- used folders


def test_a_run_with_another_config_is_refused_with_the_differences(teachers, tmp_path):
    crossx, run = begin(teachers, DFSBIR, tmp_path / "run")
    crossx.fit(run, progress=False)
    with pytest.raises(ValueError, match=r"students\.lr: 3e-05 there, 0\.5 here"):
        begin(teachers, DFSBIR.changed({"students.lr": 0.5}), tmp_path / "run")


@pytest.mark.parametrize(
    "change, named", [({"seed": 1}, "seed"), ({"students.lr": 0.5}, r"students\.lr")]
)
def test_a_folder_that_says_nothing_of_its_config_is_compared_too(
    teachers, tmp_path, change, named
):
    build_crossx(*teachers, DFSBIR).fit(RunFolder(tmp_path / "run", {}), progress=False)
    before = (tmp_path / "run" / "encoders" / "photo.safetensors").read_bytes()
    other = build_crossx(*teachers, DFSBIR.changed(change))
    with pytest.raises(ValueError, match=named):
        other.fit(RunFolder(tmp_path / "run", {}), progress=False)
    assert (tmp_path / "run" / "encoders" / "photo.safetensors").read_bytes() == before


def test_other_teachers_are_refused(teachers, tmp_path):
    crossx, run = begin(teachers, DFSBIR, tmp_path / "run")
    crossx.fit(run, progress=False)
    others = [teachers[0], make_teacher(Modality.SKETCH, seed=9)]
    crossx, run = begin(others, DFSBIR, tmp_path / "run")
    with pytest.raises(ValueError, match="sketch"):
        crossx.fit(run, progress=False)


def test_the_digest_of_a_teacher_is_of_its_weights(teachers):
    copy = make_teacher(Modality.PHOTO)
    copy.load_state_dict(teachers[0].state_dict())
    assert weights_digest(copy) == weights_digest(teachers[0])
    next(copy.net.parameters()).data[0] += 1e-6
    assert weights_digest(copy) != weights_digest(teachers[0])


# ---- faults


def checkpoint(run):
    return run.checkpoints / "last.safetensors"


def test_a_teacher_that_breaks_is_named_and_the_last_checkpoint_stays(teachers, tmp_path):
    broken = [make_teacher(m) for m in MODALITIES]
    for t, good in zip(broken, teachers):
        t.load_state_dict(good.state_dict())
    kept = []

    def spoil(crossx, action, scalars):
        if crossx.position == 3:
            kept.append(checkpoint(run).read_bytes())
            broken[1].net.fc.weight.data.fill_(float("nan"))

    crossx, run = begin(broken, DFSBIR, tmp_path / "run")
    with pytest.raises((NonFiniteTerm, ValueError, FloatingPointError)) as e:
        crossx.fit(run, [spoil], progress=False)
    assert "nan" in str(e.value).lower()
    assert any("(fill)" in n or "(distill)" in n for n in e.value.__notes__)
    assert checkpoint(run).read_bytes() == kept[0]
    assert run.load_checkpoint("last")["position"] == 3


@pytest.mark.parametrize("preset", CONFIGS)
def test_a_teacher_of_nans_stops_the_first_step_with_the_terms_name(tmp_path, preset):
    broken = [make_teacher(m) for m in MODALITIES]
    crossx, run = begin(broken, CONFIGS[preset], tmp_path / "run")
    broken[0].net.fc.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteTerm, match="class|one_hot") as e:
        crossx.fit(run, progress=False)
    assert "action 1 of 10 (synthesize)" in e.value.__notes__[0]
    assert not checkpoint(run).exists() and not list(run.encoders.iterdir())


@pytest.mark.parametrize("what", ["student", "photo generator"])
def test_weights_with_nan_reach_neither_checkpoint_nor_encoders(teachers, tmp_path, what):
    "A finite loss can have a gradient that is not; the last step has no next loss to show it."
    crossx, run = begin(teachers, DFSBIR, tmp_path / "run")
    generator = crossx.pairs.generators[Modality.PHOTO]
    net = crossx.distiller.students.photo if what == "student" else generator
    run_step = crossx.run_step

    def overflow(action):
        scalars = run_step(action)
        if crossx.position == len(PLAN) - 1:
            next(net.parameters()).data.fill_(float("inf"))
        return scalars

    crossx.run_step = overflow
    with pytest.raises(FloatingPointError, match=what):
        crossx.fit(run, progress=False)
    assert run.load_checkpoint("last")["position"] == 9
    assert not list(run.encoders.iterdir())


def test_a_collapsed_estimator_is_named(teachers, tmp_path):
    config = DFSBIR.changed({"pairs.warmup_steps": 12, "logging.save_every": 1})
    crossx, run = begin(teachers, config, tmp_path / "run")
    crossx.pairs.patience = 2
    for p in crossx.pairs.generators[Modality.PHOTO].parameters():
        p.data.zero_()
    with pytest.raises(EstimatorCollapsed, match="photo") as e:
        crossx.fit(run, progress=False)
    assert "action 4 of" in e.value.__notes__[0] and "checkpoint" in e.value.__notes__[0]
    assert run.load_checkpoint("last")["position"] == 3


def test_a_config_may_switch_that_alarm_off(teachers, tmp_path):
    config = DFSBIR.changed({"pairs.min_diversity": 0.0})
    crossx, _ = begin(teachers, config, tmp_path / "run")
    crossx.pairs.patience = 1
    for p in crossx.pairs.generators[Modality.PHOTO].parameters():
        p.data.zero_()
    for _ in range(4):
        crossx.run_step("synthesize")


@pytest.fixture
def idle(teachers):
    "A trainer of which no action may be asked."

    def start(folder):
        crossx, run = begin(teachers, DFSBIR, folder)
        crossx.run_step = lambda action: pytest.fail("work began")
        return crossx, run

    return start


class Usage:
    total, used, free = 10**9, 10**9, 1000


def test_a_full_disk_is_reported_before_the_work(idle, tmp_path, monkeypatch):
    crossx, run = idle(tmp_path / "run")
    monkeypatch.setattr(dfsbir.core.checkpoint.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match=r"0 MB free.*\d+ MB"):
        crossx.fit(run, progress=False)


def test_a_checkpoint_needs_room_for_buffer_and_weights(teachers, tmp_path):
    config = DFSBIR.changed({"buffer.capacity": 1_000_000})
    crossx, _ = begin(teachers, config, tmp_path / "run")
    weights = 4 * sum(p.numel() for p in crossx.distiller.students.parameters()) * 4
    assert crossx.checkpoint_bytes() >= 1_000_000 * 4 * SIDE**2 + weights


def test_a_folder_that_cannot_be_written_is_reported_before_the_work(idle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/run"):
        idle(tmp_path / "file" / "run")
    crossx, run = idle(tmp_path / "run")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(dfsbir.core.checkpoint.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(dfsbir.core.checkpoint.tempfile, "mkstemp", refuse)
    with pytest.raises(OSError, match="Read-only file system"):
        crossx.fit(run, progress=False)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(
    teachers, whole, tmp_path, monkeypatch
):
    real, saves = dfsbir.core.checkpoint.save_file, []

    def fills(tensors, path, metadata):
        saves.append(path)
        if len(saves) == 2:
            with open(path, "wb") as f:
                f.write(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(dfsbir.core.checkpoint, "save_file", fills)
    crossx, run = begin(teachers, DFSBIR, tmp_path / "run")
    with pytest.raises(OSError, match="No space left"):
        crossx.fit(run, progress=False)
    assert run.load_checkpoint("last")["position"] == 3
    crossx, run = begin(teachers, DFSBIR, tmp_path / "run")
    crossx.fit(run, progress=False)
    assert_same(result(run), whole["dfsbir"])


# ---- new pairs


def test_mixup_against_a_slow_loop():
    "The same random numbers, one pair at a time."
    n = 20
    pairs = PairBatch(torch.rand(n, 3, 4, 4), torch.rand(n, 1, 4, 4), torch.arange(n))
    torch.manual_seed(3)
    order, blended, weight = torch.randperm(n), torch.rand(n) < 0.5, 0.5 + 0.5 * torch.rand(n)
    torch.manual_seed(3)
    mixed = mixup_pairs(pairs, 0.5)
    for i in range(n):
        w = weight[i] if blended[i] else 1.0
        for m in MODALITIES:
            wanted = w * pairs.of(m)[i] + (1 - w) * pairs.of(m)[order[i]]
            torch.testing.assert_close(mixed.of(m)[i], wanted)
    assert torch.equal(mixed.label, pairs.label)


def test_the_buffer_is_filled_with_targets_of_what_the_students_see(teachers, tmp_path):
    crossx, _ = begin(teachers, DFSBIR, tmp_path / "run")
    assert crossx.run_step("fill") == {"buffer": 10}
    kept = crossx.buffer.all()
    assert kept.photo_target.shape == (10, 4)
    assert torch.allclose(kept.sketch_target.sum(1), torch.ones(10), atol=1e-5)


# ---- the data-free law


def test_a_callback_that_opens_a_training_image_is_stopped(teachers, tmp_path):
    picture = tmp_path / "photos" / "one.png"
    picture.parent.mkdir()
    save_image(torch.rand(3, 8, 8), picture)

    def peek(crossx, action, scalars):
        picture.read_bytes()

    def make(crossx, action, scalars):
        toy_pairs(4, size=28)

    for k, spy in enumerate((peek, make)):
        for config in (DFSBIR, OPEN):
            crossx, run = begin(teachers, config, tmp_path / f"run{k}{config.pairs.kind}")
            with pytest.raises(DataFreeViolation):
                crossx.fit(run, [spy], progress=False)
    picture.read_bytes()  # after fit the law is over


def test_guidance_folders_alone_may_be_opened(teachers, tmp_path):
    for data in toy_pairs(12, size=28):
        for i, x in enumerate(data.images()):
            (tmp_path / data.modality).mkdir(exist_ok=True)
            save_image(x, tmp_path / data.modality / f"{i}.png")
    config = DFSBIR.changed(
        {
            "pairs.loss.modality": 1.0,
            "pairs.guidance.kind": "folders",
            "pairs.guidance.photos": str(tmp_path / "photo"),
            "pairs.guidance.sketches": str(tmp_path / "sketch"),
            "pairs.warmup_steps": 1,
            "schedule.rounds": 0,
        }
    )
    crossx, run = begin(teachers, config, tmp_path / "run")
    crossx.fit(run, [lambda *_: (tmp_path / "photo" / "0.png").read_bytes()], progress=False)
    elsewhere = tmp_path / "elsewhere.png"
    save_image(torch.rand(3, 8, 8), elsewhere)
    crossx, run = begin(teachers, config, tmp_path / "other")
    with pytest.raises(DataFreeViolation):
        crossx.fit(run, [lambda *_: elsewhere.read_bytes()], progress=False)


AUDIT = """
import json, os, sys
from pathlib import Path
from dfsbir.core.run_folder import RunFolder
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.data.folders import read_folder
from dfsbir.evaluation.report import evaluate_retrieval
from dfsbir.evaluation.retrieval import embed
from dfsbir.teachers.training import train_teacher

home = Path(sys.argv[1])
config = CrossXConfig.from_flat(json.loads((home / "config.json").read_text()))
opened, phase = [], ["teachers"]

def record(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        opened.append((phase[0], os.path.realpath(os.fsdecode(args[0]))))

sys.addaudithook(record)
MODALITIES = "photo", "sketch"
train = [read_folder(home / "data", m, 16, split="train", cached=False) for m in MODALITIES]
teachers = [train_teacher(d, net="tiny", epochs=1, progress=False) for d in train]
phase[0] = "fit"
run = RunFolder(home / "run", config.flat())
encoders = build_crossx(*teachers, config).fit(run, progress=False)
phase[0] = "evaluation"
photos, sketches = (read_folder(home / "data", m, 16, split="test") for m in MODALITIES)
space = embed(encoders["sketch"], sketches), embed(encoders["photo"], photos)
evaluate_retrieval(*space, sketches.labels, photos.labels, ks=(2,))
print(json.dumps(opened))
"""


def test_audit_no_training_image_is_opened_between_freezing_and_evaluation(home):
    for split in ("train", "test"):
        for data in toy_pairs(24, size=28, classes=CLASSES, split=split):
            for i, (x, y) in enumerate(data):
                folder = home / "data" / split / data.modality / CLASSES[y]
                folder.mkdir(parents=True, exist_ok=True)
                save_image(x, folder / f"{i}.png")
    command = [sys.executable, "-c", AUDIT, str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    opened = json.loads(done.stdout.splitlines()[-1])

    def under(phase, *parts):
        top = os.path.realpath(home.joinpath(*parts)) + os.sep
        return {p for when, p in opened if when == phase and p.startswith(top)}

    train = {str(p) for p in (home / "data" / "train").resolve().rglob("*.png")}
    assert under("teachers", "data", "train") & train == train, "the hook records training images"
    assert not under("fit", "data"), "a data file was opened between freezing and evaluation"
    assert not under("teachers", "data", "test") and not under("evaluation", "data", "train")
    assert under("evaluation", "data", "test")
    assert under("fit", "run", "checkpoints"), "the hook records fit"


# ---- procedural objects


def test_open_has_no_estimator(teachers, tmp_path):
    crossx, run = begin(teachers, OPEN, tmp_path / "run")
    seen = []
    encoders = crossx.fit(
        run, [lambda crossx, action, scalars: seen.append(action)], progress=False
    )
    assert seen == ["fill", "distill", "distill"] * 2 and not crossx.pairs.generators
    assert_unit_embeddings(encoders)
    assert_unit_embeddings(load_encoders(run.encoders))
    kept = crossx.buffer.all()
    assert kept.photo.shape[1:] == (3, SIDE, SIDE) and kept.sketch.shape[1:] == (1, 12, 12)
    assert kept.photo_target.shape == (16, 4)
    assert len(set(kept.label.tolist())) == len(kept), "each object has a number of its own"
    assert {"student/consistency", "student/infonce", "student/total"} <= set(run.metrics()[-1])
    assert not list(run.samples.iterdir())
