"""What the CrossX notebook should not hold: interruption in every phase, faults, the data-free law, odd teachers, several processes."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import nn
from torchvision.utils import save_image

import dfsbir.core.checkpoint
from dfsbir.core.data_guard import DataFreeViolation
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES, Modality, Normalizer
from dfsbir.crossx.config import PRESETS, CrossXConfig
from dfsbir.crossx.pairs import ProceduralPairs
from dfsbir.crossx.trainer import CrossX
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.inversion.estimator import EstimatorCollapsed
from dfsbir.losses.weighted_sum import NonFiniteTerm
from dfsbir.students.encoder import load_encoders
from dfsbir.teachers.loading import load_teacher, save_teacher
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher

SIDE, CLASSES = 16, list(TOY_CLASSES[:4])
SMALL = dict(
    device="cpu",
    photo_size=SIDE,
    sketch_size=SIDE,
    width=8,
    latent=8,
    strokes=3,
    pages=2,
    batch=8,
    warmup=2,
    rounds=2,
    synthesis_steps=1,
    new_pairs=10,
    student_steps=2,
    student_batch=8,
    bank=16,
    views=2,
    dim=16,
    log_every=1,
    sample_every=2,
    save_every=3,
)
CONFIGS = {
    "dfsbir": CrossXConfig.preset("dfsbir", **SMALL),
    "paper": CrossXConfig.preset("paper", **SMALL, guidance="teachers"),
}
OPEN = CrossXConfig.preset("open", **SMALL | dict(warmup=0, synthesis_steps=0, sketch_size=12))
PLAN = CONFIGS["dfsbir"].plan()  # S S, then twice S C T T


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_teacher(modality, classes=CLASSES, net="tiny", size=SIDE, normalizer=None, seed=0):
    "An untrained teacher; a module of one's own has no source in its card."
    torch.manual_seed(seed)
    if isinstance(net, nn.Module):
        return Teacher(net, classes, normalizer or input_of(None, size), modality)
    source, name = net.split("/") if "/" in net else ("dfsbir", net)
    return Teacher(
        build_net(source, name, len(classes)),
        classes,
        normalizer or input_of(source, size),
        modality,
        card=dict(source=source, name=name),
    )


@pytest.fixture(scope="module")
def teachers():
    "Two small nets whose batch norms have seen pictures."
    made = [make_teacher(m, seed=k) for k, m in enumerate(MODALITIES)]
    for t, data in zip(made, toy_pairs(40, size=28, classes=CLASSES)):
        t.net.train()
        with torch.no_grad():
            for _ in range(20):
                t.net(t.normalizer(data.images()))
        t.net.eval()
    return made


def begin(teachers, config, folder):
    return CrossX(*teachers, config), RunFolder(folder, asdict(config))


def result(run):
    "Everything a run leaves behind, bytes where bytes are promised."
    return (
        {m: e.state_dict() for m, e in load_encoders(run.encoders).items()},
        (run.path / "metrics.jsonl").read_bytes(),
        {p.name: p.read_bytes() for p in run.samples.iterdir()},
    )


def assert_same(a, b):
    for m in MODALITIES:
        assert a[0][m].keys() == b[0][m].keys()
        for k in a[0][m]:
            assert torch.equal(a[0][m][k], b[0][m][k]), (m, k)
    assert a[1] == b[1], "metrics.jsonl differs"
    assert a[2] == b[2], "pictures differ"


def press_during(crossx, at):
    "Ctrl-C in the middle of action number `at`, from 0."
    act = crossx.act

    def pressed(action):
        if crossx.position == at:
            os.kill(os.getpid(), signal.SIGINT)
        return act(action)

    crossx.act = pressed


@pytest.fixture(scope="module")
def whole(teachers, tmp_path_factory):
    "Uninterrupted runs of both presets."
    found = {}
    for name, config in CONFIGS.items():
        crossx, run = begin(teachers, config, tmp_path_factory.mktemp(name) / "run")
        crossx.fit(run, progress=False)
        found[name] = result(run)
    return found


# stopping and going on


def test_plan_has_every_phase():
    assert PLAN == ["synthesize"] * 2 + ["synthesize", "collect", "teach", "teach"] * 2
    assert CONFIGS["paper"].plan() == PLAN


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("at", [0, 3, 5, 9], ids=lambda i: f"{i}-{PLAN[i]}")
def test_ctrl_c_and_resume_equal_an_uninterrupted_run(teachers, whole, tmp_path, preset, at):
    crossx, run = begin(teachers, CONFIGS[preset], tmp_path / "run")
    before = signal.getsignal(
        signal.SIGINT
    )  # ignored, where the tests run in the background of a shell
    press_during(crossx, at)
    with pytest.raises(
        KeyboardInterrupt,
        match=f"stopped after action {at + 1} of {len(PLAN)} and saved: call fit with the same run folder",
    ) as stop:
        crossx.fit(run, progress=False)
    assert str(run.path) in str(stop.value)
    assert signal.getsignal(signal.SIGINT) is before
    assert run.load_checkpoint("last")["position"] == at + 1
    torch.manual_seed(999)
    again, run = begin(teachers, CONFIGS[preset], tmp_path / "run")
    torch.rand(7)  # what a notebook draws between two cells
    again.fit(run, progress=False)
    assert_same(result(run), whole[preset])


def test_resume_in_the_same_object(teachers, whole, tmp_path):
    crossx, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / "run")
    press_during(crossx, 4)
    with pytest.raises(KeyboardInterrupt):
        crossx.fit(run, progress=False)
    torch.rand(5)
    crossx.fit(run, progress=False)
    assert_same(result(run), whole["dfsbir"])


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("after", [2, 7])
def test_a_run_that_died_without_saving_goes_on_from_its_last_checkpoint(
    teachers, whole, tmp_path, preset, after
):
    def die(crossx, action, scalars):
        if crossx.position == after:
            raise SystemExit("killed")

    crossx, run = begin(teachers, CONFIGS[preset], tmp_path / "run")
    with pytest.raises(SystemExit):
        crossx.fit(run, [die], progress=False)
    kept = run.load_checkpoint("last")["position"] if run.has_checkpoint("last") else 0
    assert (
        kept == after // SMALL["save_every"] * SMALL["save_every"] and len(run.metrics()) == after
    )
    with open(run.path / "metrics.jsonl", "a") as f:
        f.write('{"step": 8, "cut sho')  # as a kill leaves it
    again, run = begin(teachers, CONFIGS[preset], tmp_path / "run")
    again.fit(run, progress=False)
    assert_same(result(run), whole[preset])


def test_stopped_at_every_action(teachers, whole, tmp_path):
    for at in range(len(PLAN)):
        crossx, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / "run")
        press_during(crossx, at)
        with pytest.raises(KeyboardInterrupt):
            crossx.fit(run, progress=False)
    crossx, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / "run")
    crossx.fit(run, progress=False)
    assert_same(result(run), whole["dfsbir"])


def test_a_finished_run_changes_nothing_when_it_is_called_again(teachers, whole, tmp_path):
    seen = []
    for _ in range(2):
        crossx, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / "run")
        crossx.fit(run, [lambda crossx, action, scalars: seen.append(action)], progress=False)
        assert_same(result(run), whole["dfsbir"])
    assert seen == PLAN


def test_callbacks_that_draw_and_pictures_change_no_number(teachers, whole, tmp_path):
    def meddle(crossx, action, scalars):
        torch.rand(3)
        crossx.watch()

    crossx, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / "run")
    crossx.fit(run, [meddle], progress=False)
    assert_same(result(run), whole["dfsbir"])


SCRIPT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from dfsbir.core.run_folder import RunFolder
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.trainer import CrossX
from dfsbir.teachers import load_teacher
home = Path(sys.argv[1])
config = CrossXConfig(**json.loads((home / "config.json").read_text()))
teachers = [load_teacher(home / f"{m}.safetensors") for m in ("photo", "sketch")]
"""
STOPPABLE = (
    SCRIPT
    + """
import time
def slowly(crossx, action, scalars): print(action, flush=True); time.sleep(.2)
CrossX(*teachers, config).fit(RunFolder(home / "run", asdict(config)), [slowly])
"""
)


@pytest.fixture
def home(teachers, tmp_path):
    "A folder with two saved teachers and a config."
    for m, t in zip(MODALITIES, teachers):
        save_teacher(t, tmp_path / f"{m}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(asdict(CONFIGS["dfsbir"])))
    return tmp_path


def test_sigint_to_a_process(home, whole):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPABLE, str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.strip() == "collect":
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "and saved: call fit with the same run folder" in err and str(home / "run") in err
    position = RunFolder(home / "run").load_checkpoint("last")["position"]
    assert PLAN.index("collect") < position < len(PLAN)
    crossx, run = begin(
        [load_teacher(home / f"{m}.safetensors") for m in MODALITIES],
        CONFIGS["dfsbir"],
        home / "run",
    )
    crossx.fit(run, progress=False)
    assert_same(result(run), whole["dfsbir"])


# faults


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

    crossx, run = begin(broken, CONFIGS["dfsbir"], tmp_path / "run")
    with pytest.raises((NonFiniteTerm, ValueError, FloatingPointError)) as e:
        crossx.fit(run, [spoil], progress=False)
    assert "nan" in str(e.value).lower() and any(
        "action 4 of 10 (collect)" in n or "action 5 of 10 (teach)" in n for n in e.value.__notes__
    ), (e.value, e.value.__notes__)
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
def test_weights_that_are_no_numbers_reach_neither_checkpoint_nor_encoders(
    teachers, tmp_path, what
):
    "A finite loss can have a gradient that is not; the very last step has no next loss to show it."
    crossx, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / "run")
    net = (
        crossx.distiller.students.photo
        if what == "student"
        else crossx.estimator.generators[Modality.PHOTO]
    )
    act = crossx.act

    def overflow(action):
        scalars = act(action)
        if crossx.position == len(PLAN) - 1:
            next(net.parameters()).data.fill_(float("inf"))
        return scalars

    crossx.act = overflow
    with pytest.raises(FloatingPointError, match=what):
        crossx.fit(run, progress=False)
    assert run.load_checkpoint("last")["position"] == 9
    assert not list(run.encoders.iterdir())


def test_a_collapsed_estimator_is_named(teachers, tmp_path):
    crossx, run = begin(
        teachers, replace(CONFIGS["dfsbir"], warmup=12, save_every=1), tmp_path / "run"
    )
    crossx.estimator.patience = 2
    for p in crossx.estimator.generators[Modality.PHOTO].parameters():
        p.data.zero_()
    with pytest.raises(EstimatorCollapsed, match="photo estimates of one class differ by 0.0") as e:
        crossx.fit(run, progress=False)
    assert "action 4 of" in e.value.__notes__[0] and "checkpoint" in e.value.__notes__[0]
    assert run.load_checkpoint("last")["position"] == 3


@pytest.fixture
def idle(teachers):
    "A CrossX of which no action may be asked."

    def start(folder):
        crossx, run = begin(teachers, CONFIGS["dfsbir"], folder)
        crossx.act = lambda action: pytest.fail("work began")
        return crossx, run

    return start


class Usage:
    total, used, free = 10**9, 10**9, 1000


def test_a_full_disk_is_reported_before_the_work(idle, tmp_path, monkeypatch):
    crossx, run = idle(tmp_path / "run")
    monkeypatch.setattr(dfsbir.core.checkpoint.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(
        OSError, match=r"has 0 MB free and this run writes about \d+ MB: free some space"
    ):
        crossx.fit(run, progress=False)
    with pytest.raises(OSError, match="free some space"):
        RunFolder(tmp_path / "other", {})


def test_room_is_asked_for_bank_and_weights(teachers, tmp_path, monkeypatch):
    "Two checkpoints stand side by side while one is renamed; each holds the bank, four copies of the students and three of the generators."
    config = replace(CONFIGS["dfsbir"], bank=1_000_000)
    crossx, run = begin(teachers, config, tmp_path / "run")
    weights = 4 * sum(p.numel() for p in crossx.distiller.students.parameters()) * 4
    asked = []
    monkeypatch.setattr(
        "dfsbir.crossx.trainer.require_writable", lambda folder, need: asked.append(need)
    )
    crossx.config = replace(config, warmup=0, rounds=0)
    crossx.fit(run, progress=False)
    assert asked[0] >= 2 * (1_000_000 * 4 * SIDE**2 + weights)


def test_a_folder_that_cannot_be_written_is_reported_before_the_work(idle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to .*file/run.*Name another run folder"):
        idle(tmp_path / "file" / "run")
    crossx, run = idle(tmp_path / "run")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(dfsbir.core.checkpoint.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(dfsbir.core.checkpoint.tempfile, "mkstemp", refuse)
    with pytest.raises(
        OSError, match="cannot write to .*run: Read-only file system. Name another run folder"
    ):
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
    crossx, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / "run")
    with pytest.raises(OSError, match="No space left"):
        crossx.fit(run, progress=False)
    assert [p.name for p in run.checkpoints.iterdir()] == ["last.safetensors"]
    assert run.load_checkpoint("last")["position"] == 3
    crossx, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / "run")
    crossx.fit(run, progress=False)
    assert_same(result(run), whole["dfsbir"])


def test_another_config_does_not_go_on_with_a_run(teachers, tmp_path):
    _, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / "run")
    run.log(1, loss=1)
    with pytest.raises(ValueError, match="student_lr: 3e-05 there, 0.5 here"):
        begin(teachers, replace(CONFIGS["dfsbir"], student_lr=0.5), tmp_path / "run")


# the config


def test_unknown_names_and_wrong_types_raise():
    with pytest.raises(ValueError, match=r"unknown parameters \['warm_up'\].*warmup"):
        CrossXConfig.preset("dfsbir", warm_up=3)
    with pytest.raises(TypeError, match="warm_up"):
        CrossXConfig(warm_up=3)
    with pytest.raises(ValueError, match="presets are .*paper"):
        CrossXConfig.preset("papers")
    for name, value in dict(
        warmup="200",
        batch=40.0,
        conditioned=1,
        seed=True,
        guidance=None,
        w_bn="0.5",
        student_lr=None,
    ).items():
        with pytest.raises(TypeError, match=f"{name} wants .*found {value!r}"):
            CrossXConfig.preset("dfsbir", **{name: value})
    assert type(CrossXConfig(w_bn=1).w_bn) is float


@pytest.mark.parametrize(
    "change",
    [
        dict(batch=1),
        dict(warmup=-1),
        dict(student_steps=-1),
        dict(synthesis_steps=-1),
        dict(new_pairs=0),
        dict(views=0),
        dict(pages=0),
        dict(strokes=0),
        dict(bank=0),
        dict(sketch_estimator="strokes"),
        dict(guidance="procedual"),
        dict(readout="features"),
        dict(w_class=0.0),
        dict(conditioned=False),
        dict(pairs="things"),
        dict(interpolate=1.1),
        dict(interpolate=-0.1),
        dict(temperature=0.0),
        dict(temperature=-1.0),
        dict(mix=2.0),
        dict(mix=-0.1),
        dict(head_lr=1e-3),
        dict(w_instance=1.0),
    ],
    ids=str,
)
def test_values_out_of_range_raise_before_anything_is_made(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        CrossXConfig.preset("dfsbir", **change)


def test_presets_are_flat_and_name_real_fields():
    for name, changes in PRESETS.items():
        assert set(changes) <= {f.name for f in fields(CrossXConfig)}
        config = asdict(CrossXConfig.preset(name))
        assert CrossXConfig(**json.loads(json.dumps(config))) == CrossXConfig.preset(name)


def test_every_weight_is_a_term_and_every_term_is_logged(teachers, tmp_path):
    "All switches on at once; each term is in the log under its name."
    on = {f.name: 0.1 for f in fields(CrossXConfig) if f.name.startswith("w_")}
    crossx, run = begin(
        teachers,
        replace(CONFIGS["dfsbir"], **on, guidance="teachers", readout="joint"),
        tmp_path / "run",
    )
    crossx.fit(run, progress=False)
    logged = {k for line in run.metrics() for k in line}
    assert {f"estimator/{k}" for k in crossx.estimator.terms.weights} | {
        f"student/{k}" for k in crossx.distiller.terms.weights
    } <= logged
    assert set(on) == {
        f"w_{k}" for k in (*crossx.estimator.terms.weights, *crossx.distiller.terms.weights)
    }


# the data-free law


def test_a_callback_that_opens_a_training_image_is_stopped(teachers, tmp_path):
    picture = tmp_path / "photos" / "one.png"
    picture.parent.mkdir()
    save_image(torch.rand(3, 8, 8), picture)

    def peek(crossx, action, scalars):
        picture.read_bytes()

    def make(crossx, action, scalars):
        toy_pairs(4, size=28)

    for k, spy in enumerate((peek, make)):
        crossx, run = begin(teachers, CONFIGS["dfsbir"], tmp_path / f"run{k}")
        with pytest.raises(DataFreeViolation, match="data-free law holds"):
            crossx.fit(run, [spy], progress=False)
    picture.read_bytes()  # after fit the law is over


def test_guidance_folders_alone_may_be_opened(teachers, tmp_path):
    for data in toy_pairs(12, size=28):
        for i, x in enumerate(data.images()):
            (tmp_path / data.modality).mkdir(exist_ok=True)
            save_image(x, tmp_path / data.modality / f"{i}.png")
    config = replace(
        CONFIGS["dfsbir"],
        w_modality=1.0,
        guidance="folders",
        guidance_photos=str(tmp_path / "photo"),
        guidance_sketches=str(tmp_path / "sketch"),
        warmup=1,
        rounds=0,
    )
    crossx, run = begin(teachers, config, tmp_path / "run")
    crossx.fit(run, [lambda *_: (tmp_path / "photo" / "0.png").read_bytes()], progress=False)
    assert "photo images of" in crossx.guide.description
    with pytest.raises(ValueError, match="folders"):
        CrossX(*teachers, replace(config, guidance_sketches=""))


AUDIT = (
    SCRIPT.replace(
        'teachers = [load_teacher(home / f"{m}.safetensors") for m in ("photo", "sketch")]\n', ""
    )
    + """
import os
opened, phase = [], ["teachers"]
def hear(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)): opened.append((phase[0], os.path.realpath(os.fsdecode(args[0]))))
sys.addaudithook(hear)
from dfsbir.data import read_folder
from dfsbir.evaluation import embed, evaluate_retrieval
from dfsbir.teachers import train_teacher
teachers = [train_teacher(read_folder(home / "data", m, 16, split="train", cached=False), net="tiny", epochs=1, progress=False) for m in ("photo", "sketch")]
phase[0] = "fit"
crossx = CrossX(*teachers, config)
encoders = crossx.fit(RunFolder(home / "run", asdict(config)), progress=False)
phase[0] = "evaluation"
photos, sketches = (read_folder(home / "data", m, 16, split="test") for m in ("photo", "sketch"))
evaluate_retrieval(embed(encoders["sketch"], sketches), embed(encoders["photo"], photos), sketches.labels, photos.labels, ks=(2,))
print(json.dumps(opened))
"""
)


def test_audit_no_training_image_is_opened_between_freezing_and_evaluation(home):
    for split in ("train", "test"):
        for data in toy_pairs(24, size=28, classes=CLASSES, split=split):
            for i, (x, y) in enumerate(data):
                folder = home / "data" / split / data.modality / CLASSES[y]
                folder.mkdir(parents=True, exist_ok=True)
                save_image(x, folder / f"{i}.png")
    done = subprocess.run(
        [sys.executable, "-c", AUDIT, str(home)], capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr
    opened = json.loads(done.stdout.splitlines()[-1])

    def under(phase, *parts):
        top = os.path.realpath(home.joinpath(*parts)) + os.sep
        return {p for when, p in opened if when == phase and p.startswith(top)}

    train = {str(p) for p in (home / "data" / "train").resolve().rglob("*.png")}
    assert under("teachers", "data", "train") & train == train, "the recorder hears training images"
    assert not under("fit", "data"), (
        "a data file was opened between the teachers' freezing and evaluation"
    )
    assert not under("teachers", "data", "test") and not under("evaluation", "data", "train")
    assert under("evaluation", "data", "test")
    assert under("fit", "run", "checkpoints"), "the recorder hears fit"


# teachers of all kinds

FEW = dict(warmup=1, rounds=1)


def test_partial_overlap_and_many_to_one(tmp_path):
    photo = make_teacher(Modality.PHOTO, ["poodle", "beagle", "car", "tree", "moon"])
    sketch = make_teacher(Modality.SKETCH, ["dog", "automobile", "fish", "tree"])
    config = replace(CONFIGS["dfsbir"], **FEW)
    crossx = CrossX(
        photo, sketch, config, aliases={"poodle": "dog", "beagle": "dog", "automobile": "car"}
    )
    encoders = crossx.fit(RunFolder(tmp_path / "run", asdict(config)), progress=False)
    assert crossx.class_map.classes == ["dog", "car", "tree"] and crossx.class_map.dropped == {
        "photo": ["moon"],
        "sketch": ["fish"],
    }
    assert crossx.bank.pairs.label.max() < 3 and crossx.bank.pairs.photo_target.shape[1] == 3
    assert torch.allclose(
        crossx.bank.pairs.sketch_target.sum(1), torch.ones(len(crossx.bank)), atol=1e-5
    )
    assert all(e.card["classes"] == ["dog", "car", "tree"] for e in encoders.values())
    with pytest.raises(ValueError, match="share no class"):
        CrossX(
            photo,
            sketch.__class__(sketch.net, ["a", "b", "c", "d"], sketch.normalizer, "sketch"),
            config,
        )


def no_norm(channels, classes=4):
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, classes),
    )


def check(encoders, dim=16):
    for m, e in encoders.items():
        z = e(torch.rand(3, m.channels, 20, 20))
        assert z.shape == (3, dim) and torch.allclose(z.norm(dim=1), torch.ones(3), atol=1e-5), m


@pytest.mark.parametrize("readout", ["posterior", "feature", "joint"])
@pytest.mark.parametrize("warm", [True, False])
def test_teachers_of_different_nets_sizes_and_inputs(tmp_path, readout, warm):
    pair = (
        make_teacher(Modality.PHOTO, net="small", size=24),
        make_teacher(
            Modality.SKETCH,
            net="torchvision/squeezenet1_1",
            normalizer=Normalizer(33, 3, 0.5, 0.5, dark_on_light=False),
        ),
    )
    config = replace(CONFIGS["dfsbir"], **FEW, readout=readout, warm_start=warm, w_proxy_anchor=0.1)
    crossx = CrossX(*pair, config)
    check(crossx.fit(RunFolder(tmp_path / "run", asdict(config)), progress=False))
    check(load_encoders(tmp_path / "run" / "encoders"))
    assert (
        crossx.distiller.students.sketch.normalizer.size == 33
        and not crossx.distiller.students.sketch.normalizer.dark_on_light
    )


@pytest.mark.parametrize("readout", ["posterior", "feature"])
def test_modules_of_one_and_three_channels_without_batch_norm(tmp_path, readout):
    pair = (
        make_teacher(Modality.PHOTO, net=no_norm(3), size=20),
        make_teacher(
            Modality.SKETCH,
            net=no_norm(1),
            normalizer=Normalizer(28, 1, 0.1, 0.3, dark_on_light=False),
        ),
    )
    config = replace(CONFIGS["dfsbir"], **FEW, readout=readout)
    with pytest.raises(ValueError, match="cannot be rebuilt by name.*student_net.*warm_start"):
        CrossX(*pair, config)
    with pytest.raises(ValueError, match="another architecture.*warm_start"):
        CrossX(*pair, replace(config, student_net="dfsbir/tiny"))
    config = replace(config, student_net="dfsbir/tiny", warm_start=False)
    with pytest.raises(ValueError, match="neither teacher has batch norms.*bn weight 0"):
        CrossX(*pair, config).fit(RunFolder(tmp_path / "bn", asdict(config)), progress=False)
    config = replace(config, w_bn=0.0)
    check(CrossX(*pair, config).fit(RunFolder(tmp_path / "run", asdict(config)), progress=False))
    check(load_encoders(tmp_path / "run" / "encoders"))


def test_one_teacher_with_batch_norm_is_prior_enough(teachers, tmp_path):
    config = replace(CONFIGS["dfsbir"], **FEW, warm_start=False, student_net="dfsbir/tiny")
    pair = teachers[0], make_teacher(Modality.SKETCH, net=no_norm(3))
    crossx, run = begin(pair, config, tmp_path / "run")
    check(crossx.fit(run, progress=False))
    with pytest.raises(ValueError, match="no batch norm.*procedural"):
        CrossX(*pair, replace(config, w_modality=1.0, guidance="teachers"))


def test_swapped_teachers_are_named(teachers):
    with pytest.raises(
        ValueError, match="wanted a photo teacher; found one of modality sketch: photo first"
    ):
        CrossX(*reversed(teachers), CONFIGS["dfsbir"])


def test_a_space_too_small_is_named(teachers):
    crossx = CrossX(*teachers, replace(CONFIGS["dfsbir"], dim=2))
    assert crossx.distiller.students.photo.head.proxies.shape == (4, 6), (
        "the space grows to what the classes need"
    )


# precision and processes


@pytest.mark.parametrize("preset", CONFIGS)
def test_bf16_on_the_cpu(teachers, tmp_path, preset):
    crossx, run = begin(
        teachers, replace(CONFIGS[preset], precision="bf16-mixed"), tmp_path / "run"
    )
    check(crossx.fit(run, progress=False))
    for e in load_encoders(run.encoders).values():
        assert all(v.dtype in (torch.float32, torch.int64) for v in e.state_dict().values())


def test_the_loss_scale_goes_on_where_it_stopped(teachers, tmp_path):
    "16-mixed as on a GPU: a scaler that grows every second step."
    config = replace(CONFIGS["dfsbir"], precision="16-mixed")

    def begin16(folder):
        fabric = Fabric(
            accelerator="cpu",
            devices=1,
            plugins=MixedPrecision(
                "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
            ),
        )
        return CrossX(*teachers, config, fabric=fabric), RunFolder(folder, asdict(config))

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


TWO = (
    SCRIPT
    + """
import torch
from dfsbir.core.device import make_fabric
fabric = make_fabric("cpu", processes=2)
for name in ("dfsbir", "paper"):
    config = CrossXConfig(**json.loads((home / f"{name}.json").read_text()))
    crossx = CrossX(*teachers, config, fabric=fabric)
    heard = []
    crossx.fit(RunFolder(home / name, asdict(config)), [lambda c, action, scalars: heard.append(c.position)], progress=False)
    nets = [crossx.distiller.students, *crossx.estimator.generators.values()]
    torch.save({"weights": [p.detach().clone() for n in nets for p in n.parameters()], "bank": crossx.bank.pairs.photo, "heard": heard}, home / f"{name}{fabric.global_rank}.pt")
    if name == "dfsbir": continue
    stopped = CrossXConfig(**{**asdict(config), "seed": 1})
    crossx = CrossX(*teachers, stopped, fabric=fabric)
    if fabric.global_rank == 1:  # Ctrl-C reaches one process before the other
        act = crossx.act
        def press(action):
            if crossx.position == 4:
                import signal; signal.raise_signal(signal.SIGINT)
            return act(action)
        crossx.act = press
    try: crossx.fit(RunFolder(home / f"{name}-stopped", asdict(stopped)), progress=False)
    except KeyboardInterrupt: pass
    first = crossx.position
    again = CrossX(*teachers, stopped, fabric=fabric)
    again.fit(RunFolder(home / f"{name}-stopped", asdict(stopped)), progress=False)
    straight = CrossX(*teachers, stopped, fabric=fabric)
    straight.fit(RunFolder(home / f"{name}-straight", asdict(stopped)), progress=False)
    same = all(torch.equal(a, b) for x, y in ((again.distiller.students, straight.distiller.students), *zip(again.estimator.generators.values(), straight.estimator.generators.values())) for a, b in zip(x.parameters(), y.parameters()))
    (home / f"{name}{fabric.global_rank}.json").write_text(json.dumps([first, same]))
for changes in (dict(readout="joint", w_instance=0.), dict(readout="feature", w_consistency=0., w_contrast=1.)):  # weights that no term reaches
    odd = CrossX(*teachers, CrossXConfig(**{**asdict(config), "pairs": "objects", "warmup": 0, "synthesis_steps": 0, "w_proxy_anchor": 0., "w_consistency": 1., **changes}), fabric=fabric)
    for action in ("collect", "teach", "teach", "teach"): odd.act(action)
from dfsbir.baselines import GaussianPrior
noise = GaussianPrior(*teachers, config, fabric=fabric)
torch.save(noise.noise(noise.crossx.teachers["photo"].modality, 4), home / f"noise{fabric.global_rank}.pt")
"""
)


def test_two_processes_agree(home):
    for name, config in CONFIGS.items():
        (home / f"{name}.json").write_text(json.dumps(asdict(config)))
    (home / "two.py").write_text(TWO)
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")
    }
    done = subprocess.run(
        [sys.executable, str(home / "two.py"), str(home)],
        capture_output=True,
        text=True,
        timeout=200,
        env=env | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert not done.returncode, done.stderr
    for name in CONFIGS:
        one, two = (torch.load(home / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
        assert one["heard"] == two["heard"] == list(range(1, len(PLAN) + 1))
        assert len(one["weights"]) == len(two["weights"]) > 20
        for a, b in zip(one["weights"], two["weights"]):
            assert torch.equal(a, b)
        assert not torch.equal(one["bank"], two["bank"]), (
            "each process estimates pictures of its own"
        )
        check(load_encoders(home / name / "encoders"))
    assert not torch.equal(
        *(torch.load(home / f"noise{rank}.pt", weights_only=True) for rank in range(2))
    ), "and each has noise of its own"
    (first, same), other = (
        json.loads((home / f"paper{rank}.json").read_text()) for rank in range(2)
    )
    assert first == 5 and same and other == [first, same], (
        "stopped together, and went on as if never stopped"
    )


# objects instead of estimates


def test_open_asks_no_estimator(teachers, tmp_path):
    crossx, run = begin(teachers, OPEN, tmp_path / "run")
    seen = []
    encoders = crossx.fit(
        run, [lambda crossx, action, scalars: seen.append(action)], progress=False
    )
    assert seen == ["collect", "teach", "teach"] * 2 and not crossx.estimator.generators
    check(encoders), check(load_encoders(run.encoders))
    bank = crossx.bank.pairs
    assert (
        bank.photo.shape[1:] == (3, SIDE, SIDE)
        and bank.sketch.shape[1:] == (1, 12, 12)
        and bank.photo_target.shape == (16, 4)
    )
    assert sorted(bank.label.tolist()) == sorted(set(bank.label.tolist())), (
        "each object has a number of its own"
    )
    assert {"student/consistency", "student/infonce", "student/total"} <= set(run.metrics()[-1])
    assert not list(run.samples.iterdir())
    a, drawn, b = crossx.watch(), torch.get_rng_state(), crossx.watch()
    assert torch.equal(a.photo, b.photo) and torch.equal(drawn, torch.get_rng_state())


def test_open_stopped_at_every_action_equals_an_uninterrupted_run(teachers, tmp_path):
    crossx, run = begin(teachers, OPEN, tmp_path / "whole")
    crossx.fit(run, progress=False)
    whole = result(run)
    for at in range(len(OPEN.plan())):
        crossx, run = begin(teachers, OPEN, tmp_path / "run")
        press_during(crossx, at)
        with pytest.raises(KeyboardInterrupt):
            crossx.fit(run, progress=False)
        torch.rand(5)
    crossx, run = begin(teachers, OPEN, tmp_path / "run")
    crossx.fit(run, progress=False)
    assert_same(result(run), whole)


def test_open_obeys_the_data_free_law(teachers, tmp_path):
    crossx, run = begin(teachers, OPEN, tmp_path / "run")
    with pytest.raises(DataFreeViolation, match="data-free law holds"):
        crossx.fit(run, [lambda *_: toy_pairs(4, size=28)], progress=False)


def test_interpolate_none_of_the_way_keeps_the_teachers(teachers, tmp_path):
    "The students move, what is kept does not: its answers are the teachers'."
    crossx, run = begin(teachers, replace(OPEN, interpolate=0.0, student_lr=1e-2), tmp_path / "run")
    encoders = crossx.fit(run, progress=False)
    for m, t in zip(MODALITIES, teachers):
        x = torch.rand(5, m.channels, SIDE, SIDE)
        torch.testing.assert_close(
            encoders[m].predict_log_probs(x)[1].exp(),
            crossx.class_map.posteriors(t(x).logits, m),
            atol=1e-5,
            rtol=1e-3,
        )
        assert (
            crossx.distiller.students.get_submodule(m).eval().predict_log_probs(x)[1].exp()
            - crossx.class_map.posteriors(t(x).logits, m)
        ).abs().max() > 1e-3


def test_objects_want_no_estimator_and_no_class():
    for change, says in (
        (dict(warmup=5), "in vain: .*found 5 and 0"),
        (dict(synthesis_steps=2), "in vain"),
        (dict(w_proxy_anchor=1.0), "objects have none"),
    ):
        with pytest.raises(ValueError, match=says):
            CrossXConfig.preset("open", **change)


def test_a_joint_readout_has_room_for_every_class(teachers):
    crossx = CrossX(*teachers, replace(OPEN, dim=2))
    assert crossx.distiller.students.photo.head.basis.shape == (4, 8), (
        "the space grows to what classes and shape need"
    )


def test_each_process_draws_objects_of_its_own():
    def first(rank):
        return ProceduralPairs(
            (SIDE, SIDE), SimpleNamespace(global_rank=rank, device=torch.device("cpu")), seed=0
        ).sample(4)

    assert torch.equal(first(0).photo, first(0).photo) and not torch.equal(
        first(0).photo, first(1).photo
    )


def test_open_in_bf16(teachers, tmp_path):
    crossx, run = begin(
        teachers, replace(OPEN, precision="bf16-mixed", sketch_size=SIDE), tmp_path / "run"
    )
    check(crossx.fit(run, progress=False))
    assert all(
        v.dtype in (torch.float32, torch.int64)
        for e in load_encoders(run.encoders).values()
        for v in e.state_dict().values()
    )


LAYERED = dict(
    readout="layers",
    layers="blocks.0.bn1, blocks.0.bn2",
    layers_memory=0.2,
    student_size=24,
    student_steps=0,
    w_instance=0.0,
    w_consistency=0.0,
    head_lr=0.0,
    interpolate=1.0,
    dim=16,
)


def test_layers_are_settled_on_objects_and_nothing_is_taught(teachers, tmp_path):
    config = replace(OPEN, **LAYERED)
    crossx, run = begin(teachers, config, tmp_path / "run")
    encoders = crossx.fit(run, progress=False)
    check(encoders)
    for m, e in encoders.items():
        assert e.head.shape.mean.abs().sum() > 0 and e.normalizer.size == 24
        torch.testing.assert_close(
            load_encoders(run.encoders)[m].head.shape.mean, e.head.shape.mean
        )
        before = {
            k: v for k, v in crossx.teachers[m].net.state_dict().items() if not k.startswith("fc")
        }
        assert all(torch.equal(v, before[k]) for k, v in e.net.net.state_dict().items()), (
            "the teacher's net as it was"
        )


def test_layers_without_a_memory_fail_at_once(teachers, tmp_path):
    with pytest.raises(ValueError, match="only a plain batch norm.*Conv2d"):
        begin(
            teachers,
            replace(OPEN, **LAYERED | dict(layers="blocks.0.one, blocks.0.bn2")),
            tmp_path / "run",
        )


def test_layers_want_names_and_objects():
    for change, says in (
        (dict(layers=""), "wants the names of layers"),
        (dict(layers_memory=1.5), "from 0 to 1"),
        (dict(layers="", readout="joint"), "is 0 without readout='layers'"),
        (dict(readout="joint"), "no other read-out does"),
        (dict(student_size=-1), "side of an input"),
        (dict(rounds=0), "rounds=1 at least"),
    ):
        with pytest.raises(ValueError, match=says):
            CrossXConfig.preset("open", **{**LAYERED, **change})
    with pytest.raises(ValueError, match="wants pairs='objects'"):
        CrossXConfig.preset("dfsbir", **{**LAYERED, "student_steps": 5})
