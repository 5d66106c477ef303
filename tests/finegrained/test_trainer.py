"""The trainer: every method steps, learns, is averaged, and goes on where it stopped."""

import math

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision

from dfsbir.core.checkpoint import read_card
from dfsbir.core.run_folder import RunFolder
from dfsbir.data.image_set import ImageSet
from dfsbir.finegrained.config import FineGrainedConfig
from dfsbir.finegrained.evaluation import evaluate_instances
from dfsbir.finegrained.saving import load_fine
from dfsbir.finegrained.trainer import FineGrained, fit_fine


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_what_is_missing_is_named(toy, tiny_config):
    config = tiny_config("full")
    with pytest.raises(ValueError, match="photos and sketches"):
        FineGrained(config)
    with pytest.raises(ValueError, match="unlabelled"):
        FineGrained(config, *toy)
    with pytest.raises(ValueError, match="teacher"):
        FineGrained(config, *toy, unlabelled=toy[0])


def test_a_student_of_unlabelled_photos_alone(toy, teacher, tiny_config):
    config = tiny_config(
        "full", **{"pairs": None, "distillation.photo": 0.0, "distillation.sketch": 0.0}
    )
    method = FineGrained(config, unlabelled=toy[0], teacher=teacher)
    assert method.step()["kd_unlabelled"] > 0


@pytest.mark.parametrize("preset", FineGrainedConfig.PRESETS)
def test_every_preset_takes_a_step(preset, make_method, teacher):
    method = make_method(preset, teacher)
    before, frozen = copy_of(method.encoder), copy_of(teacher)
    values = method.step()
    on = {name for name, weight in method.config.weights.items() if weight}
    assert set(values) == on | {"total"}
    assert all(math.isfinite(value) for value in values.values())
    assert not same(before, method.encoder.state_dict())
    assert same(frozen, teacher.state_dict()), "a teacher does not learn"


def test_methods_start_alike(make_method, teacher):
    a, b = make_method("triplet"), make_method("full", teacher)
    assert same(a.encoder.state_dict(), b.encoder.state_dict())


def test_averaging_changes_nothing_of_the_training(make_method):
    "Strong's own weights are those of triplet-intra; its average is the recursion, step for step."
    plain, strong = (
        make_method("triplet-intra"),
        make_method("strong", **{"training.ema_decay": 0.6}),
    )
    average = copy_of(strong.encoder)
    for step in range(1, 9):
        plain.step()
        strong.step()
        beta = min(0.6, (1 + step) / (3 + step))
        own = strong.encoder.state_dict()
        average = {k: beta * v + (1 - beta) * own[k] for k, v in average.items()}
    assert same(plain.encoder.state_dict(), strong.encoder.state_dict())
    with strong.averaged() as encoder:
        for name, value in encoder.state_dict().items():
            if value.is_floating_point():
                assert torch.allclose(value, average[name], atol=1e-6)
    assert same(plain.encoder.state_dict(), strong.encoder.state_dict())


EASY = {"training.lr": 3e-3, "views.positive_strength": 0.3, "views.flip": 0.0}


def test_it_learns(make_method):
    method = make_method("triplet-intra", **EASY, **{"views.strength": 0.2})
    losses = [method.step()["cross"] for _ in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_teacher_learns(make_method):
    method = make_method("teacher", **EASY, **{"views.strength": 0.1})
    losses = [method.step()["unlabelled"] for _ in range(30)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_resumed_is_uninterrupted(tmp_path, make_method, test_toy, teacher):
    monitored = {"val": test_toy, "test": test_toy}

    def run(name, epochs):
        method = make_method("full", teacher, **{"training.epochs": epochs})
        folder = RunFolder(tmp_path / name, {})
        fit_fine(method, folder, monitored, save_every=1, progress=False)
        return method

    whole = run("a", 4)
    run("b", 2)
    with open(tmp_path / "b" / "metrics.jsonl", "a") as log:
        log.write('{"step": 3, "left": 1}\n')  # killed before the checkpoint
    resumed = run("b", 4)
    a, b = (load_fine(tmp_path / name / "encoders" / "last.safetensors") for name in "ab")
    assert same(a.state_dict(), b.state_dict())
    assert RunFolder(tmp_path / "a").metrics() == RunFolder(tmp_path / "b").metrics()
    assert whole.best == resumed.best


def test_measuring_changes_nothing(tmp_path, make_method, toy, test_toy):
    "With the test alone, and with validation beside it, training ends with the same weights."
    encoders = []
    for name, monitored in (("a", {"test": test_toy}), ("b", {"val": toy, "test": test_toy})):
        run = RunFolder(tmp_path / name, {})
        fit_fine(make_method("strong"), run, monitored, progress=False)
        encoders.append(load_fine(run.encoders / "last.safetensors").state_dict())
        assert (run.encoders / "chosen.safetensors").is_file() == ("val" in monitored)
    assert same(*encoders)
    wanted = {"val/Acc@1", "test/Acc@1", "test raw/Acc@1", "test/mean rank", "loss/cross"}
    assert wanted | {"loss/total"} <= set(run.metrics()[0])


def test_validation_alone_chooses(tmp_path, make_method, toy, test_toy):
    "The chosen epoch is the first of the best on validation, by Acc@1 and then by mean rank."
    run = RunFolder(tmp_path / "run", {})
    method = make_method("triplet", **{"training.epochs": 6, "training.lr": 5e-3})
    fit_fine(method, run, {"val": toy, "test": test_toy}, progress=False)
    lines = run.metrics()
    quality = [(line["val/Acc@1"], -line["val/mean rank"]) for line in lines]
    chosen = 1 + quality.index(max(quality))
    file = run.encoders / "chosen.safetensors"
    assert read_card(file)["epoch"] == chosen == method.best[2]
    report = evaluate_instances(load_fine(file), *toy)
    assert report.metrics["Acc@1"] == lines[chosen - 1]["val/Acc@1"]


def test_it_starts_from_another_encoder_and_leaves_it_alone(tiny_config, toy, tiny_encoder):
    torch.manual_seed(9)
    start = tiny_encoder()
    before = copy_of(start)
    method = FineGrained(tiny_config("triplet"), *toy, start=start)
    assert same(before, method.encoder.state_dict())
    method.step()
    assert same(before, start.state_dict())


def test_several_sketches_a_photo(tmp_path, tiny_config, toy):
    "Through training, validation and report."
    photos, sketches = toy
    mirrored = sketches.images().flip(3)
    several = ImageSet(
        torch.cat([sketches.images(), mirrored]),
        [0] * 32,
        ["a"],
        "sketch",
        instances=torch.cat([sketches.instances] * 2),
    )
    run = RunFolder(tmp_path / "run", {})
    method = FineGrained(tiny_config("triplet-intra"), photos, several)
    fit_fine(method, run, {"val": (photos, several)}, progress=False)
    line = run.metrics()[-1]
    assert line["val/any Acc@1"] >= line["val/Acc@1"]


def test_low_precision(make_method, teacher):
    values = make_method("full", teacher, precision="bf16-mixed").step()
    assert all(math.isfinite(value) for value in values.values())


def test_a_step_that_overflows_is_left_out_and_the_scale_is_kept(toy, tiny_config):
    "16-mixed as on a GPU."
    config = tiny_config("triplet", precision="16-mixed")

    def method(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
        return FineGrained(config, *toy, fabric=fabric)

    def scale(of):
        return of.fabric.strategy.precision.scaler.get_scale()

    far, near = method(2.0**60), method(16.0)
    before = {name: value.clone() for name, value in far.encoder.named_parameters()}
    far.step()
    near.step()
    assert same(before, dict(far.encoder.named_parameters())) and scale(far) == 2.0**59
    assert not same(before, dict(near.encoder.named_parameters()))
    again = method(16.0)
    again.load_state_dict(far.state_dict())
    assert scale(again) == 2.0**59


def test_a_bad_rate_is_an_error_not_a_result(make_method):
    method = make_method("triplet")
    with torch.no_grad():
        method.encoder.features.backbone.net.stages[0].norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        method.step()
