"""cuDNN's own fused BatchNorm: graphs for its runtime-fusion engines, through the package ``nvidia-cudnn-frontend``.

In cuDNN's documentation the engines are BnAddRelu and DReluForkDBn. The graphs, each one kernel:

- norm+relu, forward: batchnorm, relu. Backward: batchnorm_inference of x with the batch's statistics, relu_backward,
  batchnorm_backward: no mask is kept, the sign is recomputed.
- norm+add+relu, forward: batchnorm, add, relu, and y > 0 as a mask. Backward: the output's gradient times the mask,
  which is the residual's gradient, then batchnorm_backward.

Activations are channels_last in float16, bfloat16 or float32; statistics, vectors and arithmetic are float32. The saved
``rstd`` is of the biased variance; that ``running_var`` gets the unbiased one is what tests on a GPU hold cuDNN to. The
mask has one byte an element of memory, as in NVIDIA's Python samples, of which its C++ samples give cuDNN one bit. What
it compares with, a whole tensor there, is a zero by value.

A plan is built at the first call of a shape, cuDNN's first choice by its heuristics, and kept; momentum and eps are
passed by value at every execution. Work goes to the current stream, the workspace comes from torch's allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rivals.library import Call, Library, Unsupported, imported

DATA_TYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}


@dataclass(frozen=True)
class PlanKey:
    """What a plan depends on."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    add: bool


@dataclass(frozen=True)
class Plan:
    """A built graph, and its tensors by the names that their buffers are bound under."""

    graph: Any
    tensors: dict[str, Any]
    workspace_bytes: int

    def execute(self, handle: Any, device: torch.device, **buffers: Tensor | None) -> None:
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        bound = {tensor: buffers[name] for name, tensor in self.tensors.items()}
        self.graph.execute(bound, workspace, handle=handle)


class Builder:
    """A graph under construction; whatever is not virtual has a name."""

    def __init__(self, cudnn: Any, handle: Any, key: PlanKey) -> None:
        self.cudnn = cudnn
        self.key = key
        self.dtype = getattr(cudnn.data_type, DATA_TYPES[key.dtype])
        self.float = cudnn.data_type.FLOAT
        self.graph = cudnn.pygraph(
            io_data_type=self.dtype, intermediate_data_type=self.float, compute_data_type=self.float, handle=handle
        )
        self.tensors: dict[str, Any] = {}

    def activation(self, name: str) -> Any:
        return self._activation(name, self.dtype)

    def mask(self, name: str) -> Any:
        return self._activation(name, self.cudnn.data_type.BOOLEAN)

    def _activation(self, name: str, data_type: Any) -> Any:
        n, c, h, w = self.key.shape
        return self._input(name, [n, c, h, w], [h * w * c, 1, w * c, c], data_type)

    def vector(self, name: str) -> Any:
        c = self.key.shape[1]
        return self._input(name, [1, c, 1, 1], [c, 1, c, c], self.float)

    def scalar(self, name: str) -> Any:
        return self._input(name, [1, 1, 1, 1], [1, 1, 1, 1], self.float, is_pass_by_value=True)

    def _input(self, name: str, dim: list[int], stride: list[int], data_type: Any, **options: Any) -> Any:
        self.tensors[name] = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=data_type, **options)
        return self.tensors[name]

    def output(self, name: str, tensor: Any, data_type: Any) -> None:
        tensor.set_output(True).set_data_type(data_type)
        self.tensors[name] = tensor

    def build(self) -> Plan:
        """``Unsupported``, with cuDNN's message, where no engine takes the graph."""
        modes = self.cudnn.heur_mode
        try:
            self.graph.validate()
            self.graph.build_operation_graph()
            self.graph.create_execution_plans([modes.A, modes.FALLBACK])
            self.graph.check_support()
            self.graph.build_plans()
        except self.cudnn.cudnnGraphNotSupportedError as error:
            said = " ".join(str(error).split())[:300]
            raise Unsupported(f"cuDNN {self.cudnn.backend_version()} has no engine for {self.key}: {said}") from None
        return Plan(self.graph, self.tensors, self.graph.get_workspace_size())


def forward_plan(builder: Builder) -> Plan:
    """y, running statistics, and what the backward needs."""
    b, graph = builder, builder.graph
    normalised, mean, rstd, running_mean, running_var = graph.batchnorm(
        name="batch_norm",
        input=b.activation("input"),
        scale=b.vector("weight"),
        bias=b.vector("bias"),
        in_running_mean=b.vector("running_mean"),
        in_running_var=b.vector("running_var"),
        epsilon=b.scalar("eps"),
        momentum=b.scalar("momentum"),
    )
    b.output("mean", mean, b.float)
    b.output("rstd", rstd, b.float)
    b.output("new_running_mean", running_mean, b.float)
    b.output("new_running_var", running_var, b.float)
    z = graph.add(a=normalised, b=b.activation("residual"), name="add") if b.key.add else normalised
    y = graph.relu(input=z, name="relu")
    b.output("output", y, b.dtype)
    if b.key.add:
        # Taken of y: of z it finds no engine.
        mask = graph.cmp_gt(input=y, comparison=b.scalar("zero"), name="mask")
        b.output("mask", mask, b.cudnn.data_type.BOOLEAN)
    return b.build()


def backward_plan(builder: Builder) -> Plan:
    """The gradients of input, weight and bias, and of the residual where there is one."""
    b, graph = builder, builder.graph
    dy, x = b.activation("grad_output"), b.activation("input")
    weight, mean, rstd = b.vector("weight"), b.vector("mean"), b.vector("rstd")
    if b.key.add:
        dz = graph.mul(a=dy, b=b.mask("mask"), name="relu_backward")
        b.output("grad_residual", dz, b.dtype)
    else:
        z = graph.batchnorm_inference(
            input=x, mean=mean, inv_variance=rstd, scale=weight, bias=b.vector("bias"), name="recomputed"
        )
        dz = graph.relu_backward(loss=dy, input=z, name="relu_backward")
        dz.set_data_type(b.dtype)
    dx, dweight, dbias = graph.batchnorm_backward(
        grad=dz, input=x, scale=weight, mean=mean, inv_variance=rstd, name="batch_norm_backward"
    )
    b.output("grad_input", dx, b.dtype)
    b.output("grad_weight", dweight, b.float)
    b.output("grad_bias", dbias, b.float)
    return b.build()


class CudnnGraph(Library):
    """cuDNN's training graphs of norm+relu and norm+add+relu."""

    name = "cuDNN graph"
    # Loads of 16 bytes.
    dtypes: ClassVar[dict[torch.dtype, int]] = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}
    layout = torch.channels_last
    evaluates = False
    # The package's Python batchnorm takes no call without them, though its C++ does.
    needs_statistics = True

    def __init__(self) -> None:
        self.cudnn = imported("cudnn", "nvidia-cudnn-frontend")
        super().__init__()
        self._new_handle = cache(lambda device: self.cudnn.create_handle())
        self._plans: dict[tuple[Callable[[Builder], Plan], PlanKey], Plan] = {}

    def run(self, call: Call) -> Tensor:
        return _BatchNormReLU.apply(
            self, call.input, call.residual, call.weight, call.bias, call.running_mean, call.running_var,
            call.momentum, call.eps,
        )  # fmt: skip

    def execute(self, direction: Callable[[Builder], Plan], key: PlanKey, **buffers: Tensor | None) -> None:
        """Run the plan of ``forward_plan`` or ``backward_plan`` on the current stream."""
        with torch.cuda.device(key.device):
            handle = self._new_handle(key.device)
            self.cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(key.device).cuda_stream)
            plan = self._plans.get((direction, key))
            if plan is None:
                plan = self._plans[direction, key] = direction(Builder(self.cudnn, handle, key))
            plan.execute(handle, key.device, **buffers)


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        library: CudnnGraph,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        key = PlanKey(x.shape, x.dtype, x.device, residual is not None)
        y = torch.empty_like(x)
        mean, rstd = x.new_empty(2, x.shape[1], dtype=torch.float32)
        mask = torch.empty_like(x, dtype=torch.bool) if key.add else None
        # Executing exports its buffers, and torch exports none that require gradients.
        x, weight, bias = x.detach(), weight.detach(), bias.detach()
        library.execute(
            forward_plan, key, input=x, residual=None if residual is None else residual.detach(),
            weight=weight, bias=bias, running_mean=running_mean, running_var=running_var,
            momentum=_scalar(momentum), eps=_scalar(eps), zero=_scalar(0.0),
            output=y, mean=mean, rstd=rstd, mask=mask, new_running_mean=running_mean, new_running_var=running_var,
        )  # fmt: skip
        ctx.library, ctx.key = library, key
        ctx.save_for_backward(x, weight, bias, mean, rstd, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, mask = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dresidual = torch.empty_like(x) if ctx.key.add else None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        ctx.library.execute(
            backward_plan, ctx.key,
            grad_output=dy, input=x, weight=weight, bias=bias, mean=mean, rstd=rstd, mask=mask,
            grad_input=dx, grad_residual=dresidual, grad_weight=dweight, grad_bias=dbias,
        )  # fmt: skip
        return None, dx, dresidual, dweight, dbias, None, None, None, None


@cache
def _scalar(value: float) -> Tensor:
    """On the host, as cuDNN takes what is passed by value."""
    return torch.full((1, 1, 1, 1), value, dtype=torch.float32)
