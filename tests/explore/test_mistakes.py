"Disagreement and confusion, recomputed slowly."

import pytest
import torch

from dfsbir.core.types import MODALITIES
from dfsbir.data.toy import toy_pairs
from dfsbir.explore.mistakes import confusion, disagreement
from dfsbir.explore.samples import sample_pairs


def test_disagreement_is_total_variation(run):
    pairs = sample_pairs(run, "fish", 5)
    distance, posteriors = disagreement(run, pairs)
    for i in range(5):
        slow = 0.0
        for m in MODALITIES:
            for k in range(3):
                p, q = posteriors["teacher"][m][i, k], posteriors["student"][m][i, k]
                slow += abs(float(p) - float(q)) / 4
        assert distance[i].item() == pytest.approx(slow, abs=1e-6)


def test_confusion_counts_and_leaves_unknown_classes_out(run):
    classes = ("fish", "cup", "bottle", "car")
    for images in toy_pairs(40, size=32, classes=classes, split="test"):
        found = confusion(run, images)
        assert images.classes[1] == "cup" and not (images.labels[found.places] == 1).any()
        slow = torch.zeros(3, 3, dtype=torch.long)
        for true, posterior in zip(found.labels, found.posteriors):
            slow[true, posterior.argmax()] += 1
        assert torch.equal(found.counts, slow) and slow.sum(1).tolist() == [10, 10, 10]
        assert found.accuracy == pytest.approx(slow.trace().item() / 30)
        assert confusion(run, images) is found


def test_mistaken_images_are_wrong_and_the_most_confident_come_first(run, sets):
    found = confusion(run, sets[1])
    for k in range(3):
        mistaken = found.mistaken(k)
        assert (found.labels[mistaken] == k).all()
        assert (found.posteriors[mistaken].argmax(1) != k).all()
        confidence = found.posteriors[mistaken].max(1).values
        assert torch.equal(confidence, confidence.sort(descending=True).values)
        assert len(mistaken) == found.counts[k].sum() - found.counts[k, k]


def test_images_of_other_classes_are_refused(run):
    stars = toy_pairs(4, size=32, classes=("cup", "star"), split="test")[0]
    with pytest.raises(ValueError, match="no class in common"):
        confusion(run, stars)
