"""The images of an experiment."""

import pytest
from PIL import Image, ImageDraw

from dfsbir.core.config import ConfigError
from dfsbir.finegrained.data import InstanceDataConfig, read_instance_data

SMALL = dict(toy_images=20, toy_test=12, toy_unlabelled=10)


def test_a_miniature():
    config = InstanceDataConfig(**SMALL, unseen="held-out", validation=0.2)
    data = read_instance_data(config, 28, unlabelled=True)
    assert config.label == "toy-instance"
    assert [len(s) for s in (*data.train, *data.val, *data.test)] == [16, 16, 4, 4, 12, 12]
    assert not set(data.unseen[0].classes) & set(data.train[0].classes)
    assert set(data.monitored) == {"test", "val"} and data.judgements is None
    assert "16 photos" in str(data) and "26 unlabelled" in str(data)


def test_the_teacher_sees_training_photos_and_its_own_alone():
    "Neither validation nor test photos are among the unlabelled ones."
    data = read_instance_data(InstanceDataConfig(**SMALL), 28, unlabelled=True)

    def bytes_of(images):
        return {image.numpy().tobytes() for image in images.pixels()}

    known = bytes_of(data.unlabelled)
    assert bytes_of(data.train[0]) <= known and len(known) == 10 + len(data.train[0])
    assert not known & (bytes_of(data.val[0]) | bytes_of(data.test[0]))


def test_without_validation_all_instances_are_learnt_from():
    data = read_instance_data(InstanceDataConfig(**SMALL, validation=0.0), 28)
    assert len(data.train[0]) == 20 and data.val is None and set(data.monitored) == {"test"}
    assert data.unlabelled is None


def test_pseudo_sketches_are_those_of_the_unlabelled_photos():
    pytest.importorskip("skimage")
    data = read_instance_data(InstanceDataConfig(**SMALL), 28, unlabelled=True, pseudo=True)
    assert len(data.pseudo) == len(data.unlabelled)
    assert data.pseudo.images().unique().tolist() == [0, 1]


def test_real_chairs_as_line_art(data_dir):
    config = InstanceDataConfig(
        dataset="qmul-v1",
        root=str(data_dir / "qmul_v1"),
        category="chairs",
        unseen="shoes",
        lines=True,
    )
    data = read_instance_data(config, 32)
    assert config.label == "qmul-chairs" and len(data.train[0]) == 180 and len(data.test[0]) == 97
    assert len(data.unseen[0]) == 115 and data.train[0].size == 32
    assert data.judgements[:, 0].unique().tolist() == list(range(97))
    assert len(data.unseen_judgements[:, 0].unique()) == 115


@pytest.fixture
def boots(tmp_path):
    "shoes3's layout: a wide photo and two drawings of it, large and in a corner, per split."
    for split in ("train", "test"):
        for n in range(4):
            photo = Image.new("RGB", (136, 102), "white")
            photo.paste((90, 30, 20), (0, 20, 130 - 20 * n, 90))
            (tmp_path / split / "photo").mkdir(parents=True, exist_ok=True)
            (tmp_path / split / "sketch").mkdir(parents=True, exist_ok=True)
            photo.save(tmp_path / split / "photo" / f"{n}.png")
            for k, corner in enumerate(((10, 60, 240, 190), (150, 20, 198, 47))):
                sketch = Image.new("L", (256, 256), 255)
                ImageDraw.Draw(sketch).rectangle(corner, outline=0, width=2)
                sketch.save(tmp_path / split / "sketch" / f"{n}-{k}.png")
    return tmp_path


def test_framed_images_show_everything_at_one_size(boots):
    config = InstanceDataConfig(
        dataset="shoes3", root=str(boots), unlabelled=str(boots / "test/photo"), framed=True
    )
    data = read_instance_data(config, 40, unlabelled=True)
    photos, sketches = data.test
    longer = [
        max((image.amin(0) < 0.8).any(k).sum().item() for k in (0, 1))
        for images in (photos.images(), sketches.images(), data.unlabelled.images())
        for image in images
    ]
    assert set(longer) <= {35, 36, 37}, "objects fill .9 of 40 px"
    shapes = sketches.images()
    assert (shapes[0] - shapes[1]).abs().mean() < 0.1, "the corner's drawing looks like the large"
    first = photos.images()[0].amin(0) < 0.8
    height = first.any(1).sum().item()
    assert abs(height - 36 * 70 / 130) <= 1, "nothing was cut off the wide photo"


def test_real_shoes3(data_dir):
    root = data_dir / "shoes3"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    data = read_instance_data(InstanceDataConfig(dataset="shoes3", root=str(root)), 32)
    assert len(data.train[0]) + len(data.val[0]) == 190
    assert len(data.train[1]) + len(data.val[1]) == 564
    assert not set(data.val[1].instances.tolist()) & set(data.train[1].instances.tolist())


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(dataset="toys"), "dataset"),
        (dict(dataset="qmul-v1"), "root"),
        (dict(root="somewhere"), "root"),
        (dict(unlabelled="nowhere"), "nowhere"),
        (dict(unseen="chairs"), "unseen"),
        (dict(category="chairs"), "category"),
        (dict(validation=1.0), "validation"),
        (dict(toy_imges=3), "toy_images"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        InstanceDataConfig(**settings)


def test_settings_of_another_data_set_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="toy_test"):
        InstanceDataConfig(dataset="qmul-v2", root=str(tmp_path), toy_test=5)
