"The privacy statement of a run: what it inherits, and that any opening of the guard removes it."

import pytest
import torch
from crossx.helpers import CLASSES, CONFIGS, make_teacher
from torchvision.utils import save_image

from dfsbir.baselines import alternative_data, data_dependent
from dfsbir.core.checkpoint import read_card
from dfsbir.core.device import make_fabric
from dfsbir.core.privacy import PrivacyStatement, read_openings, read_privacy
from dfsbir.core.run_folder import RunFolder
from dfsbir.core.types import MODALITIES
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.pairs import ProceduralPairs
from dfsbir.crossx.processes import fit_in_processes
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_HELD_OUT
from dfsbir.inversion.buffer import ReplayBuffer
from dfsbir.search.indexing import index_photos
from dfsbir.students.encoder import load_encoders

SHORT = {"pairs.warmup_steps": 1, "schedule.new_pairs": 8, "schedule.distill_steps": 1}


def private(teacher, epsilon, delta=1e-5, **changes):
    "A teacher whose card has a guarantee."
    card = {"epsilon": epsilon, "delta": delta, "weights": teacher.digest()}
    teacher.card["privacy"] = card | changes
    return teacher


@pytest.fixture
def two():
    made = {m: make_teacher(m) for m in MODALITIES}
    for teacher, epsilon in zip(made.values(), (3.0, 1.0), strict=True):
        private(teacher, epsilon)
    return made


@pytest.fixture
def config():
    return CONFIGS["dfsbir"].changed(SHORT)


def fit(two, config, run=None, **parts):
    crossx = build_crossx(*two.values(), config, **parts)
    return crossx, crossx.fit(run, progress=False)


def test_a_run_inherits_the_larger_guarantee_or_the_sum(two, config):
    crossx, encoders = fit(two, config)
    assert crossx.privacy().guarantee.epsilon == 3
    for encoder in encoders.values():
        assert PrivacyStatement.from_card(encoder.card["privacy"]) == crossx.privacy()
    shared = config.changed({"privacy.disjoint": False})
    assert fit(two, shared)[0].privacy().guarantee.epsilon == 4


def test_saved_encoders_and_a_gallery_say_it(two, config, tmp_path):
    run = RunFolder(tmp_path / "run", {})
    fit(two, config, run)
    for m in MODALITIES:
        assert read_privacy(run.encoders / f"{m}.safetensors").guarantee.epsilon == 3
    encoder = load_encoders(run.encoders)[MODALITIES[0]]
    gallery = index_photos(tmp_path / "g", toy_pairs(4, 32)[0], encoder, progress=False)
    assert gallery.privacy.guarantee.epsilon == 3
    encoder.card.pop("privacy")
    other = index_photos(tmp_path / "h", toy_pairs(4, 32)[0], encoder, progress=False)
    assert other.privacy.guarantee is None


@pytest.mark.parametrize("what", ["none", "weights", "withheld"])
def test_a_teacher_without_a_guarantee(two, config, what):
    teacher = two[MODALITIES[1]]
    if what == "none":
        del teacher.card["privacy"]
    elif what == "weights":
        with torch.no_grad():
            next(teacher.net.parameters()).add_(1e-3)
    else:
        private(teacher, 1.0, withheld="its noise is known")
    assert "sketch" in str(fit(two, config)[0].privacy())
    assert fit(two, config)[0].privacy().guarantee is None


def guidance_folders(two, config, tmp_path):
    for m, images in zip(MODALITIES, toy_pairs(12, 32, seed=5, split="test"), strict=True):
        for i, image in enumerate(images.images()):
            folder = tmp_path / str(m) / "x"
            folder.mkdir(parents=True, exist_ok=True)
            save_image(image, folder / f"{i}.png")
    changes = {"pairs.guidance.kind": "folders", "pairs.loss.modality": 1.0}
    changes |= {
        "pairs.guidance.photos": str(tmp_path / "photo"),
        "pairs.guidance.sketches": str(tmp_path / "sketch"),
    }
    return build_crossx(*two.values(), config.changed(changes))


def real_images(two, config, tmp_path):
    return data_dependent(*two.values(), config, *toy_pairs(40, 32, classes=CLASSES))


def images_of_other_kinds(two, config, tmp_path):
    return alternative_data(*two.values(), config, *toy_pairs(40, 32, classes=TOY_HELD_OUT))


def pairs_of_ones_own(two, config, tmp_path):
    crossx = build_crossx(*two.values(), config)
    pairs = ProceduralPairs(config.sizes, crossx.fabric, 0)
    return build_crossx(*two.values(), config, pairs=pairs)


def filled_buffer(two, config, tmp_path):
    crossx = build_crossx(*two.values(), config)
    buffer = ReplayBuffer(64, 0, crossx.fabric.device)
    crossx.buffer = buffer
    crossx.fill_buffer()
    return build_crossx(*two.values(), config, buffer=buffer)


@pytest.mark.parametrize(
    "opening",
    [guidance_folders, real_images, images_of_other_kinds, pairs_of_ones_own, filled_buffer],
)
def test_any_opening_removes_the_statement(two, config, tmp_path, opening):
    crossx = opening(two, config, tmp_path)
    run = RunFolder(tmp_path / "run", {})
    encoders = crossx.fit(run, progress=False)
    assert crossx.privacy().guarantee is None
    assert read_openings(run.path)
    for m in MODALITIES:
        assert read_privacy(run.encoders / f"{m}.safetensors").guarantee is None
        assert encoders[m].card["privacy"]["reasons"]


@pytest.mark.parametrize("ceiling_first", [False, True])
def test_a_ceiling_in_the_same_folder_removes_it(two, config, tmp_path, ceiling_first):
    run = RunFolder(tmp_path / "run", {})
    inner = run.path / "ceiling"

    def train_ceiling():
        real_images(two, config, tmp_path).fit(RunFolder(inner, {}), progress=False)

    if ceiling_first:
        train_ceiling()
    fit(two, config, run)
    if not ceiling_first:
        assert read_privacy(run.encoders / "photo.safetensors").guarantee
        train_ceiling()
    for m in MODALITIES:
        statement = read_privacy(run.encoders / f"{m}.safetensors")
        assert statement.guarantee is None and "ceiling" in str(statement)
    assert "privacy" in read_card(inner / "encoders" / "photo.safetensors")


def test_other_runs_beside_it_keep_theirs(two, config, tmp_path):
    real_images(two, config, tmp_path).fit(RunFolder(tmp_path / "ceiling", {}), progress=False)
    run = RunFolder(tmp_path / "run", {})
    fit(two, config, run)
    assert read_privacy(run.encoders / "photo.safetensors").guarantee


def test_a_continued_run_remembers_its_opening(two, config, tmp_path):
    run = RunFolder(tmp_path / "run", {})
    filled_buffer(two, config, tmp_path).fit(run, progress=False)
    crossx, _ = fit(two, config, run)
    assert crossx.privacy().guarantee is None


def test_openings_in_other_processes_remove_it_too(two, config, tmp_path):
    config = guidance_folders(two, config, tmp_path).config.changed({"processes": 2})
    crossx = build_crossx(*two.values(), config, fabric=make_fabric("cpu"))
    run = RunFolder(tmp_path / "run", crossx.config.flat())
    encoders = fit_in_processes(crossx, run)
    assert crossx.privacy().guarantee is None
    assert encoders[MODALITIES[0]].card["privacy"]["reasons"]
    assert "could be opened" in str(crossx.privacy())


def test_disjoint_is_the_default_and_a_setting():
    assert CrossXConfig().privacy.disjoint
    assert not CrossXConfig.preset("dfsbir", {"privacy.disjoint": False}).privacy.disjoint
