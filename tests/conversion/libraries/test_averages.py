"""Averages of a model's weights as PyTorch and timm keep them, and timm's freezing."""

import copy

import pytest
import torch
from oracle import assert_close, relative_error
from small_networks import ResNet, counted, fused_and_eager, images, nodes, pairs, step
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import resfused

PLACES, PAIRS = 11, 3


def by_pytorch(model, timm):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    return average, average.update_parameters


def by_timm(model, timm):
    average = timm.utils.ModelEmaV3(model, decay=0.7)
    return average, average.update


@pytest.mark.parametrize("keep", [by_pytorch, by_timm])
@pytest.mark.parametrize("what", ["the model", "the average"])
def test_averages(keep, what, timm, device):
    """Of a fused model, or fused themselves; in evaluation, and with fresh statistics."""
    fused, eager = fused_and_eager(ResNet(), device)
    x = images(device)
    found = []
    for model, fuses in ((fused if what == "the model" else copy.deepcopy(eager), True), (eager, False)):
        average, update = keep(model, timm)
        if fuses and what == "the average":
            assert not resfused.fuse_(average).left
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            step(model, x)
            optimizer.step()
            update(model)
        with counted() as ran:
            averaged = step(average.eval(), x)
        assert ran == [PLACES * fuses, PLACES * fuses, PAIRS * fuses]
        assert relative_error(averaged["output"], model.eval()(x)) > 1e-3
        with counted() as ran:
            update_bn([x, x + 1], average)
        assert ran == [2 * PLACES * fuses, 0, 0]
        found.append(averaged | average.state_dict() | {f"fresh {name}": b for name, b in average.named_buffers()})
    assert_close(*found, 1e-9)


FROZEN = ["conv1", "bn1", "layer1"]
IN_FROZEN = 1 + 3 + 2
"""Norms: of the stem, of the projecting block and of the other."""


def ran_alike(fused, eager, x):
    """The nodes and the pairs of a training step."""
    assert_close(step(fused, x), step(eager, x), 1e-9)
    return nodes(fused, x), pairs(copy.deepcopy(fused), x)


def test_freezing_by_timm(timm, device):
    """Norms become frozen ones, and these new norms: fused all the time, before fuse_ is called again and after."""
    fused, eager = fused_and_eager(ResNet(), device)
    x = images(device)
    assert ran_alike(fused, eager, x) == (PLACES, PAIRS)
    for model in (fused, eager):
        timm.utils.freeze(model, FROZEN)
    assert ran_alike(fused, eager, x) == (PLACES, PAIRS)
    unfrozen = copy.deepcopy((fused, eager))
    for model in unfrozen:
        timm.utils.unfreeze(model)
    assert ran_alike(*unfrozen, x) == (PLACES, PAIRS)
    report = resfused.fuse_(fused)
    assert not report.left
    assert sum(len(entry.norms) for entry in report.fused if entry.frozen) == IN_FROZEN
    assert report.check(fused, x).places == (PLACES, PLACES)
    assert ran_alike(fused, eager, x) == (PLACES, PAIRS)
    for model in (fused, eager):
        timm.utils.unfreeze(model)
    assert ran_alike(fused, eager, x) == (PLACES, PAIRS)
    assert not resfused.fuse_(fused).left
    assert ran_alike(fused, eager, x) == (PLACES, PAIRS)


def test_freezing_parameters_by_timm(timm, device):
    """Without the statistics everything stays fused, and only the gradients that are wanted come."""
    fused, eager = fused_and_eager(ResNet(), device)
    for model in (fused, eager):
        timm.utils.freeze(model, FROZEN, include_bn_running_stats=False)
    assert ran_alike(fused, eager, images(device)) == (PLACES, PAIRS)
    assert fused.layer1[0].bn1.weight.grad is None
    assert fused.layer2[0].bn1.weight.grad is not None
