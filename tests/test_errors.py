"""Bad input: PyTorch's exception types, a message that names the argument, and nothing changed before."""

from dataclasses import replace

import pytest
import torch
from oracle import FORMS, STATISTICS, call, problem

import resfused.functional as fused
from resfused import reference

BAD_VECTORS = {
    "weight size": ("weight", torch.ones(4), RuntimeError, "weight must have 5 elements.*got shape \\(4,\\)"),
    "bias size": ("bias", torch.ones(1), RuntimeError, "bias must have 5 elements"),
    "running_mean size": ("running_mean", torch.ones(6), RuntimeError, "running_mean must have 5 elements"),
    "running_var size": ("running_var", torch.ones(6), RuntimeError, "running_var must have 5 elements"),
    "weight dtype": ("weight", torch.ones(5).double(), RuntimeError, "weight must have dtype torch.float32.*float64"),
    "bias dtype": ("bias", torch.ones(5).half(), RuntimeError, "bias must have dtype torch.float32"),
    "running_var dtype": ("running_var", torch.ones(5).double(), RuntimeError, "running_var must have dtype"),
    "weight device": ("weight", torch.ones(5, device="meta"), RuntimeError, "weight must be on the device.*meta"),
    "only running_var": ("running_mean", None, ValueError, "running_mean and (residual_)?running_var must be given"),
    "running_mean gradient": ("running_mean", torch.ones(5).requires_grad_(), RuntimeError, "running_mean must not"),
}


def refused(p, error, message):
    """The call fails as it should and leaves the running statistics as they were."""
    stats = {n: t for n, t in p.tensors.items() if n in STATISTICS and t is not None and t.device.type != "meta"}
    before = {n: t.detach().clone() for n, t in stats.items()}
    with pytest.raises(error, match=message):
        call(fused, p, p.tensors)
    for name, tensor in stats.items():
        assert torch.equal(tensor, before[name]), name


def moved(tensor, device):
    return tensor if tensor is None or tensor.device.type == "meta" else tensor.detach().to(device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BAD_VECTORS)
@pytest.mark.parametrize("prefix", ["", "residual_"])
def test_vectors(form, case, prefix, device):
    name, bad, error, message = BAD_VECTORS[case]
    if prefix and form != FORMS[2]:
        pytest.skip("this form has one norm")
    on_device = moved(bad, device)
    if bad is not None and bad.requires_grad:
        on_device.requires_grad_()
    p = problem(form, (4, 5, 3, 3), torch.float32, device).with_(**{prefix + name: on_device})
    refused(p, error, prefix + message)
    if bad is not None and bad.requires_grad and device.type == "cpu":
        return
    with pytest.raises(error):
        call(reference, p, p.tensors)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.ones(4, 5, 3, 2), RuntimeError, "residual must have the shape of input, \\(4, 5, 3, 3\\)"),
        (torch.ones(1, 5, 3, 3), RuntimeError, "residual must have the shape of input"),
        (torch.ones(4, 5, 3, 3, dtype=torch.int64), NotImplementedError, "residual must be of a floating dtype"),
        (torch.ones(4, 5, 3, 3, device="meta"), RuntimeError, "residual must be on the device of input"),
        (None, TypeError, "residual must be a Tensor, but got NoneType"),
    ],
    ids=["shape", "broadcast", "integer", "device", "none"],
)
def test_residual(form, residual, error, message, device):
    p = problem(form, (4, 5, 3, 3), torch.float32, device)
    refused(p.with_(residual=moved(residual, device)), error, message)


@pytest.mark.parametrize(
    ("input", "error", "message"),
    [
        (torch.ones(4, 5, dtype=torch.int32), NotImplementedError, "input must be of a floating dtype.*int32"),
        (torch.ones(4, 5, dtype=torch.complex64), NotImplementedError, "input must be of a floating dtype"),
        (torch.ones(5), IndexError, "input must have at least 2 dimensions"),
        (torch.tensor(1.0), IndexError, "input must have at least 2 dimensions"),
        (torch.ones(1, 5), ValueError, "more than one value per channel in training.*\\(1, 5\\)"),
        (torch.ones(1, 5, 1, 1), ValueError, "more than one value per channel in training"),
        ([1.0], TypeError, "input must be a Tensor, but got list"),
    ],
    ids=["integer", "complex", "vector", "scalar", "one value", "one pixel", "list"],
)
def test_input(input, error, message, device):
    input = moved(input, device) if isinstance(input, torch.Tensor) else input
    with pytest.raises(error, match=message):
        fused.batch_norm_relu(input, None, None, training=True)
    with pytest.raises(error):
        reference.F.batch_norm(input, None, None) if error is TypeError else reference.batch_norm_relu(
            input, None, None, training=True
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("training", "eps", "message"), [(True, 0.0, "eps must be positive"), (True, -1.0, "eps must be positive"),
                                     (False, -1e-3, "eps must not be negative")],
)  # fmt: skip
def test_eps(form, training, eps, message, device):
    p = problem(form, (4, 5, 3, 3), torch.float32, device, training=training)
    refused(replace(p, numbers={"eps": eps, "momentum": 0.1}), ValueError, message)


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_statistics_are_needed_without_training(missing, device):
    p = problem(FORMS[0], (4, 5, 3, 3), torch.float32, device, training=False).with_(**{missing: None})
    refused(p, RuntimeError, f"{missing} must be given in evaluation mode")
    with pytest.raises(RuntimeError):
        call(reference, p, p.tensors)
