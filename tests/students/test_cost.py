"""What an encoder costs: multiplications by hand, bytes of weights that are shared, programs."""

import pytest
import torch
from torch import nn

from dfsbir.students.cost import cost_table, count_multiplications, measure_cost
from dfsbir.teachers.torchscript import ScriptNet


class Two(nn.Module):
    "Two convolutions and a linear layer."

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.two(self.one(x)).mean((2, 3)))


EXPECTED = 64 * 4 * 9 * 3 + 64 * 4 * 9 * 2 + 4 * 5  # at 16 px


def test_multiplications_by_hand():
    assert count_multiplications(Two().eval(), torch.rand(1, 3, 16, 16)) == EXPECTED


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_program_counts_as_its_net():
    net = Two().eval()
    program = ScriptNet(torch.jit.trace(net, torch.rand(1, 3, 16, 16)))
    assert count_multiplications(program, torch.rand(1, 3, 16, 16)) == EXPECTED


def test_weights_count_once():
    net = nn.ModuleList([nn.Linear(10, 10, bias=False)] * 2)
    net.forward = net[0].forward
    cost = measure_cost(net.eval(), torch.rand(1, 10, 10, 10), batch=2, passes=1)
    assert cost.megabytes == pytest.approx(400 / 1e6)
    assert cost.milliseconds > 0


def test_a_net_in_training_mode():
    with pytest.raises(ValueError, match="training"):
        measure_cost(Two(), torch.rand(1, 3, 16, 16))


def test_the_table_has_a_row_for_each():
    cost = measure_cost(Two().eval(), torch.rand(1, 3, 16, 16), batch=2, passes=1)
    table = cost_table({"a": cost, "b": cost})
    assert table.count("\n") == 3
    assert f"| a | {EXPECTED / 1e6:.1f} |" in table
