"Guides of all three sources: accuracy, gradients, determinism, gates, faults."

import pytest
import torch
from torchvision.utils import save_image

from dfsbir.core.data_guard import DataFreeViolation, data_free
from dfsbir.core.types import MODALITIES, Modality, Normalizer
from dfsbir.data.image_files import BrokenImage
from dfsbir.data.procedural import procedural_objects
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.inversion.guidance import Guide, guide_accuracy, make_guide, procedural_drawings
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher

SIDE, CLASSES = 32, list(TOY_CLASSES[:4])


@pytest.fixture(scope="module")
def photos_and_sketches():
    return [d.images() for d in toy_pairs(60, size=SIDE, seed=3, split="test")]


@pytest.fixture(scope="module")
def guides(teachers, folders):
    "One of each source, made inside the gate that they pass."
    with data_free(folders):
        return {source: make_guide(source, teachers, 0, folders) for source in Guide.SOURCES}


@pytest.mark.parametrize("source", Guide.SOURCES)
def test_guides_are_right_and_say_where_they_come_from(source, guides, photos_and_sketches):
    guide = guides[source]
    photos, sketches = photos_and_sketches
    with torch.no_grad():
        auc = (guide(sketches)[:, None] > guide(photos)).float().mean().item()
    assert auc > 0.95 and guide_accuracy(guide, photos, sketches) > 0.8
    assert guide.source == source and guide.description and source in guide._repr_markdown_()


@pytest.mark.parametrize("shape", [(3, 3, 40, 40), (3, 1, 28, 28)])
@pytest.mark.parametrize("source", Guide.SOURCES)
def test_guides_are_frozen_and_differentiable(source, guides, shape):
    guide, x = guides[source], torch.rand(shape, requires_grad=True)
    assert not any(p.requires_grad for p in guide.parameters())
    logits = guide(x)
    assert logits.shape == (3,) and logits.isfinite().all()
    logits.sum().backward()
    assert x.grad.isfinite().all() and all(g.abs().sum() > 0 for g in x.grad)


@pytest.mark.parametrize("source", Guide.SOURCES)
def test_guides_judge_each_image_alone(source, guides, photos_and_sketches):
    guide, x = guides[source], photos_and_sketches[0][:4]
    assert torch.allclose(guide(x), torch.cat([guide(v[None]) for v in x]), atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("source", Guide.SOURCES)
def test_flat_images_have_finite_logits_and_gradients(source, guides, value):
    flat = torch.full((2, 1, SIDE, SIDE), value, requires_grad=True)
    logits = guides[source](flat)
    logits.sum().backward()
    assert logits.isfinite().all() and flat.grad.isfinite().all()


@pytest.mark.parametrize("source", Guide.SOURCES)
def test_guides_are_deterministic_and_leave_random_numbers_alone(source, guides, teachers, folders):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    x = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(make_guide(source, teachers, 0, folders)(x), guides[source](x))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_is_another_guide(guides, folders):
    x = torch.rand(4, 3, SIDE, SIDE)
    assert not torch.equal(make_guide("folders", seed=1, folders=folders)(x), guides["folders"](x))


@pytest.mark.parametrize("source", ["procedural", "folders"])
def test_trained_guides_do_not_see_colour(source, guides):
    x = torch.rand(4, 3, SIDE, SIDE)
    grey = (x * torch.tensor(Normalizer.LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    assert torch.allclose(guides[source](x), guides[source](grey), atol=1e-4)


def test_the_teachers_stop_after_their_first_batch_norm(teachers):
    def hooks():
        return [len(m._forward_hooks) for t in teachers.values() for m in t.net.modules()]

    guide, beyond = make_guide("teachers", teachers), []
    heads = [t.net.fc for t in teachers.values()]
    handles = [head.register_forward_hook(lambda *_: beyond.append(1)) for head in heads]
    before = hooks()
    guide(torch.rand(2, 3, SIDE, SIDE))
    after = hooks()
    for handle in handles:
        handle.remove()
    assert not beyond and before == after


def test_the_logit_is_the_ratio_of_distances(teachers):
    guide = make_guide("teachers", teachers)
    x = torch.rand(5, 1, SIDE, SIDE)
    photo, sketch = (guide.distance(x, m) for m in MODALITIES)
    assert (photo >= 0).all() and (sketch >= 0).all() and sketch.shape == (5,)
    assert torch.allclose(guide(x), (photo + 1e-3).log() - (sketch + 1e-3).log())


@pytest.mark.parametrize("size", [16, 32, 48])
def test_procedural_drawings_are_canonical(size):
    x = procedural_drawings(6, size)
    assert x.shape == (6, 1, size, size) and x.isfinite().all() and not x.requires_grad
    assert x.min() >= 0 and x.max() <= 1
    assert (procedural_drawings(30, size).amin((1, 2, 3)) < 0.8).all()  # no empty paper


def test_procedural_objects_look_like_photos_and_drawings():
    made = procedural_objects(100)
    assert guide_accuracy(make_guide("procedural"), made.photo, made.sketch) > 0.9


def test_guidance_without_images_passes_the_closed_gate(teachers):
    with data_free():
        assert make_guide("teachers", teachers).source == "teachers"


def test_folders_pass_the_gate_only_where_allowed(folders, guides):
    with data_free(), pytest.raises(DataFreeViolation):
        make_guide("folders", folders=folders)
    with data_free(folders[:1]), pytest.raises(DataFreeViolation):
        make_guide("folders", folders=folders)
    description = guides["folders"].description
    assert all(str(f) in description for f in folders)
    assert "20 photo images" in description and "10 held out" in description


def test_wrong_sources_and_teachers_are_named(teachers, no_norm_teacher):
    with pytest.raises(ValueError, match="'none'"):
        make_guide("none")
    with pytest.raises(ValueError, match="photo"):
        make_guide("teachers", {Modality.PHOTO: teachers[Modality.PHOTO]})
    plain = {**teachers, Modality.SKETCH: no_norm_teacher("sketch")}
    with pytest.raises(ValueError, match="sketch teacher.*'procedural'.*'folders'"):
        make_guide("teachers", plain)


def test_wrong_folders_are_named(folders, tmp_path):
    for wrong in ((), ("", ""), (folders[0],), (folders[0], "")):
        with pytest.raises(ValueError, match="two"):
            make_guide("folders", folders=wrong)
    with pytest.raises(FileNotFoundError, match="sketch"):
        make_guide("folders", folders=(folders[0], tmp_path / "absent"))
    for i in range(9):
        save_image(torch.rand(1, 8, 8), tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="9 sketch images.*10"):
        make_guide("folders", folders=(folders[0], tmp_path))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(BrokenImage, match="broken.png"):
        make_guide("folders", folders=(folders[0], tmp_path))


def test_a_very_large_folder_is_sampled_evenly(tmp_path):
    from dfsbir.inversion.guidance import _read_folder

    for i in range(12):
        save_image(torch.full((1, 4, 4), i / 12), tmp_path / f"{i:02}.png")
    images = _read_folder(tmp_path, "sketch", 4, most=6)
    assert images[:, 0, 0, 0].mul(12).round().tolist() == [0, 2, 4, 6, 8, 10]


def test_a_torchvision_teacher_can_guide():
    teachers = {}
    for m in MODALITIES:
        net = build_net("torchvision", "resnet18", 4)
        teachers[m] = Teacher(net, CLASSES, input_of("torchvision", SIDE, name="resnet18"), m)
    guide = make_guide("teachers", teachers)
    assert guide(torch.rand(2, 3, SIDE, SIDE)).isfinite().all()
