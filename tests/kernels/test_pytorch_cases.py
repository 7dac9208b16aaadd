"""PyTorch's own BatchNorm cases, followed by the ReLU and by the addition and the ReLU: all equal to eager."""

import pytest
import torch
from oracle import relative_error

import resfused
from resfused import functional, reference

modules = pytest.importorskip("torch.testing._internal.common_modules", reason="PyTorch's test helpers do not import")
methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")

INFOS = {info.module_cls.__name__: info for info in modules.module_db if "BatchNorm" in info.name}
BATCH_NORM = next(op for op in methods.op_db if op.name == "nn.functional.batch_norm")


def cases(function, info, device, training):
    return function(info, device=device, dtype=torch.float64, requires_grad=True, training=training)


def arguments(module_input):
    made = module_input.constructor_input
    return made.args, {"dtype": torch.float64, **made.kwargs}


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add+relu"])
def test_module_inputs(name, training, residual, device):
    info = INFOS[name]
    fused = getattr(resfused, name.replace("BatchNorm", "BatchNormAddReLU" if residual else "BatchNormReLU"))
    inputs = cases(info.module_inputs_func, info, device, training)
    assert inputs
    for case in inputs:
        args, kwargs = arguments(case)
        eager, ours = info.module_cls(*args, **kwargs).to(device), fused(*args, **kwargs).to(device)
        ours.load_state_dict(eager.state_dict())
        (x,) = case.forward_input.args
        r = torch.randn_like(x)
        results = []
        for module in (ours.train(training), eager.train(training)):
            leaf, residual_leaf = x.detach().clone().requires_grad_(), r.clone().requires_grad_()
            if module is ours:
                y = module(leaf, residual_leaf) if residual else module(leaf)
            else:
                y = (module(leaf) + (residual_leaf if residual else 0)).relu()
            y.backward(torch.ones_like(y).cumsum(0))
            results.append([y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        for a, b in zip(*results, strict=True):
            assert relative_error(a, b) < 1e-10, case.desc


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add+relu"])
def test_module_error_inputs(name, residual, device):
    info = INFOS[name]
    fused = getattr(resfused, name.replace("BatchNorm", "BatchNormAddReLU" if residual else "BatchNormReLU"))
    errors = cases(info.module_error_inputs_func, info, device, True)
    assert errors
    for case in errors:
        args, kwargs = arguments(case.module_error_input)
        module = fused(*args, **kwargs).to(device)
        (x,) = case.module_error_input.forward_input.args
        with pytest.raises(case.error_type, match=case.error_regex):
            module(*([x, x] if residual else [x]))


@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add+relu"])
def test_functional_samples(residual, device):
    samples = list(BATCH_NORM.sample_inputs(device, torch.float64, requires_grad=True))
    assert samples
    for sample in samples:
        results = []
        for implementation in (functional, reference):
            x = sample.input.detach().clone().requires_grad_()
            r = torch.ones_like(x).cumsum(0).sub(1.5).requires_grad_()
            mean, var, *parameters = (None if t is None else t.detach().clone() for t in sample.args)
            parameters = [None if t is None else t.requires_grad_() for t in parameters]
            if residual:
                y = implementation.batch_norm_add_relu(x, r, mean, var, *parameters, **sample.kwargs)
            else:
                y = implementation.batch_norm_relu(x, mean, var, *parameters, **sample.kwargs)
            y.backward(torch.ones_like(y).cumsum(0))
            results.append([y, x.grad, mean, var, *(None if t is None else t.grad for t in parameters)])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            assert a is None or relative_error(a, b) < 1e-10, sample
