"Generators trained on with another weight of modality guidance."

import torch

from dfsbir.explore.guidance import with_guidance


def test_guidance_changes_copies_alone(run):
    before = {
        m: {name: value.clone() for name, value in g.state_dict().items()}
        for m, g in run.generators.items()
    }
    made = with_guidance(run, 3.0, steps=2)
    assert with_guidance(run, 3.0) is made
    for m, g in run.generators.items():
        now, guided = g.state_dict(), made[m].state_dict()
        assert all(torch.equal(value, now[name]) for name, value in before[m].items())
        assert any(not torch.equal(value, guided[name]) for name, value in before[m].items())
