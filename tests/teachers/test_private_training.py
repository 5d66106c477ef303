"Private training: the accountant against own computations, the gradient, and what a card says."

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import nn

from dfsbir.core.privacy import Guarantee, guarantee_of
from dfsbir.data.toy import toy_pairs
from dfsbir.teachers.loading import load_teacher
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.private_training import (
    NoisePlan,
    PrivateRecipe,
    clipped_sum,
    require_separate_images,
    train_private_teacher,
)
from dfsbir.teachers.training import train_teacher

IMAGES = 1000
CASES = [(1.0, 100, 20), (2.0, 20, 4), (0.8, 250, 10)]  # noise, batch size, epochs
DELTA = 1e-5


def plan(noise, batch, epochs, accountant):
    recipe = PrivateRecipe(
        epsilon=None,
        noise_multiplier=noise,
        batch_size=batch,
        epochs=epochs,
        delta=DELTA,
        accountant=accountant,
    )
    return NoisePlan.of(recipe, IMAGES)


def loss_distribution(noise, rate, remove, step=5e-4, points=2**17):
    """Probabilities of the privacy loss of one step on a grid, rounded to the nearest point.

    With P = (1-q) N(0,s^2) + q N(1,s^2) and Q = N(0,s^2) the loss is log P/Q under P where an
    image is removed, and log Q/P under Q where one is added. Both are monotonic in x.
    """
    grid = step * np.arange(-points // 2, points // 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        edge = grid + step / 2
        value = np.exp(edge if remove else -edge) - (1 - rate)
        x = noise**2 * np.log(value / rate) + 0.5  # where log P/Q reaches the value
    x = np.where(value <= 0, -np.inf, x)
    below_q = ndtr(x / noise)
    below_p = (1 - rate) * below_q + rate * ndtr((x - 1) / noise)
    below = below_p if remove else 1 - below_q
    masses = np.diff(np.concatenate([[0.0], below]))
    return grid, masses


def epsilon_by_convolution(noise, rate, steps, delta):
    "The smallest epsilon whose hockey-stick divergence is delta, by a power of the FFT."
    worst = 0.0
    for remove in (True, False):
        grid, masses = loss_distribution(noise, rate, remove)
        zero = np.argmin(np.abs(grid))
        shifted = np.roll(masses, -zero)  # a loss of 0 comes first, negative ones wrap around
        composed = np.fft.irfft(np.fft.rfft(shifted) ** steps, len(shifted))
        composed = np.roll(composed.clip(min=0), zero)

        def delta_at(epsilon, grid=grid, composed=composed):
            above = grid > epsilon
            return (composed[above] * -np.expm1(epsilon - grid[above])).sum()

        low, high = 0.0, grid[-1]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
        worst = max(worst, high)
    return worst


def epsilon_by_renyi(noise, rate, steps, delta):
    "By direct integration of the Renyi divergence, and the conversion of Balle et al. (2020)."
    x = np.linspace(-30 * noise, 30 * noise + 60, 40_001)
    log_q = -(x**2) / (2 * noise**2) - np.log(noise * np.sqrt(2 * np.pi))
    ratio = np.logaddexp(np.log1p(-rate), np.log(rate) + (2 * x - 1) / (2 * noise**2))
    orders = [1 + i / 10 for i in range(1, 100)] + list(range(12, 64))
    found = []
    for order in orders:
        powers = log_q + order * ratio
        top = powers.max()
        integral = top + np.log(np.trapezoid(np.exp(powers - top), x))
        renyi = steps * integral / (order - 1)
        found.append(
            renyi - (np.log(delta) + np.log(order)) / (order - 1) + np.log((order - 1) / order)
        )
    return min(found)


def epsilon_of_gaussian(noise, delta):
    "Of one step on all images, in closed form (Balle and Wang 2018, theorem 8)."
    low, high = 0.0, 100.0
    for _ in range(80):
        e = (low + high) / 2
        a, b = 1 / (2 * noise) - e * noise, -1 / (2 * noise) - e * noise
        low, high = (e, high) if ndtr(a) - np.exp(e) * ndtr(b) > delta else (low, e)
    return high


@pytest.mark.parametrize("noise, batch, epochs", CASES)
def test_prv_accountant_equals_a_convolution_of_our_own(noise, batch, epochs):
    found = plan(noise, batch, epochs, "prv")
    own = epsilon_by_convolution(noise, found.sampling_rate, found.steps, DELTA)
    assert found.guarantee.epsilon == pytest.approx(own, rel=0.01)


@pytest.mark.parametrize("noise, batch, epochs", CASES)
def test_rdp_accountant_equals_an_integration_of_our_own(noise, batch, epochs):
    found = plan(noise, batch, epochs, "rdp")
    own = epsilon_by_renyi(noise, found.sampling_rate, found.steps, DELTA)
    assert found.guarantee.epsilon == pytest.approx(own, rel=0.01)
    assert found.guarantee.epsilon > plan(noise, batch, epochs, "prv").guarantee.epsilon


def test_one_step_on_all_images_is_the_gaussian_mechanism():
    exact = epsilon_of_gaussian(2.0, DELTA)
    assert plan(2.0, IMAGES, 1, "prv").guarantee.epsilon == pytest.approx(exact, rel=0.01)
    own = epsilon_by_convolution(2.0, 1 - 1e-12, 1, DELTA)
    assert own == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_the_noise_is_the_least_that_keeps_epsilon(epsilon):
    found = NoisePlan.of(PrivateRecipe(epsilon=epsilon, batch_size=100, epochs=5), IMAGES)
    assert 0.97 * epsilon < found.guarantee.epsilon <= epsilon


def test_more_noise_fewer_steps_and_smaller_batches_are_more_private():
    epsilon = {case: plan(*case, "rdp").guarantee.epsilon for case in [(1, 100, 10), (2, 100, 10)]}
    assert epsilon[2, 100, 10] < epsilon[1, 100, 10]
    assert plan(1, 100, 5, "rdp").guarantee.epsilon < epsilon[1, 100, 10]
    assert plan(1, 20, 10, "rdp").guarantee.epsilon < epsilon[1, 100, 10]


def test_one_image_moves_the_sum_by_the_clip_at_most():
    generator = torch.Generator().manual_seed(0)
    gradients = [100 * torch.randn(6, 4, generator=generator)]
    everyone = clipped_sum(gradients, views=2, clip=0.7)[0]
    without = clipped_sum([gradients[0][2:]], views=2, clip=0.7)[0]
    assert (everyone - without).norm() == pytest.approx(0.7, rel=1e-5)


def test_gradients_below_the_clip_are_summed_as_they_are():
    gradients = [torch.full((4, 2), 0.01)]
    torch.testing.assert_close(clipped_sum(gradients, 1, 1.0)[0], torch.full((2,), 0.04))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_counts_as_zero(bad):
    gradients = [torch.tensor([[bad, 1.0], [0.3, 0.4]])]
    torch.testing.assert_close(clipped_sum(gradients, 1, 1.0)[0], torch.tensor([0.3, 0.4]))


class _Centred(nn.Module):
    "Subtracts the mean of the batch, without a batch norm."

    def __init__(self):
        super().__init__()
        self.net = build_net("dfsbir", "tiny-gn", 3)

    def forward(self, x):
        return self.net(x - x.mean(0, keepdim=True))


@pytest.mark.parametrize("net", ["small", "tiny", "plain"])
def test_nets_that_mix_images_are_refused(net):
    with pytest.raises(ValueError, match="BatchNorm2d.*small-gn"):
        require_separate_images(build_net("dfsbir", net, 3), 3, 32)


def test_a_net_that_mixes_images_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match="mix"):
        require_separate_images(_Centred(), 3, 32)


@pytest.mark.parametrize("source, name", [("dfsbir", "grey-gn"), ("timm", "test_vit")])
def test_nets_of_single_images_pass(source, name):
    channels = 1 if name == "grey-gn" else 3
    require_separate_images(build_net(source, name, 3), channels, 160 if source == "timm" else 32)


@pytest.fixture(scope="module")
def images():
    return toy_pairs(40, 32, seed=0)[1]


SHORT = PrivateRecipe(
    epsilon=None, noise_multiplier=1.0, epochs=1, batch_size=10, multiplicity=2, accountant="rdp"
)


def short_teacher(images, **changes):
    return train_private_teacher(images, SHORT, "tiny-gn", progress=False, **changes)


def test_the_card_says_what_is_guaranteed(images, tmp_path):
    teacher = short_teacher(images, out=tmp_path / "t.safetensors")
    privacy = teacher.card["privacy"]
    assert privacy["sampling_rate"] == 0.25 and privacy["steps"] == 4
    assert privacy["multiplicity"] == 2 and privacy["public"] == "nothing"
    again = load_teacher(tmp_path / "t.safetensors")
    guarantee, _ = guarantee_of(again.card, again.digest())
    assert guarantee == Guarantee(privacy["epsilon"], 1e-5)


def test_a_card_holds_nothing_that_was_read_from_the_images(images):
    card = short_teacher(images).card
    assert not {"manifest", "images", "history", "loss"} & set(card) and card["accuracy"] == {}
    assert images.digest() not in str(card)


def test_a_known_seed_repeats_the_training_and_withholds_the_guarantee(images):
    first, second, other = (short_teacher(images, noise_seed=s) for s in (1, 1, 2))
    assert first.digest() == second.digest() != other.digest()
    assert guarantee_of(first.card, first.digest())[0] is None


def test_the_noise_of_two_trainings_differs(images):
    assert short_teacher(images).digest() != short_teacher(images).digest()


def test_a_start_is_named_and_public(images):
    teacher = short_teacher(images)
    with pytest.raises(ValueError, match="public"):
        short_teacher(images, init=teacher.net)
    with pytest.raises(ValueError, match="public"):
        short_teacher(images, public="ImageNet-1k")
    with pytest.raises(ValueError, match="public weights"):
        short_teacher(images, init=teacher, public="my own private teacher")
    named = short_teacher(images, init=build_net("dfsbir", "tiny-gn", 10), public="random")
    assert named.card["privacy"]["public"] == "random"


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": None},
        {"noise_multiplier": 1.0},
        {"accountant": "guess"},
        {"delta": 0.0},
        {"clip": -1.0},
    ],
)
def test_recipes_that_make_no_sense(changes):
    with pytest.raises(ValueError, match="found"):
        PrivateRecipe(**changes)


def test_a_delta_that_would_allow_to_publish_an_image(images):
    with pytest.raises(ValueError, match="1/40"):
        train_private_teacher(images, PrivateRecipe(delta=0.1), "tiny-gn", progress=False)


def test_validation_images_are_measured_and_choose_nothing(images):
    teacher = short_teacher(images, val=images)
    assert teacher.history and "validation" in teacher.card["accuracy"]


PUBLIC = "drawings of other toy images"


@pytest.fixture(scope="module")
def trunk(images):
    "A net with batch norm whose statistics and weights are public."
    public = toy_pairs(60, 32, seed=7)[1]
    return train_teacher(public, net="tiny", epochs=1, progress=False)


def head_teacher(images, trunk, **changes):
    how = dict(init=trunk, public=PUBLIC, head_only=True, progress=False)
    return train_private_teacher(images, SHORT, "tiny", **how | changes)


def test_a_private_head_leaves_the_public_trunk_as_it_was(images, trunk):
    teacher = head_teacher(images, trunk)
    before, after = trunk.net.state_dict(), teacher.net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert teacher.bn_targets(), "the batch-norm prior is public too"
    privacy = teacher.card["privacy"]
    assert privacy["public"] == PUBLIC and "last" in privacy["trained"]
    assert guarantee_of(teacher.card, teacher.digest())[0] == Guarantee(privacy["epsilon"], 1e-5)


def test_a_step_of_a_private_head_equals_a_slow_loop(images, trunk):
    "All images take part once, unaugmented, and the noise is too small to be seen."
    recipe = PrivateRecipe(
        None,
        noise_multiplier=1e-6,
        epochs=1,
        batch_size=40,
        lr=1.0,
        clip=0.5,
        multiplicity=1,
        ema_decay=0.0,
        accountant="rdp",
    )
    how = dict(init=trunk, public=PUBLIC, head_only=True, progress=False)
    found = train_private_teacher(images, recipe, "tiny", **how).net.fc
    weight, bias = trunk.net.fc.weight, trunk.net.fc.bias
    total_weight, total_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for image, label in zip(images.images(), images.labels, strict=True):
        out = trunk(image[None])
        error = out.posteriors[0].clone()
        error[label] -= 1
        gradient = torch.outer(error, out.features[0])
        factor = min(1.0, 0.5 / (gradient.square().sum() + error.square().sum()).sqrt().item())
        total_weight += factor * gradient
        total_bias += factor * error
    torch.testing.assert_close(found.weight, weight - total_weight / 40, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.bias, bias - total_bias / 40, atol=1e-5, rtol=1e-4)


def test_views_of_a_private_head_begin_with_the_image(images, trunk):
    "One view and no augmentation are the same training; more views are another one."
    once = replace(SHORT, multiplicity=1)
    how = dict(init=trunk, public=PUBLIC, head_only=True, progress=False, noise_seed=3)
    found = [train_private_teacher(images, once, "tiny", augment=a, **how) for a in (True, False)]
    assert found[0].digest() == found[1].digest()
    assert head_teacher(images, trunk, noise_seed=3).digest() != found[0].digest()


def test_a_private_head_needs_public_weights_and_separate_images(images, trunk):
    with pytest.raises(ValueError, match="public weights"):
        head_teacher(images, None, public="")
    with pytest.raises(ValueError, match="BatchNorm2d"):
        head_teacher(images, trunk, head_only=False)
    with pytest.raises(ValueError, match="mix"):
        train_private_teacher(
            images, SHORT, _Centred(), init=_Centred(), public=PUBLIC, head_only=True
        )
