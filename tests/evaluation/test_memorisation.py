"Memorisation: nearest images, the interval of chance, copies and canaries."

from dataclasses import asdict

import pytest
import torch

from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.evaluation.membership import confidence, exposure
from dfsbir.evaluation.memorisation import (
    CanaryPlan,
    as_pixels,
    attack_canaries,
    compare_nearest,
    gallery_rank,
    insert_canaries,
    make_canaries,
    nearest_distances,
    show_closest,
)
from dfsbir.teachers.training import train_teacher


def vectors(n, seed):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def test_nearest_vectors_equal_a_slow_loop():
    some, pool = vectors(7, 0), vectors(9, 1)
    distances, places = nearest_distances(some, pool, batch_size=3)
    for i in range(7):
        slow = [(some[i] - p).norm().item() for p in pool]
        assert distances[i].item() == pytest.approx(min(slow), rel=1e-4)
        assert slow[places[i]] == min(slow)


def test_the_distance_of_pixels_is_their_root_mean_square_difference():
    black, white = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    difference = as_pixels(black) - as_pixels(white)
    assert difference.norm().item() == pytest.approx(1.0)


def test_copies_are_found_and_fresh_images_are_not():
    train, held_out = vectors(100, 0), vectors(150, 1)
    copies = compare_nearest(train[:40] + 0.1 * vectors(40, 2), train, held_out)
    assert copies.share == 1 and copies.above_chance
    assert torch.equal(copies.train_places, torch.arange(40))
    fresh = compare_nearest(vectors(200, 3), train, held_out)
    assert fresh.chance_low < fresh.share < fresh.chance_high
    assert set(fresh.as_dict()) >= {"share", "chance_low", "chance_high", "median_to_train"}


def test_estimates_that_are_all_alike_say_little():
    "The interval of chance is wide: their nearest image is one and the same."
    same = vectors(1, 5).expand(100, -1)
    found = compare_nearest(same, vectors(50, 0), vectors(50, 1))
    assert (found.chance_low, found.chance_high) == (0, 1)


def test_nothing_to_compare_with():
    with pytest.raises(ValueError, match="0 and 3"):
        compare_nearest(vectors(5, 0), vectors(0, 1), vectors(3, 2))


def test_canaries_are_inserted_so_many_times():
    data = toy_pairs(20, 32, seed=0)[1]
    canaries, labels = make_canaries(3, 32, 1, 10)
    more = insert_canaries(data, canaries, labels, [0, 2, 5])
    assert len(more) == 27
    assert more.labels[20:].tolist() == [labels[1]] * 2 + [labels[2]] * 5
    torch.testing.assert_close(more.images()[-1], canaries[2], atol=1 / 255, rtol=0)
    with pytest.raises(ValueError, match="canary"):
        insert_canaries(data, canaries, labels, [1])


def test_a_plan_makes_its_canaries_again():
    data, plan = toy_pairs(20, 32, seed=0)[0], CanaryPlan((1, 3), each=2, unused=5)
    groups = plan.groups(32, data.classes, "photo")
    assert {times: len(group) for times, group in groups.items()} == {0: 5, 1: 2, 3: 2}
    more = plan.insert(data)
    assert len(more) == 20 + 2 * 1 + 2 * 3
    again = CanaryPlan(**asdict(plan)).groups(32, data.classes, "photo")
    assert torch.equal(more.take([-1]).images(), again[3].take([1]).images())
    other = CanaryPlan((1,), seed=1).groups(32, data.classes, "photo")
    assert not torch.equal(other[1].take([0]).images(), groups[1].take([0]).images())


@pytest.mark.parametrize("times", [(), (0,), (-1, 2), (8, 8)])
def test_plans_that_make_no_sense(times):
    with pytest.raises(ValueError, match="above 0"):
        CanaryPlan(times)


def test_attacks_on_canaries_by_number_of_copies():
    "A score that knows the canaries of three copies alone."
    groups = CanaryPlan((1, 3), each=6, unused=50).groups(32, TOY_CLASSES, "sketch")
    known = as_pixels(groups[3].images())
    found = attack_canaries(lambda g: -nearest_distances(as_pixels(g.images()), known)[0], groups)
    assert set(found) == {1, 3} and found[3].auc == 1 and found[3].members == 6
    assert found[1].auc_low < 0.5 < found[1].auc_high and found[1].others == 50


def test_the_rank_in_a_gallery_equals_a_slow_loop():
    images, queries, gallery = (
        torch.nn.functional.normalize(vectors(n, seed)) for n, seed in ((4, 0), (6, 1), (9, 2))
    )
    labels, query_labels = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 1, 0])
    found = gallery_rank(images, labels, queries, query_labels, gallery)
    for image, label, rank in zip(images, labels, found, strict=True):
        shares = []
        for query, own in zip(queries, query_labels, strict=True):
            if own == label:
                shares.append(sum(query @ g < query @ image for g in gallery) / 9)
        assert rank.item() == pytest.approx(sum(shares).item() / len(shares), abs=1e-6)
    with pytest.raises(ValueError, match="none of 1"):
        gallery_rank(images, labels, queries, torch.zeros(6).long(), gallery)


def test_closest_pairs_are_shown():
    train, held_out = (toy_pairs(20, 32, seed=s)[1] for s in (0, 1))
    estimates = train.images()[:8]
    found = compare_nearest(*(as_pixels(x) for x in (estimates, train.images(), held_out.images())))
    assert len(show_closest(found, estimates, train, held_out, n=3).axes) == 9


def test_canaries_that_were_inserted_stand_out_in_a_teacher():
    "Eight never, eight four times: exposure of the second group is far above chance."
    classes = list(TOY_CLASSES[:3])
    photos = toy_pairs(60, 32, seed=3, classes=classes)[0]
    canaries, labels = make_canaries(216, 32, 3, 3)
    infected = insert_canaries(photos, canaries[:16], labels[:16], [0] * 8 + [4] * 8)
    teacher = train_teacher(infected, photos, epochs=15, augment=False, progress=False)
    with torch.no_grad():
        scores = confidence(teacher(canaries).logits.log_softmax(1), labels)
    never, four_times = exposure(scores[:16], scores[16:]).view(2, 8).mean(1).tolist()
    assert never < 3.5 and four_times > never + 1
