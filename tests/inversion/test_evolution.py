"""Evolution of drawings: an oracle of the elites, exact resuming, and what generations hold."""

import pytest
import torch
from inversion.counting import Counter
from torch import nn

from dfsbir.core.device import make_fabric
from dfsbir.core.types import Modality, Normalizer
from dfsbir.data.drawing_programs import PROGRAM_NUMBERS, draw_programs
from dfsbir.inversion.evolution import DrawingEvolution, Elites
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.teacher import Teacher

NAMES = ("cup", "fish", "star")


class Ink(nn.Module):
    "A classifier that goes by where the ink is: left, right, above, below."

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.fc.weight.data = 20 * torch.eye(4)

    def forward(self, x):
        ink = x.amax() - x.mean(1)
        half = x.shape[-1] // 2
        sides = [ink[..., :half], ink[..., half:], ink[:, :half], ink[:, half:]]
        return self.fc(torch.stack([s.mean((1, 2)) for s in sides], 1))


@pytest.fixture
def teacher():
    classes = (*NAMES, "nobody else's")
    return Teacher(Ink(), classes, Normalizer(16, pen=0.05), Modality.SKETCH)


def evolution(teacher, **changes):
    class_map = align_classes(NAMES, teacher.classes)
    settings = {"size": 16, "batch": 32, "elites": 4, **changes}
    fabric = settings.pop("fabric", None) or make_fabric("cpu")
    return DrawingEvolution(teacher, class_map, fabric, **settings)


def test_elites_are_the_best_of_all_that_were_seen():
    torch.manual_seed(0)
    programs, score = torch.rand(50, PROGRAM_NUMBERS), torch.rand(50, 3)
    elites = Elites(3, 5)
    for part in torch.arange(50).split(7):
        elites.add(programs[part], score[part])
    best, place = score.T.topk(5, 1)
    assert torch.equal(elites.score, best)
    assert torch.equal(elites.programs, programs[place])


def test_elites_that_are_not_full_give_only_what_there_is():
    elites = Elites(2, 5)
    programs = torch.rand(3, PROGRAM_NUMBERS)
    elites.add(programs, torch.rand(3, 2))
    assert elites.filled == 3
    first, second = elites.parents(torch.arange(40) % 2, torch.Generator().manual_seed(0))
    for parents in (first, second):
        assert (parents[:, None] == programs).all(2).any(1).all()


def test_the_score_is_the_log_posterior_among_all_classes_of_the_classifier(teacher):
    evolving = evolution(teacher)
    drawings, label = evolving.run_step()
    posterior = teacher(drawings.float() / 255, bn=False).logits.softmax(1)
    shared = [teacher.classes.index(c) for c in evolving.class_map.classes]
    expected = posterior[:, shared].log()
    torch.testing.assert_close(evolving.elites.score, expected.T.topk(4, 1).values)
    assert torch.equal(label, expected.argmax(1))


def test_elites_become_surer_and_never_less_so(teacher):
    evolving = evolution(teacher)
    evolving.run_step()
    before = first = evolving.elites.score.clone()
    for _ in range(20):
        evolving.run_step()
        assert (evolving.elites.score >= before).all()
        before = evolving.elites.score.clone()
    assert before.mean() > first.mean() + 0.2


def test_the_best_drawing_is_the_one_that_was_scored(teacher):
    evolving = evolution(teacher)
    for _ in range(3):
        evolving.run_step()
    label = torch.arange(3)
    logits = teacher(evolving.best(label), bn=False).logits
    shared = [teacher.classes.index(c) for c in evolving.class_map.classes]
    score = logits.log_softmax(1)[:, shared].diagonal()
    torch.testing.assert_close(score, evolving.elites.score[:, 0])
    again = evolving.best(label, torch.tensor([0, 4, 8]))  # four are kept of each class
    assert torch.equal(again, evolving.best(label))


def test_nothing_can_be_shown_before_the_first_generation(teacher):
    with pytest.raises(ValueError, match="run a generation first"):
        evolution(teacher).best(torch.arange(2))


def test_all_classes_take_turns_where_a_generation_is_smaller_than_they_are(teacher):
    evolving = evolution(teacher, batch=2, new=0.5)
    evolving.run_step()
    seen = []
    for _ in range(3):
        seen += evolving._next_programs()[1].tolist()
        evolving.step += 1
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.parametrize("new, children", [(0.25, 24), (1.0, 0), (1e-9, 31)])
def test_a_share_of_each_generation_has_no_parents(teacher, new, children):
    evolving = evolution(teacher, new=new)
    evolving.run_step()
    programs, label = evolving._next_programs()
    assert len(programs) == 32 and len(label) == children


def test_the_pen_of_the_classifier_draws(teacher):
    evolving = evolution(teacher)
    evolving.run_step()
    program = evolving.elites.programs[0, :1]
    expected = (draw_programs(program, 16, 0.05) * 255).round().byte().float() / 255
    assert torch.equal(evolving.best(torch.tensor([0])), expected)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_search_that_was_stopped_goes_on_exactly(teacher, stop):
    whole, half, again = (evolution(teacher, seed=4) for _ in range(3))
    for _ in range(stop):
        half.run_step()
    again.load_state_dict(half.state_dict())
    for _ in range(stop):
        whole.run_step()
    for _ in range(2):
        found, expected = again.run_step(), whole.run_step()
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_processes_and_seeds_evolve_other_drawings(teacher):
    class SecondOfTwo:
        global_rank, device = 1, torch.device("cpu")
        autocast = staticmethod(make_fabric("cpu").autocast)

    first = [evolution(teacher, **c) for c in ({}, {"seed": 1}, {"fabric": SecondOfTwo()})]
    drawings = [e.run_step()[0] for e in first]
    assert not torch.equal(drawings[0], drawings[1])
    assert not torch.equal(drawings[0], drawings[2])


def test_a_generation_on_a_card_waits_for_nothing(teacher):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the CPU waits for nothing")
    evolving = evolution(teacher.to("cuda"), fabric=make_fabric("cuda"))
    for _ in range(2):
        evolving.run_step()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evolving.run_step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    program = evolving.elites.programs[:, 0]
    drawn = draw_programs(program, 16, 0.05).cpu()
    torch.testing.assert_close(drawn, draw_programs(program.cpu(), 16, 0.05), atol=1e-3, rtol=0)


@pytest.mark.parametrize("n, size", [(3, 16), (300, 16), (3, 64)])
def test_few_operations_draw_any_number_of_drawings(n, size):
    programs = torch.rand(n, PROGRAM_NUMBERS)
    with Counter() as counter:
        draw_programs(programs, size)
    assert counter.count < 700


def test_the_global_random_numbers_are_left_alone(teacher):
    before = torch.get_rng_state()
    evolution(teacher).run_step()
    assert torch.equal(torch.get_rng_state(), before)
