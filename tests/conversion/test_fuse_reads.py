"""What the traced code read, and values that are used in more than one place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error
from parts import ADDITIONS, CHANNELS, RELU, Parts, forms, fused_like_plain
from torch import nn

import resfused


class Reads(Parts):
    """Its code reads ``number``."""

    def __init__(self, number):
        super().__init__()
        self.number = number


class ReadsAList(Reads):
    def forward(self, x):
        return F.relu(self.a(x)) * self.number[0]


class AsksForTrue(Reads):
    def forward(self, x):
        return F.relu(self.a(x)) * (2 if self.number is True else 3 if isinstance(self.number, int) else 5)


class AsksForTrueInAList(Reads):
    def forward(self, x):
        return F.relu(self.a(x)) * (2 if self.number[0] is True else 3 if isinstance(self.number[0], int) else 5)


class AsksForTrueInADict(Reads):
    def forward(self, x):
        return F.relu(self.a(x)) * (2 if self.number["it"] is True else 3 if isinstance(self.number["it"], int) else 5)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [(AsksForTrue, [True, 1, 1.0]), (AsksForTrueInAList, [[True], [1], [1.0]]),
     (AsksForTrueInADict, [{"it": True}, {"it": 1}, {"it": 1.0}])],
)  # fmt: skip
def test_true_is_not_one(kind, numbers, device):
    """True, 1 and 1.0 are equal, and not the same to code that reads them."""
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    for before in numbers:
        model = kind(before).to(device, torch.float64)
        assert forms(resfused.fuse_(model)) == [RELU]
        for after in numbers:
            model.number = after
            assert relative_error(model(x), kind.forward(model, x)) < 1e-12, (before, after)


def test_a_list_changed_in_place(device):
    model = ReadsAList([2.0]).to(device, torch.float64)
    assert forms(resfused.fuse_(model)) == [RELU]
    model.number[0] = 3.0
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    assert relative_error(model(x), ReadsAList.forward(model, x)) < 1e-12


def changes_its_input(self, x):
    out = self.a(x)
    x += out
    return F.relu(self.b(x) + x)


def adds_its_input(self, x):
    out = self.a(x)
    out += x
    return F.relu(out)


@pytest.mark.parametrize("code", [changes_its_input, adds_its_input])
def test_a_pair_is_not_changed_in_place(code, device):
    """Both halves are one memory: a block that changes its input in place is given a tensor, not a pair.

    Of the gradients only those that come before the change: the others are eager's error.
    """
    plain = nn.Sequential(Parts(ADDITIONS["out + x"][1]), Parts(code)).to(device, torch.float64)
    model = copy.deepcopy(plain)
    assert resfused.fuse_(model).fused[0].forked == (code is adds_its_input)
    x = torch.randn(2, CHANNELS, 4, 4, dtype=torch.float64, device=device)
    results = []
    for each in (model, plain):
        last = each[1].bn2 if code is changes_its_input else each[1].bn1
        y = each(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), last.parameters())))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-12


class UsesTwice(nn.Module):
    """The first block's output goes to the second, and elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (Parts(ADDITIONS["out + x"][1]) for _ in range(2))

    def forward(self, x):
        y = self.first(x)
        return self.second(y) * y.sigmoid()


class GivesTwice(UsesTwice):
    def forward(self, x):
        y = self.first(x)
        return y, self.second(y)


@pytest.mark.parametrize("kind", [UsesTwice, GivesTwice])
def test_a_value_used_elsewhere_is_no_pair(kind, device):
    assert not any(entry.forked for entry in fused_like_plain(kind(), device).fused)


def test_isinstance_answers_for_tensors(device):
    def code(self, x):
        x = x if isinstance(x, torch.Tensor) else x[0] * 100
        return F.relu(self.a(x))

    assert forms(fused_like_plain(Parts(code), device)) == [RELU]
