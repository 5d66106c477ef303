"Embedding heads against slow loops, at extremes, and as a teacher's student starts with them."

import pytest
import torch
import torch.nn.functional as F
from students.helpers import (
    CLASS_MAP,
    PHOTO,
    SKETCH,
    D,
    K,
    make_distiller,
    make_intermediate,
    make_students,
    noise_pairs,
    spec,
)

from dfsbir.core.types import MODALITIES, Modality
from dfsbir.students.heads import (
    FeatureHead,
    JointHead,
    MetricSpace,
    PosteriorHead,
    complement_basis,
)

WIDTH = 5
SPACE = MetricSpace.random(K, D, seed=3)


def slow_posterior(row, assignment, temperature):
    "The posterior of one row of logits, in plain numbers."
    e = (row / temperature).double().exp().tolist()
    sums = [sum(e[c] for c in range(len(row)) if assignment[c] == k) for k in range(K)]
    return torch.tensor([s / sum(sums) for s in sums])


def test_a_space_is_orthonormal_and_repeatable():
    basis = torch.cat([SPACE.proxies, torch.stack([SPACE.modality_axes[m] for m in MODALITIES])])
    torch.testing.assert_close(basis @ basis.T, torch.eye(K + 2), atol=1e-5, rtol=0)
    assert torch.equal(SPACE.proxies, MetricSpace.random(K, D, seed=3).proxies)
    with pytest.raises(ValueError, match="dim=4"):
        MetricSpace.random(K, K + 1)


def test_posterior_head_against_a_slow_loop():
    z, p = {}, {}
    for m, names in zip(MODALITIES, (PHOTO, SKETCH), strict=True):
        assignment = CLASS_MAP.assignment(m)
        head = PosteriorHead(assignment, SPACE.proxies, SPACE.modality_axes[m], 2.0)
        logits = torch.randn(4, len(names)) * 3
        p[m] = torch.stack([slow_posterior(row, assignment, 2.0) for row in logits])
        z[m] = head(logits)
        torch.testing.assert_close(head.log_posteriors(logits).exp(), p[m])
        torch.testing.assert_close(CLASS_MAP.posteriors(logits, m, 2.0), p[m])
        torch.testing.assert_close(z[m].norm(dim=1), torch.ones(4))
    photo, sketch = MODALITIES
    torch.testing.assert_close(z[photo] @ z[sketch].T, p[photo] @ p[sketch].T)


def test_posterior_head_at_the_extremes():
    head = PosteriorHead(torch.arange(K), SPACE.proxies, SPACE.modality_axes[Modality.PHOTO])
    logits = torch.tensor([[1e4, 0, 0], [0.0, 0, 0], [-1e4, -1e4, -1e4]]).requires_grad_()
    z = head(logits)
    z.sum().backward()
    assert z.isfinite().all() and logits.grad.isfinite().all()
    torch.testing.assert_close(z[0], SPACE.proxies[0], atol=1e-4, rtol=0)


def test_feature_head_predicts_by_cosine():
    head = FeatureHead(WIDTH, SPACE.proxies, 0.1)
    features = torch.randn(4, WIDTH)
    z = head(features)
    cosines = torch.stack([F.cosine_similarity(z, p[None]) for p in head.proxies], 1)
    torch.testing.assert_close(head.log_posteriors(features).exp(), (cosines / 0.1).softmax(1))


def joint_heads(temperature=2.0, assignment=CLASS_MAP.assignment):
    "Joint heads of both modalities with weights of their own, and features for them."
    basis = complement_basis(SPACE.proxies)
    return [
        (
            JointHead(WIDTH, assignment(m), SPACE.proxies, basis, temperature),
            3 * torch.randn(n, WIDTH),
        )
        for m, n in zip(MODALITIES, (4, 6), strict=True)
    ]


def test_joint_similarity_is_class_plus_residual_norms_times_shape():
    (a, f), (b, g) = joint_heads()
    z, y = a(f), b(g)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))
    for i in range(4):
        for j in range(6):
            p = a.log_posteriors(f[i : i + 1], 2.0).exp()[0]
            q = b.log_posteriors(g[j : j + 1], 2.0).exp()[0]
            likeness = F.cosine_similarity(a.shape(f[i]), b.shape(g[j]), dim=0)
            wanted = p @ q + ((1 - p @ p) * (1 - q @ q)).sqrt() * likeness
            torch.testing.assert_close(z[i] @ y[j], wanted, atol=1e-5, rtol=0)


def test_the_temperature_of_a_joint_head_goes_from_class_to_shape():
    (a, f), (b, g) = joint_heads(assignment=lambda m: torch.arange(K))
    shape = F.normalize(a.shape(f), dim=1) @ F.normalize(b.shape(g), dim=1).T
    log_posteriors = a.log_posteriors(f)
    a.temperature = b.temperature = 1e6
    assert torch.equal((a(f) @ b(g).T).argsort(1), shape.argsort(1))
    a.temperature = b.temperature = 1e-6
    p, q = a.log_posteriors(f, 1e-6).exp(), b.log_posteriors(g, 1e-6).exp()
    torch.testing.assert_close(a(f) @ b(g).T, p @ q.T, atol=1e-3, rtol=0)
    assert torch.equal(a.log_posteriors(f), log_posteriors), "predictions do not depend on it"
    assert a(f).isfinite().all()


def test_the_shape_part_of_an_embedding():
    (a, f), _ = joint_heads()
    torch.testing.assert_close(a.shape_part(a(f)), F.normalize(a.shape(f), dim=1))
    flipped = torch.randn(4, WIDTH)
    both = F.normalize(a.shape(f), dim=1) + F.normalize(a.shape(flipped), dim=1)
    torch.testing.assert_close(a.shape_part(a(f, flipped)), F.normalize(both, dim=1))
    torch.testing.assert_close(a(f, flipped), a(flipped, f))
    torch.testing.assert_close(a(f, f), a(f))


def test_both_modalities_have_one_complement_basis(teachers):
    photo, sketch = make_students(teachers, spec("joint"))
    whole = torch.cat([photo.head.proxies, photo.head.basis])
    torch.testing.assert_close(whole @ whole.T, torch.eye(D), atol=1e-5, rtol=0)
    assert torch.equal(photo.head.basis, sketch.head.basis)
    assert photo.head.basis.shape == (D - K, D)


def test_a_joint_student_starts_with_the_teachers_posteriors_and_logits(teachers):
    batch = noise_pairs()
    for m, e in zip(MODALITIES, make_students(teachers, spec("joint", 3.0)), strict=True):
        logits, assignment = teachers[m](batch.of(m)).logits, CLASS_MAP.assignment(m)
        log_p = e.eval().predict_log_probs(batch.of(m))[1]
        wanted = CLASS_MAP.posteriors(logits, m)
        torch.testing.assert_close(log_p.exp(), wanted, atol=1e-5, rtol=1e-4)
        shape = e.head.shape(e.net(e.normalizer(batch.of(m))))[:, :K]
        means = torch.stack([logits[:, assignment == k].mean(1) for k in range(K)], 1)
        torch.testing.assert_close(shape, means, atol=1e-5, rtol=1e-4)


def test_a_space_with_too_few_dimensions_for_shape_is_refused(teachers):
    with pytest.raises(ValueError, match="dim=6.*found 5"):
        make_students(teachers, spec("joint"), dim=5)


@pytest.mark.parametrize("kind", ["posterior", "feature", "joint", "intermediate"])
def test_a_head_computes_in_full_precision_under_autocast(teachers, kind):
    "Only the net may round: the embedding of its rounded output is exact, of unit length."
    if kind == "intermediate":
        distiller = make_intermediate(teachers)
    else:
        distiller = make_distiller(teachers, kind)
    encoder, x = distiller.encoders()[Modality.PHOTO], noise_pairs(5).photo
    encoder.card["flip_tta"] = False
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = encoder.net(encoder.normalizer(x)).float()
        embedding, (again, log_p) = encoder(x), encoder.predict_log_probs(x)
    with torch.no_grad():
        wanted = encoder.head(output)
        for e in (embedding, again):
            torch.testing.assert_close(e, wanted, atol=1e-6, rtol=1e-6)
        wanted = encoder.head.log_posteriors(output)
        torch.testing.assert_close(log_p, wanted, atol=1e-5, rtol=1e-5)


def test_a_class_maps_posteriors_are_exact_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        p = CLASS_MAP.posteriors(torch.randn(4, len(PHOTO)), Modality.PHOTO)
    assert p.dtype is torch.float32
    torch.testing.assert_close(p.sum(1), torch.ones(4), atol=1e-6, rtol=0)
