"""Losses: slow-loop oracles on random shapes, extreme logits, half precision, degenerate batches, state."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfsbir import losses
from dfsbir.core.checkpoint import load_state, save_state
from dfsbir.core.types import Modality
from dfsbir.losses.cross_modal import adversarial_loss, align_loss, log_posteriors, modality_loss
from dfsbir.losses.inversion import (
    DAFL_WEIGHTS,
    activation_loss,
    bn_prior_loss,
    class_balance_loss,
    diversity_loss,
    one_hot_loss,
    total_variation,
)
from dfsbir.losses.metric import QueueContrast, consistency_loss, infonce_loss, proxy_anchor_loss
from dfsbir.losses.weighted_sum import NonFiniteTerm, WeightedLoss

C, N, D = 5, 12, 7


def rows(seed=0, n=N, c=C, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(n, c, generator=torch.Generator().manual_seed(seed))).to(dtype)


LABEL = torch.arange(N) % C

# every loss of class scores or embeddings, as a function of one (N,C) matrix
BY_LOGITS = {
    "one_hot": one_hot_loss,
    "class_balance": lambda z: class_balance_loss(z.softmax(1)),
    "align": lambda z: align_loss(z, z.flip(0)),
    "align_one_way": lambda z: align_loss(z, z.flip(0), symmetric=False),
    "modality": lambda z: modality_loss(z[:, 0], Modality.SKETCH),
    "adversarial": lambda z: adversarial_loss(z, LABEL[: len(z)]),
    "proxy_anchor": lambda z: proxy_anchor_loss(z, LABEL[: len(z)], torch.eye(C)),
    "consistency": lambda z: consistency_loss(z, torch.full(z.shape, 1 / C)),
    "activation": activation_loss,
    "queue": lambda z: QueueContrast(C, 16)(z, z.flip(0)),
    "instance": lambda z: infonce_loss(z, z.flip(1)),
    "diversity": lambda z: diversity_loss(
        rows(3, len(z)), z, torch.zeros(len(z), dtype=torch.long)
    ),
}


@pytest.mark.parametrize("name", BY_LOGITS)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e4, 1e18])
def test_finite_with_finite_gradient_at_any_scale(name, scale):
    z = rows(scale=scale).requires_grad_()
    loss = BY_LOGITS[name](z)
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize(
    "name",
    [
        "one_hot",
        "class_balance",
        "align",
        "align_one_way",
        "modality",
        "adversarial",
        "consistency",
    ],
)
def test_finite_at_the_edge_of_float32(name):
    z = (1e30 * rows().sign()).requires_grad_()
    loss = BY_LOGITS[name](z)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("name", BY_LOGITS)
def test_gradient_flows(name):
    z = rows(5).requires_grad_()
    BY_LOGITS[name](z).backward()
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(set(BY_LOGITS) - {"class_balance", "queue"}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_under_autocast_and_from_half_precision(name, dtype):
    z = rows(scale=3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = BY_LOGITS[name](z)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, BY_LOGITS[name](z.float()), rtol=1e-6, atol=1e-7)


def test_lists_of_statistics_and_queues_compute_in_float32_too():
    stats, targets = [(torch.randn(6), torch.rand(6))], [(torch.randn(6), torch.rand(6))]
    half = [tuple(x.bfloat16() for x in s) for s in stats]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = bn_prior_loss(half, targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(
        low, bn_prior_loss([tuple(x.float() for x in s) for s in half], targets)
    )
    queue = QueueContrast(C, 16)
    twin = QueueContrast(C, 16)
    twin.load_state_dict(queue.state_dict())
    z = rows(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = queue(z, z.flip(0))
    torch.testing.assert_close(low, twin(z.float(), z.float().flip(0)))
    assert queue.photo.dtype == torch.float32 and torch.equal(queue.photo, twin.photo)


@pytest.mark.parametrize("name", sorted(set(BY_LOGITS) - {"queue", "proxy_anchor"}))
def test_analytic_gradient_equals_finite_differences(name):
    z = rows(7, dtype=torch.float64).requires_grad_()
    if name == "align_one_way":  # the detached side has no gradient by design
        judge = rows(8, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda z: align_loss(z, judge, symmetric=False), z)
    else:
        assert torch.autograd.gradcheck(BY_LOGITS[name], z)


@pytest.mark.parametrize("n", [1, 2])
def test_batches_of_one_and_two(n):
    z = rows(n=n).requires_grad_()
    for name in set(BY_LOGITS) - ({"diversity", "instance"} if n == 1 else set()):
        loss = BY_LOGITS[name](z)
        assert loss.isfinite(), name


@pytest.mark.parametrize("name", sorted(set(BY_LOGITS) - {"activation"}))
def test_empty_batch_is_an_error(name):
    with pytest.raises(ValueError):
        BY_LOGITS[name](torch.zeros(0, C))


# one by one


def test_one_hot_pulls_up_the_likeliest_class():
    z = rows(1).requires_grad_()
    one_hot_loss(z).backward()
    assert (z.grad.gather(1, z.argmax(1, keepdim=True)) < 0).all() and torch.allclose(
        z.grad.sum(1), torch.zeros(N), atol=1e-7
    )


def test_class_balance_is_base_e_and_dafl_weights_restore_base_10():
    p = rows(2).softmax(1)
    mean = p.mean(0).tolist()
    assert class_balance_loss(p).item() == pytest.approx(
        sum(m * math.log(m) for m in mean), rel=1e-5
    )
    assert DAFL_WEIGHTS["class_balance"] * class_balance_loss(p).item() == pytest.approx(
        5 * sum(m * math.log10(m) for m in mean), rel=1e-5
    )


def test_class_balance_survives_classes_that_never_occur():
    p = F.one_hot(torch.zeros(N, dtype=torch.long), C).float().requires_grad_()
    class_balance_loss(p).backward()
    assert (
        p.grad.isfinite().all() and p.grad[:, 1:].max() < p.grad[:, 0].min()
    )  # asks for the absent classes


def test_align_against_a_slow_loop_and_its_symmetry():
    a, b = rows(3, dtype=torch.float64), rows(4, dtype=torch.float64)
    p, q = a.softmax(1).tolist(), b.softmax(1).tolist()
    kl = lambda p, q: sum(x * math.log(x / y) for r, s in zip(p, q) for x, y in zip(r, s)) / N
    assert align_loss(a, b).item() == pytest.approx((kl(p, q) + kl(q, p)) / 2, rel=1e-9)
    assert align_loss(a, b).item() == pytest.approx(align_loss(b, a).item(), rel=1e-12)
    assert align_loss(a, b, symmetric=False).item() == pytest.approx(kl(q, p), rel=1e-9)


def test_log_posteriors_is_idempotent_and_finite_for_impossible_classes():
    z = rows(5)
    torch.testing.assert_close(log_posteriors(log_posteriors(z)), z.log_softmax(1))
    z[:, 2] = -torch.inf
    logp = log_posteriors(z)
    assert logp.isfinite().all() and (logp[:, 2] < -9e3).all()
    assert consistency_loss(z, F.one_hot(torch.zeros(N, dtype=torch.long), C).float()).isfinite()


def test_modality_takes_values_names_numbers_and_soft_targets():
    d = torch.tensor([-2.0, 0.0, 3.0])
    photo = sum(math.log(1 + math.exp(v)) for v in d.tolist()) / 3
    for target in (Modality.PHOTO, "photo", 0, 0.0, torch.zeros(3)):
        assert modality_loss(d, target).item() == pytest.approx(photo, rel=1e-6)
    assert modality_loss(d[:, None], 0.5).item() == pytest.approx(
        (photo + modality_loss(d, "sketch").item()) / 2, rel=1e-6
    )
    with pytest.raises(ValueError, match="Modality"):
        modality_loss(d, "Photo")


def test_adversarial_stays_within_its_bound():
    z = rows(6, scale=1e4)
    assert -2 * math.log(C) <= adversarial_loss(z, LABEL).item() <= 0
    assert adversarial_loss(torch.zeros(N, C), LABEL).item() == pytest.approx(-math.log(C))
    with pytest.raises(ValueError, match="weight 0"):
        adversarial_loss(z, LABEL, clamp=0)
    with pytest.raises(ValueError, match="int64"):
        adversarial_loss(z, LABEL.float())


@pytest.mark.parametrize(
    "margin, alpha, seed", list(itertools.product((0.0, 0.1), (1.0, 32.0), (0, 1)))
)
def test_proxy_anchor_against_a_slow_loop(margin, alpha, seed):
    e, P, y = (
        rows(seed, dtype=torch.float64, c=D),
        rows(seed + 9, C, D, dtype=torch.float64),
        LABEL % 4,
    )  # class 4 does not occur
    cos = (F.normalize(e) @ F.normalize(P).T).tolist()
    pos = [
        math.log(1 + sum(math.exp(-alpha * (cos[i][c] - margin)) for i in range(N) if y[i] == c))
        for c in range(4)
    ]
    neg = [
        math.log(1 + sum(math.exp(alpha * (cos[i][c] + margin)) for i in range(N) if y[i] != c))
        for c in range(C)
    ]
    assert proxy_anchor_loss(e, y, P, margin, alpha).item() == pytest.approx(
        sum(pos) / 4 + sum(neg) / C, rel=1e-9
    )


def test_proxy_anchor_trains_parameters_and_leaves_fixed_proxies_alone():
    e, P = rows(1, c=D).requires_grad_(), nn.Parameter(rows(2, C, D))
    before, state = P.detach().clone(), torch.get_rng_state()
    proxy_anchor_loss(e, LABEL, P).backward()
    assert P.grad.abs().sum() > 0 and torch.equal(P, before)
    assert torch.equal(
        state, torch.get_rng_state()
    )  # no random numbers are drawn, so a resumed run stays the same
    fixed = rows(2, C, D)
    proxy_anchor_loss(e, LABEL, fixed).backward()
    assert not fixed.requires_grad
    with pytest.raises(ValueError, match="one space"):
        proxy_anchor_loss(e, LABEL, torch.eye(C))
    with pytest.raises(ValueError, match="0 to 4"):
        proxy_anchor_loss(e, LABEL + 1, P)


def test_bn_prior_counts_layers_alike_whatever_their_width_and_scale():
    def layer(c, s):
        return (s * torch.randn(c), s**2 * (torch.rand(c) + 0.5))

    torch.manual_seed(0)
    a, A, b, B = layer(4, 1), layer(4, 1), layer(64, 30), layer(64, 30)
    both = bn_prior_loss([a, b], [A, B]).item()
    assert both == pytest.approx(
        (bn_prior_loss([a], [A]).item() + bn_prior_loss([b], [B]).item()) / 2, rel=1e-5
    )
    wide = tuple(x.repeat(8) for x in a), tuple(x.repeat(8) for x in A)
    assert bn_prior_loss([wide[0]], [wide[1]]).item() == pytest.approx(
        bn_prior_loss([a], [A]).item(), rel=1e-5
    )


def test_bn_prior_moves_the_input_of_a_real_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for _ in range(50):
        net(torch.rand(16, 3, 8, 8))
    x = torch.randn(16, 3, 8, 8, requires_grad=True)
    target = [(net[1].running_mean, net[1].running_var)]

    def loss():
        h = net[0](x)
        return bn_prior_loss([(h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False))], target)

    start, opt = loss().item(), torch.optim.Adam([x], 0.05)
    for _ in range(60):
        opt.zero_grad()
        now = loss()
        now.backward()
        opt.step()
    assert now.item() < start / 5


def test_bn_prior_is_finite_and_zero_gradient_at_its_minimum():
    m, v = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    bn_prior_loss([(m, v)], [(torch.zeros(3), torch.ones(3))]).backward()
    assert m.grad.isfinite().all() and v.grad.isfinite().all()
    with pytest.raises(ValueError, match="same teacher"):
        bn_prior_loss([(m, v)], [])
    with pytest.raises(ValueError, match="same teacher"):
        bn_prior_loss([(m, v)], [(torch.zeros(4), torch.ones(4))])


def test_total_variation_knows_hand_made_images():
    stripes = torch.zeros(1, 1, 4, 6)
    stripes[..., ::2] = 1
    assert total_variation(stripes).item() == pytest.approx(1)  # across only
    assert total_variation(stripes.transpose(2, 3)).item() == pytest.approx(1)
    checker = (torch.arange(4)[:, None] + torch.arange(6)) % 2
    assert total_variation(checker[None, None].float()).item() == pytest.approx(2)
    ramp = torch.arange(8.0).expand(2, 3, 5, 8) / 7
    assert total_variation(ramp).item() == pytest.approx(1 / 7, rel=1e-5)
    with pytest.raises(ValueError, match="H, W >= 2"):
        total_variation(torch.rand(1, 3, 1, 8))


def test_diversity_compares_within_a_class_only_and_skips_equal_noises():
    noise, label = torch.tensor([[0.0], [1.0], [1.0], [3.0]]), torch.tensor([0, 0, 0, 1])
    x = torch.tensor([[0.0], [0.1], [0.9], [5.0]], requires_grad=True)
    loss = diversity_loss(noise, x, label, scale=0.1)
    assert loss.item() == pytest.approx(
        math.exp(-1)
    )  # 0-1; 1-2 share a noise, 3 is alone in its class
    loss.backward()
    assert x.grad[0].item() > 0 > x.grad[1].item() and x.grad[2:].abs().sum() == 0
    with pytest.raises(ValueError, match="at least twice"):
        diversity_loss(noise, x, torch.arange(4))
    with pytest.raises(ValueError, match="one image and one label"):
        diversity_loss(noise, x[:3], label)


def test_descending_diversity_pulls_a_collapsed_generator_apart():
    torch.manual_seed(0)
    g, noise, label = nn.Linear(4, 10), torch.randn(16, 4), torch.arange(16) % 2
    with torch.no_grad():
        g.weight.mul_(1e-3)
    opt = torch.optim.Adam(g.parameters(), 0.05)
    start = diversity_loss(noise, g(noise).sigmoid(), label).item()
    for _ in range(60):
        loss = diversity_loss(noise, g(noise).sigmoid(), label)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert start > 0.95 and loss.item() < 0.3


# the queue


def slow_queue(p, s, bank_p, bank_s, own, T):
    total = 0.0
    for q, k, bank in ((p, s, bank_s), (s, p, bank_p)):
        for i in range(len(q)):
            hit = math.exp((q[i] @ k[i]).item() / T)
            rest = sum(
                math.exp((q[i] @ bank[j]).item() / T) for j in range(len(bank)) if not own[i][j]
            )
            total -= math.log(hit / (hit + rest)) / len(q) / 2
    return total


@pytest.mark.parametrize("labelled", [False, True])
def test_queue_against_a_slow_loop_over_many_odd_batches(labelled):
    torch.manual_seed(0)
    queue, bank = QueueContrast(4, size=10, temperature=0.2), None
    bank = [(queue.photo[i].clone(), queue.sketch[i].clone(), -1) for i in range(10)]
    at = 0
    for n in (3, 4, 7, 1, 10, 13, 2):
        p, s, y = (
            F.normalize(torch.randn(n, 4)),
            F.normalize(torch.randn(n, 4)),
            torch.randint(0, 3, (n,)),
        )
        own = [[labelled and bank[j][2] == y[i] for j in range(10)] for i in range(n)]
        want = slow_queue(p, s, [b[0] for b in bank], [b[1] for b in bank], own, 0.2)
        assert queue(p, s, y if labelled else None).item() == pytest.approx(want, rel=1e-4)
        for i in range(max(0, n - 10), n):
            bank[at % 10] = (p[i], s[i], y[i].item() if labelled else -1)
            at += 1
        torch.testing.assert_close(queue.photo, torch.stack([b[0] for b in bank]))
        torch.testing.assert_close(queue.sketch, torch.stack([b[1] for b in bank]))


def test_queue_normalises_what_it_is_given():
    torch.manual_seed(0)
    a, b = QueueContrast(4, 8), QueueContrast(4, 8)
    b.load_state_dict(a.state_dict())
    p, s = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(a(3 * p, 0.1 * s), b(p, s))


def test_queue_resumes_from_a_file(tmp_path):
    torch.manual_seed(0)
    a, batches = (
        QueueContrast(4, 9),
        [
            (torch.randn(n, 4), torch.randn(n, 4), torch.zeros(n, dtype=torch.long))
            for n in (5, 6, 2, 8)
        ],
    )
    for b in batches[:2]:
        a(*b)
    save_state(tmp_path / "queue.safetensors", dict(a.state_dict()))
    b = QueueContrast(4, 9)
    b.load_state_dict(load_state(tmp_path / "queue.safetensors"))
    for batch in batches[2:]:
        assert a(*batch).item() == b(*batch).item()
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_queue_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="queue 4"):
        QueueContrast(4)(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="sketch has shape"):
        QueueContrast(4)(torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="label"):
        QueueContrast(4)(torch.ones(2, 4), torch.ones(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="above 0"):
        QueueContrast(4, temperature=0)


def test_consistency_reaches_kl_and_refuses_logits():
    z, t = rows(1, dtype=torch.float64), rows(2, dtype=torch.float64).softmax(1)
    kl = F.kl_div(z.log_softmax(1), t, reduction="batchmean").item()
    assert consistency_loss(z, t).item() == pytest.approx(
        kl - (t * t.log()).sum(1).mean().item(), rel=1e-9
    )
    with pytest.raises(ValueError, match="not logits"):
        consistency_loss(z, z)
    with pytest.raises(ValueError, match="counterpart"):
        consistency_loss(z, t[:, :3])


# the sum


def test_terms_weigh_log_and_give_the_gradient_of_the_sum():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    terms = WeightedLoss({"a": 2.0, "b": 0.5, "off": 0})
    total = terms(
        {
            "a": lambda: x.sum(),
            "b": lambda: (x**2).sum(),
            "off": lambda: pytest.fail("a term with weight 0 was computed"),
        }
    )
    total.backward()
    assert total.item() == 8.5 and x.grad.tolist() == [3.0, 4.0]
    assert terms.last == {"a": 3.0, "b": 5.0} and terms.weighted == {"a": 6.0, "b": 2.5}
    assert terms.log("photo/") == {"photo/a": 3.0, "photo/b": 5.0, "photo/total": 8.5}
    assert "| **total** | | | 8.5000 |" in terms._repr_markdown_()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_terms_name_the_one_that_broke(bad):
    terms = WeightedLoss({"fine": 1.0, "broken": 0.1})
    with pytest.raises(NonFiniteTerm, match="'broken'") as e:
        terms({"fine": lambda: torch.tensor(1.0), "broken": lambda: torch.tensor(bad)})
    assert "'fine': 1.0" in str(e.value)


def test_terms_notice_a_sum_that_overflows():
    with pytest.raises(NonFiniteTerm, match="total"):
        WeightedLoss({"big": 1e10})({"big": lambda: torch.tensor(3e38)})


def test_terms_refuse_misspelling_missing_and_senseless_weights():
    with pytest.raises(KeyError, match="allign"):
        WeightedLoss({"align": 1.0})({"align": lambda: 0, "allign": lambda: 0})
    with pytest.raises(KeyError, match="not given"):
        WeightedLoss({"align": 1.0, "adv": 2.0})({"adv": lambda: torch.tensor(0.0)})
    for w in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weights"):
            WeightedLoss({"align": w})
    with pytest.raises(ValueError, match="nothing to minimise"):
        WeightedLoss({"align": 0.0})({})
    assert (
        WeightedLoss({"align": 1.0}).log() == {}
        and "| align | 1 |" in WeightedLoss({"align": 1.0})._repr_markdown_()
    )


def test_every_public_loss_has_a_docstring():
    for name in losses.__all__:
        if callable(getattr(losses, name)):
            assert getattr(losses, name).__doc__, name


# own pairs within the batch


def test_instance_loss_against_a_slow_loop():
    h, g = rows(1), rows(2)
    score = [[F.cosine_similarity(a, b, dim=0).item() / 0.2 for b in g] for a in h]
    own = sum(score[i][i] - math.log(sum(math.exp(s) for s in score[i])) for i in range(N))
    back = sum(
        score[i][i] - math.log(sum(math.exp(score[j][i]) for j in range(N))) for i in range(N)
    )
    assert infonce_loss(h, g, 0.2).item() == pytest.approx(-(own + back) / (2 * N), rel=1e-5)


def test_instance_loss_from_nothing_told_apart_to_everything():
    assert infonce_loss(torch.ones(N, C), torch.ones(N, C)).item() == pytest.approx(math.log(N))
    assert infonce_loss(torch.eye(N), torch.eye(N)) < 1e-3
    assert infonce_loss(torch.eye(N), torch.eye(N).roll(1, 0)) > 9  # sure, and wrong


def test_instance_loss_treats_both_modalities_alike():
    h, g = rows(1).requires_grad_(), rows(2).requires_grad_()
    torch.testing.assert_close(infonce_loss(h, g), infonce_loss(g, h))
    torch.testing.assert_close(infonce_loss(3 * h, g / 7), infonce_loss(h, g))  # any length
    infonce_loss(h, g).backward()
    assert (h.grad.norm(dim=1) > 0).all() and (g.grad.norm(dim=1) > 0).all()
    with torch.no_grad():
        assert infonce_loss(h - h.grad, g - g.grad) < infonce_loss(h, g)


def test_instance_loss_wants_pairs():
    with pytest.raises(ValueError, match="two pairs at least"):
        infonce_loss(rows(n=1), rows(n=1))
    with pytest.raises(ValueError, match="sketch has shape"):
        infonce_loss(rows(), rows(n=3))
