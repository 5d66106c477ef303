"""Cold students: oracles of their loss, any network, one for both modalities, exact resuming."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision

from dfsbir.core.config import ConfigError
from dfsbir.core.types import MODALITIES, Modality, Normalizer, PairBatch
from dfsbir.inversion.buffer import ReplayBuffer
from dfsbir.students.cold import (
    ColdConfig,
    ColdDistiller,
    blend_images,
    cold_encoder,
    cosine_schedule,
    distillation_loss,
    feature_loss,
    share_net,
    teacher_encoder,
)
from dfsbir.students.encoder import load_encoders, save_encoders
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher

NAMES = ("cup", "fish", "star")
SPACE = MetricSpace.random(len(NAMES), 16)
SAME = align_classes(NAMES, NAMES)


def teacher(modality, classes=NAMES):
    torch.manual_seed(0 if modality == "photo" else 1)
    net = build_net("dfsbir", "tiny", len(classes))
    card = {"source": "dfsbir", "name": "tiny"}
    return Teacher(net, classes, Normalizer(16), modality, card=card)


@pytest.fixture
def teachers():
    return {m: teacher(m) for m in MODALITIES}


@pytest.fixture
def pairs():
    torch.manual_seed(2)
    return PairBatch(torch.rand(12, 3, 16, 16), torch.rand(12, 1, 16, 16), torch.arange(12) % 3)


def distiller(teachers, steps=6, class_map=SAME, fabric=None, **changes):
    torch.manual_seed(3)
    config = ColdConfig(**{"net": "dfsbir/tiny", "batch": 12, **changes})
    photo, sketch = (cold_encoder(teachers[m], class_map, SPACE, config.net) for m in MODALITIES)
    if config.shared:
        share_net(photo, sketch)
    if config.teach == "sketch":
        photo = teacher_encoder(teachers[Modality.PHOTO], class_map, SPACE)
    if config.teach == "photo":
        sketch = teacher_encoder(teachers[Modality.SKETCH], class_map, SPACE)
    return ColdDistiller(photo, sketch, teachers, class_map, config, steps, fabric)


@pytest.mark.parametrize("T", [1.0, 3.0, 20.0])
def test_distillation_loss_by_a_loop(T):
    torch.manual_seed(0)
    s, t = torch.randn(6, 4), torch.randn(6, 4)
    total = 0.0
    for a, b in zip(s, t):
        p, q = (b / T).softmax(0), (a / T).softmax(0)
        total += sum(x * (x / y).log() for x, y in zip(p, q)).item()
    assert distillation_loss(s, t, T).item() == pytest.approx(T * T * total / 6, rel=1e-4)
    assert distillation_loss(t, t, T).item() == pytest.approx(0, abs=1e-5)


def test_at_high_temperature_it_compares_centred_logits():
    torch.manual_seed(0)
    s, t = torch.randn(6, 4), torch.randn(6, 4)
    centred = [x - x.mean(1, keepdim=True) for x in (s, t)]
    limit = F.mse_loss(*centred, reduction="sum") / (2 * 4 * 6)  # Hinton et al. 2015, eq. 4
    assert distillation_loss(s, t, 50.0).item() == pytest.approx(limit.item(), rel=0.05)


def test_feature_loss_by_a_loop_whatever_the_teachers_scale():
    torch.manual_seed(0)
    teacher, student = torch.randn(8, 5) * 3 + 2, torch.randn(8, 5) + 7
    columns = [(teacher[:, k].tolist(), student[:, k].tolist()) for k in range(5)]
    centred = [([v - sum(t) / 8 for v in t], [v - sum(s) / 8 for v in s]) for t, s in columns]
    scale = (sum(v**2 for t, _ in centred for v in t) / 40) ** 0.5
    total = sum((b - a / scale) ** 2 for t, s in centred for a, b in zip(t, s))
    assert feature_loss(student, teacher).item() == pytest.approx(total / 40, rel=1e-5)
    assert feature_loss(student, 100 * teacher).item() == pytest.approx(total / 40, rel=1e-5)
    assert feature_loss(teacher / scale + 5, teacher).item() == pytest.approx(0, abs=1e-10)
    assert feature_loss(torch.ones(8, 5), teacher).item() == pytest.approx(1, rel=1e-5)
    assert feature_loss(student, torch.ones(8, 5)).isfinite()


@pytest.mark.parametrize("net", ["dfsbir/tiny", "dfsbir/plain", "torchvision/mobilenet_v3_small"])
@pytest.mark.parametrize("shared", [False, True])
def test_students_of_any_width_follow_the_teachers_features(teachers, pairs, net, shared):
    d = distiller(teachers, 30, net=net, shared=shared, lr=0.02, ema_decay=0.0)
    seen = []
    for _ in range(30):
        d.step(pairs)
        seen.append(d.terms.log()["photo/feature"])
    assert sum(seen[-5:]) < sum(seen[:5])
    names = d.encoders()[Modality.PHOTO].state_dict()
    assert not any("maps" in name for name in names)


def test_without_the_feature_term_there_are_no_maps(teachers, pairs):
    d = distiller(teachers, feature=0.0)
    d.step(pairs)
    assert not d.students.maps
    assert "photo/feature" not in d.terms.log()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_blends_leave_the_rest_of_the_batch_alone(share):
    torch.manual_seed(0)
    x = torch.rand(12, 1, 8, 8)
    out = blend_images(x, share)
    untouched = 12 - 2 * int(12 * share / 2)
    assert torch.equal(out[12 - untouched :], x[12 - untouched :])
    assert out.min() >= 0 and out.max() <= 1


def test_schedule_rises_then_falls_to_zero():
    values = [cosine_schedule(p / 100, 0.1) for p in range(101)]
    assert values[0] == 0 and max(values) == pytest.approx(1) and values[-1] == pytest.approx(0)
    assert values.index(max(values)) == 10


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("shared", [False, True])
def test_students_learn_what_the_teachers_say(teachers, pairs, optimizer, shared):
    lr = 0.1 if optimizer == "sgd" else 5e-3
    d = distiller(teachers, 60, optimizer=optimizer, lr=lr, shared=shared, distill_temperature=1.0)
    losses = []
    for _ in range(60):
        d.step(pairs)
        losses.append(d.terms.log()["total"])
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert (d.averaged.photo.net is d.averaged.sketch.net) == shared


def test_gradients_are_clipped_before_the_loss_scale_counts(teachers, pairs):
    "With a scale of 2**14 a step is as long as without; clipped by it, it would be far shorter."

    def moved(fabric):
        taught = distiller(teachers, fabric=fabric, lr=0.01, warmup_share=0.0)
        before = [p.detach().clone() for p in taught.students.parameters()]
        torch.manual_seed(5)
        taught.step(pairs)
        change = zip(taught.students.parameters(), before)
        return torch.cat([(now - then).detach().flatten() for now, then in change]).norm()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    half = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert moved(half).item() == pytest.approx(moved(None).item(), rel=0.1)


def test_batch_norms_keep_statistics_of_their_own(teachers, pairs):
    d = distiller(teachers)
    before = copy.deepcopy(d.averaged.photo.net.stem[1].running_mean)
    d.step(pairs)
    assert not torch.equal(before, d.averaged.photo.net.stem[1].running_mean)


def test_the_teacher_sees_the_same_view(teachers, pairs):
    seen = {}
    for same in (True, False):
        d = distiller(teachers, same_view=same)
        torch.manual_seed(5)
        views, targets, _ = d._views(pairs)
        m = Modality.PHOTO
        shown = views[m] if same else pairs.photo
        want = teachers[m](shown, bn=False).logits
        torch.testing.assert_close(targets[m], want)
        seen[same] = targets[m]
    assert not torch.allclose(seen[True], seen[False])


def test_many_classes_of_a_teacher_become_one_output(pairs):
    classes = ("beagle", "pug", "fish", "star", "moon")
    aliases = {"beagle": "dog", "pug": "dog"}
    teachers = {
        Modality.PHOTO: teacher("photo", classes),
        Modality.SKETCH: teacher("sketch", ("dog", "fish", "star")),
    }
    class_map = align_classes(classes, ("dog", "fish", "star"), aliases)
    d = distiller(teachers, class_map=class_map)
    d.step(pairs)
    assert d.averaged.photo.net.fc.out_features == 3
    _, targets, _ = d._views(pairs)
    assert targets[Modality.PHOTO].shape == (12, 3)


def test_resumes_exactly(teachers, pairs):
    whole, first, second = (distiller(teachers) for _ in range(3))
    for step in range(6):
        torch.manual_seed(step)
        whole.step(pairs)
    for step in range(3):
        torch.manual_seed(step)
        first.step(pairs)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(3, 6):
        torch.manual_seed(step)
        second.step(pairs)
    for a, b in zip(
        whole.averaged.state_dict().values(), second.averaged.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shared", [False, True])
def test_encoders_are_saved_and_loaded(teachers, pairs, tmp_path, shared):
    d = distiller(teachers, shared=shared)
    d.step(pairs)
    made = d.encoders()
    save_encoders(tmp_path, made)
    loaded = load_encoders(tmp_path)
    for m in MODALITIES:
        torch.testing.assert_close(loaded[m](pairs.of(m)), made[m](pairs.of(m)))


def filled(pairs):
    buffer = ReplayBuffer(None)
    buffer.add(pairs)
    return buffer


@pytest.mark.parametrize("teach", ["both", "sketch"])
def test_views_are_kept_with_what_the_teachers_say_of_them(teachers, pairs, teach):
    d = distiller(teachers, kept_views=20, batch=8, teach=teach)
    d.keep_views(filled(pairs))
    views, logits, features, label = d.kept.take(torch.arange(20))
    assert set(views) == set(d.config.taught) and len(d.kept) == len(label) == 20
    for m, x in views.items():
        said = teachers[m](x, bn=False)
        torch.testing.assert_close(logits[m], said.logits, atol=0.02, rtol=0.02)  # bytes
        torch.testing.assert_close(features[m].float(), said.features, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("augment", ["both", "photo", "sketch", "none"])
def test_views_of_what_is_not_augmented_are_the_pictures(teachers, pairs, augment):
    d = distiller(teachers, augment=augment, blend=0.0)
    views, _, _ = d._views(pairs)
    for m in MODALITIES:
        assert torch.equal(views[m], pairs.of(m)) == (augment not in ("both", m))


def test_kept_views_have_the_students_side(teachers, pairs):
    torch.manual_seed(3)
    sides = {Modality.PHOTO: 12, Modality.SKETCH: 24}
    encoders = [cold_encoder(teachers[m], SAME, SPACE, "dfsbir/tiny", size=sides[m]) for m in sides]
    config = ColdConfig(kept_views=6, batch=4)
    d = ColdDistiller(*encoders, teachers, SAME, config, 2)
    d.keep_views(filled(pairs))
    assert [d.kept.images[m].shape[-1] for m in MODALITIES] == [12, 16]  # never enlarged


def test_teachers_are_asked_once_about_kept_views(teachers, pairs):
    d, buffer = distiller(teachers, kept_views=12), filled(pairs)
    d.keep_views(buffer)
    asked, d.teachers = d.teachers, {}
    losses = []
    for _ in range(6):
        d.keep_views(buffer)
        d.step_on_kept()
        losses.append(d.terms.log()["total"])
    assert losses[-1] < losses[0]
    buffer.add(pairs)
    with pytest.raises(KeyError):
        d.keep_views(buffer)  # new pairs: the teachers are wanted again
    d.teachers = asked
    d.keep_views(buffer)


def test_kept_views_are_the_seeds_and_touch_no_random_numbers(teachers, pairs):
    made = [distiller(teachers, kept_views=12) for _ in range(2)]
    states = []
    for seed, d in enumerate(made):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        buffer = filled(pairs)
        d.keep_views(buffer)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(buffer.random.get_state(), filled(pairs).random.get_state())
        states.append(d.kept.images[Modality.PHOTO])
    assert torch.equal(*states)


def test_no_more_views_are_kept_than_the_steps_draw(teachers, pairs):
    d = distiller(teachers, steps=3, kept_views=1000, batch=8)
    d.keep_views(filled(pairs))
    assert len(d.kept) == 24


def test_every_pair_has_a_view_before_any_has_two(teachers, pairs):
    d = distiller(teachers, kept_views=2 * len(pairs) + 3, batch=8, augment="none", blend=0.0)
    d.keep_views(filled(pairs))
    bytes_of_pairs = (pairs.photo * 255).round().byte()
    shown = (d.kept.images[Modality.PHOTO][:, None] == bytes_of_pairs).flatten(2).all(2).sum(0)
    assert sorted(shown.tolist()) == [2] * (len(pairs) - 3) + [3] * 3


def test_without_kept_views_there_is_nothing_to_step_on(teachers):
    with pytest.raises(ValueError, match="call keep_views with the buffer"):
        distiller(teachers).step_on_kept()


@pytest.mark.parametrize("taught", MODALITIES)
@pytest.mark.parametrize("proxy_anchor", [0.0, 0.5])
def test_one_student_alone_learns(teachers, pairs, taught, proxy_anchor, tmp_path):
    "The other encoder stays its teacher to the bit, and survives being saved."
    d = distiller(teachers, 3, teach=str(taught), proxy_anchor=proxy_anchor)
    before = d.encoders()
    for _ in range(3):
        d.step(pairs)
    after = d.encoders()
    for m in MODALITIES:
        same = torch.equal(before[m](pairs.of(m)), after[m](pairs.of(m)))
        assert same == (m is not taught)
    save_encoders(tmp_path, after)
    kept = next(m for m in MODALITIES if m is not taught)
    found = load_encoders(tmp_path)[kept].predict_log_probs(pairs.of(kept))[1].exp()
    want = SAME.posteriors(teachers[kept](pairs.of(kept)).logits, kept, 0.7)
    torch.testing.assert_close(found, want)


def test_the_kept_teacher_is_not_asked_about_views(teachers, pairs):
    d = distiller(teachers, teach="sketch")
    teachers[Modality.PHOTO] = None
    d.step(pairs)
    assert set(d.terms.log()) == {"sketch/distillation", "sketch/feature", "total"}


def test_one_student_alone_resumes_exactly(teachers, pairs):
    first, second = (distiller(teachers, teach="sketch") for _ in range(2))
    first.step(pairs)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for d in (first, second):
        torch.manual_seed(7)
        d.step(pairs)
    states = [d.averaged.state_dict().values() for d in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_program_cannot_be_kept_as_an_encoder(teachers):
    teachers[Modality.PHOTO].card.pop("source")
    with pytest.raises(ValueError, match="photo teacher's net cannot be copied.*teach to both"):
        teacher_encoder(teachers[Modality.PHOTO], SAME, SPACE)


def test_one_shared_net_learns_for_both():
    with pytest.raises(ConfigError, match="one shared net learns from both teachers"):
        ColdConfig(shared=True, teach="photo")


@pytest.mark.parametrize("setting", [{"sketch_net": "dfsbir/grey"}, {"sketch_input_size": 20}])
def test_a_kept_sketch_teacher_has_no_settings(setting):
    with pytest.raises(ConfigError, match="the sketch teacher stays as it is"):
        ColdConfig(teach="photo", **setting)


def test_views_are_kept_of_something(teachers, pairs):
    with pytest.raises(ValueError, match="students.kept_views above 0"):
        distiller(teachers).keep_views(filled(pairs))
    with pytest.raises(ValueError, match="the buffer is empty"):
        distiller(teachers, kept_views=4).keep_views(ReplayBuffer(None))


def test_features_that_nobody_follows_are_not_kept(teachers, pairs):
    d = distiller(teachers, kept_views=12, feature=0.0)
    d.keep_views(filled(pairs))
    assert d.kept.features == {}
    d.step_on_kept()


def test_another_architecture_and_input_size(teachers):
    encoder = cold_encoder(
        teachers[Modality.SKETCH], SAME, SPACE, "torchvision/mobilenet_v3_small", size=32
    )
    assert encoder.eval()(torch.rand(2, 1, 16, 16)).shape == (2, 16)
    assert encoder.normalizer.size == 32


@pytest.mark.parametrize("shared", [False, True])
def test_the_pen_of_the_drawings_is_kept(teachers, shared):
    teachers[Modality.SKETCH].normalizer.pen = 0.05
    made = [cold_encoder(teachers[m], SAME, SPACE, "dfsbir/tiny", size=20) for m in MODALITIES]
    sketch = share_net(*made) if shared else made[1]
    assert sketch.normalizer.pen == sketch.card["input"]["pen"] == 0.05
    assert made[0].normalizer.pen is None
    assert sketch.normalizer.size == 20


def test_a_net_that_cannot_be_named_is_refused():
    nameless = Teacher(build_net("dfsbir", "tiny", 3), NAMES, Normalizer(16), "photo")
    with pytest.raises(ValueError, match="by name"):
        cold_encoder(nameless, SAME, SPACE)


@pytest.mark.parametrize("teach", ["both", "sketch", "photo"])
def test_objects_take_the_place_of_the_last_views(teachers, pairs, teach):
    d = distiller(teachers, teach=teach, augment="none", blend=0.0, objects=0.25)
    views, targets, features = d._views(pairs)
    for m in d.config.taught:
        assert torch.equal(views[m][:9], pairs.of(m)[:9])
        assert not (views[m][9:] == pairs.of(m)[9:]).flatten(1).all(1).any()
        assert views[m].min() >= 0 and views[m].max() <= 1
        out = teachers[m](views[m], bn=False)
        torch.testing.assert_close(targets[m], SAME.shared_logits(out.logits, m))
        torch.testing.assert_close(features[m], out.features)
    d.step(pairs)


def test_without_objects_no_random_number_is_drawn_for_them(teachers, pairs):
    d = distiller(teachers, augment="none", blend=0.0)
    before = torch.get_rng_state()
    d._views(pairs)
    assert torch.equal(before, torch.get_rng_state())


def test_objects_are_drawn_with_the_sketch_teachers_pen(teachers, pairs):
    def ink(pen):
        teachers[Modality.SKETCH].normalizer.pen = pen
        d = distiller(teachers, augment="none", blend=0.0, objects=0.75)
        torch.manual_seed(4)
        return 1 - d._views(pairs)[0][Modality.SKETCH][3:].mean().item()

    assert ink(0.1) > 1.5 * ink(0.03)


def test_every_process_draws_objects_of_its_own(teachers, pairs, monkeypatch):
    d, seen = distiller(teachers, augment="none", blend=0.0, objects=0.25), []
    for rank in (0, 1, 0):
        monkeypatch.setattr(Fabric, "global_rank", rank)
        torch.manual_seed(4)
        seen.append(d._views(pairs)[0])
    for m in MODALITIES:
        first, other, again = (views[m] for views in seen)
        assert torch.equal(first, again)
        assert torch.equal(first[:9], other[:9]) and not torch.equal(first[9:], other[9:])


def test_kept_views_have_objects_too_and_are_the_seeds(teachers, pairs):
    changes = {"kept_views": 12, "augment": "none", "blend": 0.0}
    first, again, plain = (distiller(teachers, objects=o, **changes) for o in (0.5, 0.5, 0.0))
    for d in (first, again, plain):
        d.keep_views(filled(pairs))
        d.step_on_kept()
    shown = {x.tobytes() for x in (255 * pairs.photo).round().byte().numpy()}
    of_pairs = [x.tobytes() in shown for x in first.kept.images[Modality.PHOTO].numpy()]
    assert of_pairs == 6 * [True] + 6 * [False]
    for m in MODALITIES:
        assert torch.equal(first.kept.images[m], again.kept.images[m])
        assert torch.equal(first.kept.logits[m], again.kept.logits[m])
        assert torch.equal(first.kept.images[m][:6], plain.kept.images[m][:6])


def test_objects_have_no_class_for_proxies():
    with pytest.raises(ConfigError, match="belong to no class"):
        ColdConfig(objects=0.5, proxy_anchor=0.1)
    with pytest.raises(ConfigError, match="objects"):
        ColdConfig(objects=1.0)
