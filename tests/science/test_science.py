"""The four experiments: exact facts, closed forms, fused training against the reference's, and the command."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from unittest import mock

import pytest
import run
import torch
import torch.nn.functional as F
from oracle import relative_error
from resfused.kernels import gpu as kernels
from science import agreement, figures, page, records, session
from science.agreement import TINY, Comparison, compare
from science.command import EXPERIMENTS
from science.experiments import degradation, shortcut_forms
from science.experiments.identity_initialisation import deviations, stack_of
from science.gradients import gradients, profile
from science.libraries import FUSED, LIBRARIES, REFERENCE
from science.network_passes import count_passes
from science.session import Source
from science.training import Recipe, accuracy, reordered, train
from torch import nn
from training.images import DIGITS, DataError
from workloads.networks import PlainBlock, cifar_plain, cifar_resnet

import resfused
from resfused import reference

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "science"
WIDTHS = (8, 8, 8)
DIGIT_IMAGES = Source(DIGITS, 8)


@pytest.mark.parametrize(("library", "blocks"), [(REFERENCE, 100), (FUSED, 3)])
def test_zero_last_norm_weights_are_the_identity(library, blocks, device):
    """Forwards relu(x), backwards dy where x > 0, to the bit and whatever the number of blocks."""
    stack = stack_of(LIBRARIES[library], blocks, 8, None, 0).to(device, torch.float64)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
    y = stack(x)
    assert torch.equal(y, x.relu())
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, torch.where(x > 0, dy, 0))
    if library == REFERENCE:
        found = deviations(stack, x.detach(), apart=10)
        assert (len(found.each), len(found.stack)) == (10, 100)
        assert not any(found.each + found.stack)


@pytest.mark.parametrize("library", LIBRARIES)
def test_small_last_norm_weights_deviate_in_proportion(library, device):
    """||w n where x > 0|| / ||x||, n being the branch's last norm before its weight: exact as w goes to zero."""
    x = torch.randn(4, 8, 4, 4, dtype=torch.float64, device=device)
    for weight in (1e-4, 1e-6):
        stack = stack_of(LIBRARIES[library], 1, 8, weight, 0).to(device, torch.float64)
        block = stack[0]
        hidden = F.batch_norm(F.conv2d(x, block.conv1.weight, padding=1), None, None, training=True).relu()
        n = F.batch_norm(F.conv2d(hidden, block.conv2.weight, padding=1), None, None, training=True)
        expected = float(weight * torch.where(x > 0, n, 0).norm() / x.norm())
        assert deviations(stack, x).each == pytest.approx([expected], rel=50 * weight)


def test_plain_networks_are_residual_ones_without_shortcuts():
    plain, residual = cifar_plain(20, 10, 1), cifar_resnet(20, 10, 1)
    shortcuts = sum(p.numel() for name, p in residual.named_parameters() if "shortcut" in name)
    assert shortcuts == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert sum(p.numel() for p in residual.parameters()) - shortcuts == sum(p.numel() for p in plain.parameters())
    plain.load_state_dict({k: v for k, v in residual.state_dict().items() if "shortcut" not in k})
    images = torch.randn(4, 1, 8, 8)
    x = residual[:4](images)
    assert not torch.equal(plain[:4](images), x)
    block = PlainBlock(16, 16)
    shortcut = torch.nn.Sequential(nn.Conv2d(16, 16, 1), nn.Identity())
    nn.init.zeros_(shortcut[0].weight)
    nn.init.zeros_(shortcut[0].bias)
    other = reference.ProjectionResidualBlock(16, 16, stride=1)
    other.shortcut = shortcut
    other.load_state_dict(block.state_dict(), strict=False)
    assert torch.equal(block(x), other(x))
    with pytest.raises(ValueError, match="6n \\+ 2"):
        cifar_plain(21)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_direct_term_is_dz(library, device):
    """dz = dy where y > 0, dy being the gradient at the next block's input; the rest comes through the branch."""
    network = cifar_resnet(8, 10, 1, widths=WIDTHS, blocks=LIBRARIES[library]).to(device, torch.float64)
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64, device=device)
    labels = torch.tensor([3, 7], device=device)
    found = gradients(network, images, labels)
    inputs = [network[:3](images).detach()]  # of each block, and what the last one gives
    for block in network[3:6]:
        inputs.append(block(inputs[-1]).detach())
    ends = inputs[1:]
    for i in range(2):
        dz = torch.where(ends[i] > 0, found.whole[i + 1], 0)
        assert torch.equal(found.direct[i], dz)
    for i, block in enumerate(network[3:6]):
        assert relative_error(found.direct[i] + found.branch[i], found.whole[i]) < 1e-14
        # J_F^T dz by autograd through the branch alone, before the ReLU.
        x = inputs[i].requires_grad_()
        dz = found.direct[i]
        z = F.batch_norm(F.conv2d(x, block.conv1.weight, padding=1), None, None, training=True).relu()
        z = F.batch_norm(F.conv2d(z, block.conv2.weight, padding=1), None, None, training=True)
        assert relative_error(found.branch[i], torch.autograd.grad(z, x, dz)[0]) < 1e-9
    alone = gradients(network, images, labels, detach_branches=True)
    passed = alone.direct[2]
    for i in (1, 0):
        passed = torch.where(ends[i] > 0, passed, 0)
        assert torch.equal(alone.whole[i], passed)


def test_profiles():
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    plain = profile(cifar_plain(8, 10, 1, widths=WIDTHS), images, labels)
    assert (len(plain.whole), plain.direct, plain.branch, plain.shortcuts_only) == (3, [], [], [])
    network = cifar_resnet(8, 10, 1, widths=WIDTHS)
    x = network[:3](images).detach().requires_grad_()
    (dx,) = torch.autograd.grad(F.cross_entropy(network[3:](x), labels), x)
    found = profile(network, images, labels)
    assert found.whole[0] == pytest.approx(float(dx.norm()), rel=1e-5)
    assert len(found.direct) == len(found.branch) == len(found.shortcuts_only) == 3
    assert not any(block.conv1._forward_pre_hooks for block in network[3:6])


def test_passes_of_a_small_network():
    """By hand, from the table of the README: every activation of these has the same size."""
    network = cifar_resnet(8, 10, 1, widths=WIDTHS)
    found = count_passes(network, torch.zeros(1, 8, 8))
    # The stem and two of three tails feed a fork.
    assert found.eager == pytest.approx((4 * 13 + 3 * 16 + 3 * 3) / 7)
    assert found.fused == pytest.approx((4 * 8 + 3 * 10.125 + 2 + 2 * 1) / 7)
    assert found.places == {"norm+relu": 4, "norm+add+relu": 3}


def test_the_recipe():
    recipe = Recipe(1, 8, 0.8, warm_up=3)
    rates = [recipe.rate(step, 16) for step in (0, 1, 2, 3, 7, 8, 11, 12, 15)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.08, 0.08, 0.008, 0.008])


def test_training_error_is_that_of_the_batches(device):
    """With a rate of zero a network stays as it is: the errors are those of a plain loop over the same images."""
    images = DIGIT_IMAGES.load(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(device)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    curve = train(network, images, Recipe(2, 512, 0.0, weight_decay=0.0), device, torch.float32)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    expected = []
    for epoch in range(2):
        batches = list(images.training_batches(0, 1, epoch, 512, 0))
        wrong = sum(int((network(x.to(device)).argmax(1).cpu() != y).sum()) for x, y in batches)
        expected.append(wrong / 1024)
    assert curve.errors == pytest.approx(expected)
    assert len(curve.losses) == 4
    rows = [images.validation[i] for i in range(len(images.validation))]
    x, labels = torch.stack([row[0] for row in rows]).to(device), torch.tensor([int(row[1]) for row in rows])
    right = float((network(x).argmax(1).cpu() == labels).float().mean())
    assert accuracy(network, images, device, torch.float32, 64) == pytest.approx(right)
    with pytest.raises(DataError, match="2000"):
        train(network, images, Recipe(1, 2000, 0.1), device, torch.float32)


def test_reordering_keeps_every_image():
    order = reordered(1)
    indices = torch.arange(16)
    first, second = order(indices), order(indices)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, indices)


def comparison(form, device):
    make = [partial(shortcut_forms.build, form, 1, 8, 0, library) for library in LIBRARIES]
    recipe = Recipe(1, 8, 0.1, warm_up=1, steps=2)
    return Comparison(form, *make, recipe, DIGIT_IMAGES, device, torch.float64)


@pytest.mark.parametrize("form", shortcut_forms.FORMS)
def test_fused_training_is_the_reference_training(form, device):
    found = compare(comparison(form, device))
    assert found.within
    # Rounding of numbers near 2, by a few steps of training; and the losses are not all the same.
    assert found.difference[-1] < 1e-12
    assert len(set(found.fused)) == 2
    assert len(found.reference) == 1 + agreement.SHUFFLED_RUNS


def test_agreement_of_known_curves():
    reference_runs = [[1.0, 2.0, 3.0], [1.0, 2.5, 2.75], [1.0, 2.0, 3.5]]
    found = agreement.Agreement("", "float32", 1, "", reference_runs, [1.0, 2.5, 2.5], 0.0, 0.0)
    assert found.spread == [0.0, 0.5, 0.75]
    assert found.difference == [0.0, 0.5, 0.5]
    assert found.nearest == [0.0, 0.0, 0.25]
    assert found.within
    assert not replace(found, fused=[1.0, 2.0, 4.5]).within
    assert replace(found, fused=[1.0, 2.0, 4.25 + 2**-23]).within
    assert not replace(found, fused=[1.0, 2.0, 4.25 + 2**-20]).within


def test_a_wrong_direct_term_is_seen(device, monkeypatch):
    backward = kernels.backward

    def shrunk(*args):
        found = backward(*args)
        return found._replace(residual=None if found.residual is None else found.residual * (1 - 1e-9))

    monkeypatch.setattr(kernels, "backward", shrunk)
    assert not compare(comparison(shortcut_forms.IDENTITY, device)).within


def test_forms_of_a_seed_share_their_branches():
    images = DIGIT_IMAGES.load(0)
    networks = [shortcut_forms.build(form, 2, 16, 0, REFERENCE, images) for form in shortcut_forms.FORMS]
    states = [{k: v for k, v in n.state_dict().items() if ".shortcut" not in k or k.startswith("1.")} for n in networks]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], value) for key, value in states[0].items())
    for form, network in zip(shortcut_forms.FORMS, networks, strict=True):
        fused = shortcut_forms.build(form, 2, 16, 0, FUSED, images)
        assert isinstance(fused, resfused.Sequential)
        state = network.state_dict()
        assert fused.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in fused.state_dict().items())


@pytest.mark.interpreter
def test_the_command(tmp_path):
    arguments = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "science", "--short", "--processes", "1"]
    result = subprocess.run([*arguments, "--output", "made/here"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "plain operators" in result.stdout
    assert "OUTSIDE" not in result.stdout
    for name in EXPERIMENTS:
        content = records.read(tmp_path / "made" / "here", name)
        assert content["environment"]["torch"] == torch.__version__
        assert content["wall_seconds"] > 0
        assert all(len(a["fused"]) == TINY.steps for a in content["agreements"])
    for name in (*EXPERIMENTS, agreement.SAME_TRAINING):
        assert (tmp_path / "made" / "here" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def command(*options):
    return run.main(["science", *options])


def test_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = "--data must be DIGITS or a folder"
    monkeypatch.setattr(session, "load_images", mock.Mock(side_effect=DataError(message)))
    (tmp_path / "degradation.png").mkdir()
    for options, said in (
        (["slides"], "EXPERIMENT: must be one of degradation, "),
        (["--output", ".", "degradation"], "must be a file, but degradation.png is a folder"),
        (["--short", "--processes", "1", "degradation"], message),
    ):
        with pytest.raises(SystemExit, match="2"):
            command(*options)
        out, err = capsys.readouterr()
        assert out == ""
        assert said in err
    assert not list(tmp_path.glob("results/science/*"))


def test_the_page_has_the_numbers_of_the_results(tmp_path):
    copied = Path(shutil.copy(page.PAGE, tmp_path))
    page.write(EXPERIMENTS, RESULTS, copied)
    assert copied.read_text() == page.PAGE.read_text()
    content = json.loads((RESULTS / "degradation.json").read_text())
    errors = [run["errors"][-1] for run in content["runs"] if (run["network"], run["variant"]) == ("plain-56", FUSED)]
    assert ", ".join(f"{error:.2%}" for error in errors) in copied.read_text()
    assert degradation.final_errors(content, "plain-56") == errors


@pytest.mark.parametrize("name", [*EXPERIMENTS, agreement.SAME_TRAINING])
def test_no_label_leaves_its_axes_or_meets_another(name, monkeypatch):
    """Of the figures of the committed results; titles and what stands at an axis are outside anyway."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, *_: drawn.append(figure))
    contents = records.read_all(RESULTS, EXPERIMENTS)
    if name in EXPERIMENTS:
        EXPERIMENTS[name].draw(contents[name], RESULTS)
    else:
        agreement.draw(contents, RESULTS)
    (figure,) = drawn
    figure.draw_without_rendering()
    labels = 0
    for axes in figure.axes:
        texts = [*axes.texts, *([axes.get_legend()] if axes.get_legend() else [])]
        extents = [text.get_window_extent() for text in texts]
        labels += len(extents)
        x0, y0, x1, y1 = axes.get_window_extent().extents
        for extent in extents:
            assert x0 <= extent.x0
            assert y0 <= extent.y0
            assert extent.x1 <= x1
            assert extent.y1 <= y1
        assert not any(a.overlaps(b) for a, b in combinations(extents, 2))
    assert labels
    figures.plt.close(figure)


def test_a_difference_is_clear_where_no_seeds_overlap():
    def content(*accuracies):
        pairs = zip(shortcut_forms.FORMS, accuracies, strict=True)
        runs = [{"form": f, "blocks": FUSED, "accuracy": a} for f, each in pairs for a in each]
        return {"runs": runs, "fused_curves_on": "", "full_length_difference": {}}

    linear, projection = shortcut_forms.findings(content([0.5, 0.75], [0.75, 1.0], [0.875, 1.0]))
    assert "Linear projection against identity: no clear difference" in linear
    assert "+25.00% on average (+25.00% to +25.00%)" in linear
    assert "Projection with norm against identity: a clear difference" in projection


def test_a_page_without_markers_is_refused():
    assert page.between("a <!-- x -->old<!-- end of x --> b", "x", "new") == "a <!-- x -->\nnew\n<!-- end of x --> b"
    with pytest.raises(ValueError, match="<!-- x -->"):
        page.between("a", "x", "new")
