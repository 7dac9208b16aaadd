"""Modules with the calls and the documented meaning of the rivals' own, in plain PyTorch and float64.

What the real ones read by address, whatever its strides, is asserted to lie as they read it.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def statistics(x: Tensor, channel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of each channel, in float64."""
    rows = x.double().movedim(channel, -1).flatten(0, -2)
    mean = rows.mean(0)
    squares = (rows - mean).square().sum(0)
    return mean, squares / len(rows), squares / (len(rows) - 1)


def batch_norm_backward(
    dz: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; channels last in every argument."""
    rows = tuple(range(x.dim() - 1))
    normalised = (x - mean) * rstd
    dbias, dweight = dz.sum(rows), (dz * normalised).sum(rows)
    count = x[..., 0].numel()
    return weight * rstd * (dz - dbias / count - normalised * dweight / count), dweight, dbias


# --- nvidia-cudnn-frontend: a graph is recorded, then executed node by node ---

DTYPES = {"HALF": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT": torch.float32, "BOOLEAN": torch.bool}
# The sequences of nodes that cuDNN 9.19 and 9.28 have plans for on compute capability 9.0.
PATTERNS = {
    ("batchnorm", "relu"),
    ("batchnorm", "add", "relu", "cmp_gt"),
    ("batchnorm_inference", "relu_backward", "batchnorm_backward"),
    ("mul", "batchnorm_backward"),
}
STEPS = ["validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"]


class NotSupported(Exception):  # noqa: N818
    """cudnn.cudnnGraphNotSupportedError"""


class GraphTensor:
    def __init__(self, dim=None, stride=None, data_type=None, by_value=False):
        self.dim, self.stride, self.data_type, self.by_value = dim, stride, data_type, by_value
        self.bound = dim is not None

    def set_output(self, value):
        self.bound = value
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self

    def read(self, buffer: Tensor) -> Tensor:
        """Channels last and in float64."""
        self.check(buffer)
        if self.by_value:
            return buffer.double().reshape(())
        return buffer.double().movedim(1, -1) if buffer.dim() == 4 else buffer.double()

    def check(self, buffer: Tensor) -> None:
        assert buffer.dtype == DTYPES[self.data_type]
        assert not buffer.requires_grad
        if self.dim is not None and not self.by_value:
            assert buffer.numel() == torch.Size(self.dim).numel()
            if buffer.dim() == 4:
                assert [*buffer.shape] == self.dim
                assert all(s == t for s, t, n in zip(buffer.stride(), self.stride, self.dim, strict=True) if n > 1)
        if not self.by_value and buffer.dim() == 4:
            assert buffer.is_contiguous(memory_format=torch.channels_last)


class Graph:
    """cudnn.pygraph"""

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert intermediate_data_type == compute_data_type == "FLOAT"
        self.handle, self.nodes, self.steps, self.inputs, self.outputs = handle, [], [], [], []

    def tensor(self, name, dim, stride, data_type, is_pass_by_value=False):
        self.inputs.append(GraphTensor(dim, stride, data_type, is_pass_by_value))
        return self.inputs[-1]

    def node(self, kind, function, inputs, outputs):
        out = [GraphTensor() for _ in range(outputs)]
        self.outputs += out
        self.nodes.append((kind, function, inputs, out))
        return out if outputs > 1 else out[0]

    def batchnorm(self, input, scale, bias, in_running_mean, in_running_var, epsilon, momentum, name=""):
        def run(x, weight, bias, running_mean, running_var, eps, momentum):
            mean, biased, unbiased = statistics(x, -1)
            rstd = (biased + eps).rsqrt()
            new = [(1 - momentum) * r + momentum * s for r, s in ((running_mean, mean), (running_var, unbiased))]
            return (x - mean) * rstd * weight + bias, mean, rstd, *new

        return self.node("batchnorm", run, (input, scale, bias, in_running_mean, in_running_var, epsilon, momentum), 5)

    def batchnorm_inference(self, input, mean, inv_variance, scale, bias, name=""):
        def run(x, mean, rstd, weight, bias):
            return ((x - mean) * rstd * weight + bias,)

        return self.node("batchnorm_inference", run, (input, mean, inv_variance, scale, bias), 1)

    def batchnorm_backward(self, grad, input, scale, mean, inv_variance, name=""):
        return self.node("batchnorm_backward", batch_norm_backward, (grad, input, scale, mean, inv_variance), 3)

    def add(self, a, b, name=""):
        return self.node("add", lambda a, b: (a + b,), (a, b), 1)

    def mul(self, a, b, name=""):
        return self.node("mul", lambda a, b: (a * b,), (a, b), 1)

    def relu(self, input, name=""):
        return self.node("relu", lambda z: (z.clamp(min=0),), (input,), 1)

    def relu_backward(self, loss, input, name=""):
        return self.node("relu_backward", lambda dy, z: (dy * (z > 0),), (loss, input), 1)

    def cmp_gt(self, input, comparison, name=""):
        assert input is self.nodes[-1][3][0], "cuDNN has plans for a mask of relu's output only"
        return self.node("cmp_gt", lambda y, other: (y > other,), (input, comparison), 1)

    def validate(self):
        self.steps.append("validate")

    def build_operation_graph(self):
        self.steps.append("build_operation_graph")

    def create_execution_plans(self, modes):
        self.steps.append("create_execution_plans")
        assert modes == ["A", "FALLBACK"]
        if tuple(kind for kind, *_ in self.nodes) not in PATTERNS:
            raise NotSupported("No valid engine configs")

    def check_support(self):
        self.steps.append("check_support")

    def build_plans(self):
        self.steps.append("build_plans")

    def get_workspace_size(self):
        assert self.steps == STEPS
        return 48

    def execute(self, pack, workspace, handle):
        assert self.steps == STEPS
        assert handle is self.handle
        assert workspace.numel() == 48
        assert workspace.dtype == torch.uint8
        outputs = [t for t in self.outputs if t.bound]
        assert set(pack) == {*self.inputs, *outputs}, "a buffer too many or too few"
        values = {t: t.read(pack[t]) for t in self.inputs}
        for _, function, inputs, made in self.nodes:
            values.update(zip(made, function(*map(values.__getitem__, inputs)), strict=True))
        for t in outputs:
            t.check(pack[t])
            pack[t].copy_(values[t].movedim(-1, 1) if values[t].dim() == 4 else values[t])


def cudnn() -> ModuleType:
    module = ModuleType("cudnn")
    module.data_type = SimpleNamespace(**{name: name for name in DTYPES})
    module.heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
    module.cudnnGraphNotSupportedError = NotSupported
    module.graphs, module.streams = [], []

    def pygraph(**options):
        module.graphs.append(Graph(**options))
        return module.graphs[-1]

    module.pygraph = pygraph
    module.create_handle = object
    module.set_stream = lambda handle, stream: module.streams.append(stream)
    module.backend_version = lambda: 91900
    return module


# --- apex.contrib.groupbn ---


class BatchNormNHWC(torch.autograd.Function):
    """apex's bn_NHWC_impl and bn_addrelu_NHWC_impl: the batch's statistics stay in the module's vectors."""

    @staticmethod
    def forward(ctx, x, z, weight, bias, running_mean, running_var, mean, rstd, momentum, eps, training):
        for t in (x, *([] if z is None else [z])):
            assert t.dtype == torch.float16
            assert t.is_contiguous()
        for v in (weight, bias, running_mean, running_var):
            assert v.dtype == torch.float32
        if training:
            batch_mean, biased, unbiased = statistics(x, -1)
            mean.copy_(batch_mean)
            rstd.copy_((biased + eps).rsqrt())
            running_mean.copy_((1 - momentum) * running_mean.double() + momentum * batch_mean)
            running_var.copy_((1 - momentum) * running_var.double() + momentum * unbiased)
        used = (mean, rstd) if training else (running_mean, (running_var + eps).rsqrt())
        sum = (x.double() - used[0]) * used[1] * weight + bias + (0 if z is None else z.double())
        ctx.save_for_backward(x, weight)
        ctx.mask, ctx.module_vectors, ctx.add = sum > 0, (mean, rstd), z is not None
        return sum.clamp(min=0).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        assert dy.is_contiguous(), "read by address"
        x, weight = ctx.saved_tensors
        dz = dy.double() * ctx.mask
        dx, dweight, dbias = batch_norm_backward(dz, x.double(), weight.double(), *ctx.module_vectors)
        dresidual = dz.to(x.dtype) if ctx.add else None
        return dx.to(x.dtype), dresidual, dweight.float(), dbias.float(), *[None] * 7


class BatchNorm2d_NHWC(_BatchNorm):  # noqa: N801
    made = 0

    def __init__(self, num_features, fuse_relu=False, bn_group=1):
        super().__init__(num_features)
        assert bn_group == 1
        self.fuse_relu = fuse_relu
        self.minibatch_mean, self.minibatch_riv = torch.empty(num_features), torch.empty(num_features)
        BatchNorm2d_NHWC.made += 1

    def forward(self, x, z=None):
        assert self.fuse_relu
        assert x.shape[3] == self.num_features
        return BatchNormNHWC.apply(
            x, z, self.weight, self.bias, self.running_mean, self.running_var,
            self.minibatch_mean, self.minibatch_riv, self.momentum, self.eps, self.training,
        )  # fmt: skip


def groupbn() -> ModuleType:
    module = ModuleType("apex.contrib.groupbn")
    module.BatchNorm2d_NHWC = BatchNorm2d_NHWC
    return module


# --- attorch.batch_norm_layer ---


class BatchNormAutoGrad:
    @staticmethod
    def apply(
        input, training, weight=None, bias=None, running_mean=None, running_var=None, momentum=0.1, eps=1e-5,
        track_running_stats=True, pre_act_add=None, act_func=None,
    ):  # fmt: skip
        assert act_func == "relu"
        assert input.is_contiguous()
        mean, biased, unbiased = statistics(input, 1)
        if training and track_running_stats:
            running_mean.copy_(((1 - momentum) * running_mean + momentum * mean).detach())
            running_var.copy_(((1 - momentum) * running_var + momentum * unbiased).detach())
        used = (mean, biased) if training else (running_mean, running_var)
        mean, var, weight, bias = (v[:, None, None] for v in (*used, weight, bias))
        sum = (input.double() - mean) * (var + eps).rsqrt() * weight + bias
        return (sum if pre_act_add is None else sum + pre_act_add).relu().to(input.dtype)


def attorch_batch_norm_layer() -> ModuleType:
    module = ModuleType("attorch.batch_norm_layer")
    module.BatchNormAutoGrad = BatchNormAutoGrad
    return module
