"Proxy anchor, the queue, InfoNCE and consistency, each against a slow loop."

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ProxyAnchorLoss
from torch import nn

from dfsbir.core.checkpoint import load_state, save_state
from dfsbir.losses.metric import QueueContrast, consistency_loss, infonce_loss, proxy_anchor_loss

C, N, D = 5, 12, 7
LABEL = torch.arange(N) % C


def rows(seed=0, n=N, c=C, dtype=torch.float32):
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- proxy anchor


@pytest.mark.parametrize(
    "margin, alpha, seed", list(itertools.product((0.0, 0.1), (1.0, 32.0), (0, 1)))
)
def test_proxy_anchor_against_a_slow_loop(margin, alpha, seed):
    e, proxies = rows(seed, c=D, dtype=torch.float64), rows(seed + 9, C, D, torch.float64)
    label = LABEL % 4  # class 4 does not occur
    cosine = (F.normalize(e) @ F.normalize(proxies).T).tolist()
    own, other = [], []
    for c in range(C):
        near = [math.exp(-alpha * (r[c] - margin)) for r, y in zip(cosine, label) if y == c]
        far = [math.exp(alpha * (r[c] + margin)) for r, y in zip(cosine, label) if y != c]
        own += [math.log(1 + sum(near))] if near else []
        other.append(math.log(1 + sum(far)))
    want = sum(own) / 4 + sum(other) / C
    found = proxy_anchor_loss(e, label, proxies, margin, alpha).item()
    assert found == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("alpha", (1.0, 32.0, 400.0))
def test_proxy_anchor_is_the_librarys(alpha):
    "Of pytorch-metric-learning, whose proxies are replaced; with its gradients."
    labels = LABEL % 4  # class 4 does not occur
    library = ProxyAnchorLoss(C, D, margin=0.1, alpha=alpha)
    library.proxies.data = rows(9, C, D)
    embeddings = [rows(3, c=D).requires_grad_() for _ in range(2)]
    proxies = library.proxies.detach().clone().requires_grad_()
    wanted = library(embeddings[0], labels)
    found = proxy_anchor_loss(embeddings[1], labels, proxies, 0.1, alpha)
    wanted.backward()
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.allclose(embeddings[1].grad, embeddings[0].grad, rtol=1e-3, atol=1e-5)
    assert torch.allclose(proxies.grad, library.proxies.grad, rtol=1e-3, atol=1e-5)


def test_proxy_anchor_trains_parameters_and_leaves_fixed_proxies_alone():
    e, proxies = rows(1, c=D).requires_grad_(), nn.Parameter(rows(2, C, D))
    before, state = proxies.detach().clone(), torch.get_rng_state()
    proxy_anchor_loss(e, LABEL, proxies).backward()
    assert proxies.grad.abs().sum() > 0 and torch.equal(proxies, before)
    assert torch.equal(state, torch.get_rng_state()), "drawn numbers would change a resumed run"
    fixed = rows(2, C, D)
    proxy_anchor_loss(e, LABEL, fixed).backward()
    assert not fixed.requires_grad
    with pytest.raises(ValueError, match="7 dimensions but proxies 5"):
        proxy_anchor_loss(e, LABEL, torch.eye(C))
    with pytest.raises(ValueError, match="0 to 4"):
        proxy_anchor_loss(e, LABEL + 1, proxies)


# ---- the queue


class SlowQueue:
    "The queue in plain Python: a list of (photo, sketch, label), the oldest replaced first."

    def __init__(self, queue):
        pairs = zip(queue.photo.clone(), queue.sketch.clone())
        self.entries = [(photo, sketch, -1) for photo, sketch in pairs]
        self.at, self.temperature = 0, queue.temperature

    def one_way(self, queries, positives, labels, side):
        total = 0.0
        for query, positive, label in zip(queries, positives, labels):
            own = math.exp((query @ positive).item() / self.temperature)
            kept = [entry[side] for entry in self.entries if label < 0 or entry[2] != label]
            others = sum(math.exp((query @ k).item() / self.temperature) for k in kept)
            total -= math.log(own / (own + others))
        return total / len(queries)

    def __call__(self, photo, sketch, label=None):
        labels = [-1] * len(photo) if label is None else label.tolist()
        loss = self.one_way(photo, sketch, labels, 1) + self.one_way(sketch, photo, labels, 0)
        for entry in list(zip(photo, sketch, labels))[-len(self.entries) :]:
            self.entries[self.at % len(self.entries)] = entry
            self.at += 1
        return loss / 2


@pytest.mark.parametrize("labelled", [False, True])
def test_queue_against_a_slow_loop_over_many_odd_batches(labelled):
    torch.manual_seed(0)
    queue = QueueContrast(4, size=10, temperature=0.2)
    slow = SlowQueue(queue)
    for n in (3, 4, 7, 1, 10, 13, 2):
        photo, sketch = F.normalize(torch.randn(n, 4)), F.normalize(torch.randn(n, 4))
        label = torch.randint(0, 3, (n,)) if labelled else None
        want = slow(photo, sketch, label)
        assert queue(photo, sketch, label).item() == pytest.approx(want, rel=1e-4)
        photos, sketches, _ = zip(*slow.entries)
        torch.testing.assert_close(queue.photo, torch.stack(photos))
        torch.testing.assert_close(queue.sketch, torch.stack(sketches))


def test_queue_normalises_what_it_is_given():
    torch.manual_seed(0)
    a, b = QueueContrast(4, 8), QueueContrast(4, 8)
    b.load_state_dict(a.state_dict())
    photo, sketch = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(a(3 * photo, 0.1 * sketch), b(photo, sketch))


def test_queue_resumes_from_a_file(tmp_path):
    torch.manual_seed(0)
    batches = [
        (torch.randn(n, 4), torch.randn(n, 4), torch.zeros(n, dtype=torch.long))
        for n in (5, 6, 2, 8)
    ]
    first, second = QueueContrast(4, 9), QueueContrast(4, 9)
    for batch in batches[:2]:
        first(*batch)
    save_state(tmp_path / "queue.safetensors", dict(first.state_dict()))
    second.load_state_dict(load_state(tmp_path / "queue.safetensors"))
    for batch in batches[2:]:
        assert first(*batch).item() == second(*batch).item()
    states = zip(first.state_dict().values(), second.state_dict().values())
    assert all(torch.equal(x, y) for x, y in states)


def test_queue_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="3 dimensions, the queue 4"):
        QueueContrast(4)(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="sketch has shape"):
        QueueContrast(4)(torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="label"):
        QueueContrast(4)(torch.ones(2, 4), torch.ones(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="temperature 0"):
        QueueContrast(4, temperature=0)


# ---- InfoNCE


def test_infonce_against_a_slow_loop():
    h, g = rows(1), rows(2)
    score = [[F.cosine_similarity(a, b, dim=0).item() / 0.2 for b in g] for a in h]
    total = 0.0
    for i in range(N):
        sketches = sum(math.exp(score[i][j]) for j in range(N))
        photos = sum(math.exp(score[j][i]) for j in range(N))
        total += math.log(sketches) + math.log(photos) - 2 * score[i][i]
    assert infonce_loss(h, g, 0.2).item() == pytest.approx(total / (2 * N), rel=1e-5)


def test_infonce_where_all_embeddings_are_the_same_and_where_all_differ():
    assert infonce_loss(torch.ones(N, C), torch.ones(N, C)).item() == pytest.approx(math.log(N))
    assert infonce_loss(torch.eye(N), torch.eye(N)) < 1e-3
    assert infonce_loss(torch.eye(N), torch.eye(N).roll(1, 0)) > 9, "certain, and wrong"


def test_infonce_treats_both_modalities_alike():
    h, g = rows(1).requires_grad_(), rows(2).requires_grad_()
    torch.testing.assert_close(infonce_loss(h, g), infonce_loss(g, h))
    torch.testing.assert_close(infonce_loss(3 * h, g / 7), infonce_loss(h, g))  # any length
    infonce_loss(h, g).backward()
    assert (h.grad.norm(dim=1) > 0).all() and (g.grad.norm(dim=1) > 0).all()
    with torch.no_grad():
        assert infonce_loss(h - h.grad, g - g.grad) < infonce_loss(h, g)


def test_infonce_needs_pairs():
    with pytest.raises(ValueError, match="batch of 1"):
        infonce_loss(rows(n=1), rows(n=1))
    with pytest.raises(ValueError, match="sketch has shape"):
        infonce_loss(rows(), rows(n=3))


# ---- consistency


def test_consistency_is_kl_plus_entropy_and_refuses_logits():
    z, target = rows(1, dtype=torch.float64), rows(2, dtype=torch.float64).softmax(1)
    kl = F.kl_div(z.log_softmax(1), target, reduction="batchmean").item()
    entropy = -(target * target.log()).sum(1).mean().item()
    assert consistency_loss(z, target).item() == pytest.approx(kl + entropy, rel=1e-9)
    impossible = z.index_fill(1, torch.tensor([2]), -torch.inf)
    assert consistency_loss(impossible, F.one_hot(LABEL * 0, C).double()).isfinite()
    with pytest.raises(ValueError, match="target_posterior"):
        consistency_loss(z, z)
    with pytest.raises(ValueError, match=r"\(12, 3\)"):
        consistency_loss(z, target[:, :3])
