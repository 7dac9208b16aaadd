"""What each of several processes runs for test_synchronised.py: every case against plain PyTorch on the whole batch.

``python synchronised_cases.py RANK PROCESSES STORE``. Its assertions come after a case's last collective, so that one
that fails leaves the processes in step; the traceback of each goes to stderr, and the exit status is 1.
"""

import copy
import sys
import traceback
from collections import Counter
from contextlib import nullcontext
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from oracle import FORMS, in_layout, relative_error
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from workloads.interpreter import speed_up

import resfused
from resfused import reference
from resfused.norms import forked_tail

TOLERANCE = 1e-9
CHANNELS = 5
# Images of each process.
EVEN = {2: (2, 2), 3: (2, 2, 2)}
UNEVEN = {2: (3, 1), 3: (2, 4, 1)}
FIRST_EMPTY = {2: (0, 3), 3: (0, 2, 3)}
LAST_EMPTY = {2: (2, 0), 3: (3, 1, 0)}
COLLECTIVES = ("_allgather_base_", "allreduce_")
ONE_EACH = {2: (1, 1), 3: (1, 1, 1)}


class Collectives(TorchDispatchMode):
    """Counts what goes to ``torch.distributed``, by operator."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        return func(*args, **kwargs or {})


class Dropped(torch.autograd.Function):
    """The identity, whose gradient is none at all."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def batch_norms(count, **settings):
    """Norms with numbers of their own, random parameters and running statistics, the same in every process."""
    norms = [
        nn.BatchNorm2d(
            CHANNELS, **{"momentum": 0.3 + 0.2 * i, "eps": 0.1 + 0.1 * i, "dtype": torch.float64, **settings}
        )
        for i in range(count)
    ]
    with torch.no_grad():
        for norm in norms:
            for t in (*norm.parameters(), *(b for b in norm.buffers() if b.dim())):
                t.copy_(torch.rand_like(t) + 0.5)
    return norms


def check(
    form,
    sizes=UNEVEN,
    *,
    layout="contiguous",
    spatial=(4, 3),
    ranks=None,
    forked=False,
    uses=(0, 1),
    training=True,
    wanted=("input", "residual", "parameters"),
    compiler=None,
    no_gradient_in=None,
    collectives=COLLECTIVES,
    dtype=torch.float64,
    steps=1,
    **settings,
):
    """Ours over the processes against BatchNorm, addition and ReLU over the whole batch in this one, in float64."""
    processes = dist.get_world_size() if ranks is None else len(ranks)
    group = None if ranks is None else dist.new_group(ranks)
    if ranks is not None and dist.get_rank() not in ranks:
        return None
    place = dist.get_rank(group) if processes > 1 else 0
    sizes = sizes.get(processes, (3,))
    mine = slice(sum(sizes[:place]), sum(sizes[: place + 1]))
    vectors = torch.promote_types(dtype, torch.float32)
    norms = batch_norms(1 + (form == FORMS[2]), dtype=vectors, **settings)
    ours = [nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(n), group).train(training) for n in norms]
    expected_norms = [n.double().train(training) for n in norms]

    def ours_of(x, r):
        return forked_tail(ours[0], x, r, ours[1] if len(ours) > 1 else None, forked=forked)

    call = ours_of if compiler is None else torch.compile(ours_of, fullgraph=True, backend=compiler)
    errors = {}
    worst = {torch.float64: TOLERANCE, torch.bfloat16: 2**-7}[dtype]
    for _ in range(steps):

        def random(shift):
            whole = torch.randn(sum(sizes), CHANNELS, *spatial, dtype=torch.float64) + shift
            return in_layout(whole.to(dtype), layout)

        whole = [random(3.0), *([random(0.0)] if form != FORMS[0] else [])]
        names = ("input", "residual")
        leaves = [in_layout(t[mine].clone(), layout) for t in whole]
        expected_leaves = [t.double() for t in whole]
        for name, *pair in zip(names, leaves, expected_leaves, strict=False):
            for t in pair:
                t.requires_grad_(name in wanted)
        for norm in (*ours, *expected_norms):
            norm.requires_grad_("parameters" in wanted)
        # torch.compile takes no dispatch mode.
        with Collectives() if compiler is None else nullcontext() as counted:
            pair = call(*leaves, *[None] * (2 - len(leaves)))
            assert pair[0].dtype == dtype
            assert not forked or compiler is not None or pair[0] is not pair[1]
            dys = [in_layout(torch.randn_like(expected_leaves[0]).to(dtype), layout) for _ in pair]
            expected = expected_norms[0](expected_leaves[0])
            if form == FORMS[1]:
                expected = expected + expected_leaves[1]
            elif form == FORMS[2]:
                expected = expected + expected_norms[1](expected_leaves[1])
            expected = expected.relu()
            kept = torch.ones_like(expected)
            if no_gradient_in is not None:
                kept[sum(sizes[:no_gradient_in]) : sum(sizes[: no_gradient_in + 1])] = 0
            expected.backward(sum(dys[i].double() for i in uses) * kept)
            outputs = [pair[i] if no_gradient_in != place else Dropped.apply(pair[i]) for i in uses]
            torch.autograd.backward(outputs, [dys[i][mine] for i in uses])
        if compiler is None:
            errors["collectives"] = 0.0 if counted.calls == Counter(collectives) else dict(counted.calls)
        errors["output"] = relative_error(pair[0], expected[mine])
        for name, leaf, whole_leaf in zip(names, leaves, expected_leaves, strict=False):
            if name in wanted:
                gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                errors[f"gradient of {name}"] = relative_error(gradient, whole_leaf.grad[mine])
        for i, (norm, expected_norm) in enumerate(zip(ours, expected_norms, strict=True)):
            for (name, p), q in zip(norm.named_parameters(), expected_norm.parameters(), strict=True):
                if "parameters" in wanted:
                    total = p.grad.double()
                    if processes > 1:
                        dist.all_reduce(total, group=group)
                    errors[f"gradient of {name} {i}"] = relative_error(total, q.grad)
                    p.grad = q.grad = None
            for name, buffer in expected_norm.named_buffers():
                errors[f"{name} {i}"] = relative_error(norm.get_buffer(name), buffer)
    wrong = {name: error for name, error in errors.items() if not isinstance(error, float) or not error <= worst}
    assert not wrong, f"over {worst}: {wrong}"
    return max(errors.values())


def all_processes_empty():
    (norm,) = batch_norms(1)
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        resfused.tail(norm, torch.empty(0, CHANNELS, 4, 3, dtype=torch.float64))
    # As in torch.nn.SyncBatchNorm, the call has been counted by then.
    assert all(torch.equal(v, before[n]) for n, v in norm.state_dict().items() if n != "num_batches_tracked")


def second_derivative():
    (norm,) = batch_norms(1)
    x = torch.randn(2, CHANNELS, 4, 3, dtype=torch.float64, requires_grad=True)
    y = resfused.tail(nn.SyncBatchNorm.convert_sync_batchnorm(norm), x)
    with pytest.raises(RuntimeError, match="second derivatives of synchronised statistics are not supported"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def beside_a_norm_that_is_not_synchronised():
    """Not one node: the residual's norm takes this process's statistics."""
    norm, residual_norm = batch_norms(2)
    x, r = torch.randn(2, dist.get_world_size() * 2, CHANNELS, 4, 3, dtype=torch.float64)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(norm))
    expected = (norm(x)[mine] + copy.deepcopy(residual_norm)(r[mine])).relu()
    assert relative_error(resfused.tail(ours, x[mine], r[mine], residual_norm), expected) < TOLERANCE


def modules_of_this_package():
    """Converted by ours, the ReLU kept, and trained."""
    ours = nn.ModuleList([resfused.BatchNormReLU2d(CHANNELS), resfused.BatchNormAddReLU2d(CHANNELS)]).double()
    plain = copy.deepcopy(ours)
    first, second = resfused.convert_sync_batchnorm(ours)
    x = torch.randn(2 * dist.get_world_size(), CHANNELS, 4, 3, dtype=torch.float64)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    with Collectives() as counted:
        y = second(first(x[mine]), x[mine])
    expected = [nn.BatchNorm2d(CHANNELS, dtype=torch.float64) for _ in plain]
    z = (expected[1](expected[0](x).relu()) + x).relu()
    assert relative_error(y, z[mine]) < TOLERANCE
    assert counted.calls == {"_allgather_base_": 2}


def own_blocks():
    return resfused.Sequential(resfused.ProjectionResidualBlock(3, 4), resfused.ResidualBlock(4))


def plain_blocks():
    return nn.Sequential(reference.ProjectionResidualBlock(3, 4), reference.ResidualBlock(4))


def own_converted():
    return nn.SyncBatchNorm.convert_sync_batchnorm(own_blocks())


def converted_then_fused():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(plain_blocks())
    assert len(resfused.fuse_(model).norms) == 5
    return model


def fused_then_converted():
    model = plain_blocks()
    assert len(resfused.fuse_(model).norms) == 5
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def data_parallel_training(synchronised):
    """Three steps of a chain of two blocks against one process with the whole batch."""
    expected = plain_blocks().double()
    ours = synchronised().double()
    ours.load_state_dict(expected.state_dict())
    sizes = UNEVEN[dist.get_world_size()]
    mine = slice(sum(sizes[: dist.get_rank()]), sum(sizes[: dist.get_rank() + 1]))
    # PyTorch refuses its SyncBatchNorm on the CPU, where its own forward cannot run.
    with mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"):
        parallel = DistributedDataParallel(ours)
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9) for model in (parallel, expected)]
    for _ in range(3):
        x = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64)
        target = torch.randn(sum(sizes), 4, 3, 3, dtype=torch.float64)
        for optimiser in optimisers:
            optimiser.zero_grad()
        with Collectives() as counted:
            y = parallel(x[mine])
        # A node with one norm or two: four nodes, of which one has two.
        assert counted.calls["_allgather_base_"] == 4
        # The gradients of the processes are averaged.
        ((y - target[mine]).square().sum() * len(sizes) / sum(sizes)).backward()
        ((expected(x) - target).square().sum() / sum(sizes)).backward()
        for optimiser in optimisers:
            optimiser.step()
    errors = {name: relative_error(ours.state_dict()[name], value) for name, value in expected.state_dict().items()}
    assert max(errors.values()) < TOLERANCE, errors
    return max(errors.values())


def cases(processes):
    """(name, function and its arguments)"""
    norm, add, two = FORMS
    for form in FORMS:
        yield f"{form}, uneven", check, form
        yield (
            f"{form}, channels_last, even, forked",
            lambda form=form: check(form, EVEN, layout="channels_last", forked=True, steps=2),
        )
        yield f"{form}, first process empty", check, form, FIRST_EMPTY
        yield f"{form}, last process empty, forked", lambda form=form: check(form, LAST_EMPTY, forked=True)
        yield (
            f"{form}, group of some processes",
            lambda form=form: check(
                form, ranks=[0, 2] if processes == 3 else [1], collectives=COLLECTIVES if processes == 3 else ()
            ),
        )
        yield f"{form}, frozen", lambda form=form: check(form, training=False, collectives=())
        yield f"{form}, bfloat16", lambda form=form: check(form, dtype=torch.bfloat16, forked=True)
    yield "one value in each process", lambda: check(norm, ONE_EACH, spatial=(1, 1))
    yield "second use only", lambda: check(add, forked=True, uses=(1,))
    yield "no gradient in one process", lambda: check(two, no_gradient_in=0)
    yield "parameters' gradients only", lambda: check(two, wanted=("parameters",), collectives=COLLECTIVES[:1])
    yield "residual's gradient only", lambda: check(two, wanted=("residual",))
    yield (
        "residual's gradient only, no norm",
        lambda: check(add, wanted=("residual",), collectives=COLLECTIVES[:1]),
    )
    yield "input's gradient only", lambda: check(add, wanted=("input",))
    yield "cumulative average", lambda: check(two, steps=3, momentum=None)
    yield "no running statistics", lambda: check(two, track_running_stats=False)
    yield "not affine", lambda: check(two, affine=False, wanted=("input", "residual"))
    # A graph calls the same operators on either kind of kernels.
    for compiler in ("eager", "aot_eager") if resfused.get_backend() != "triton" else ():
        yield f"compiled, {compiler}", lambda compiler=compiler: check(two, forked=True, compiler=compiler, steps=2)
    for function in (
        all_processes_empty, second_derivative, beside_a_norm_that_is_not_synchronised, modules_of_this_package
    ):  # fmt: skip
        yield function.__name__, function
    for synchronised in (own_converted, converted_then_fused, fused_then_converted):
        yield f"training, {synchronised.__name__}", data_parallel_training, synchronised


def main(rank, processes, store):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=timedelta(seconds=30)
    )
    failed = False
    for name, function, *arguments in cases(processes):
        torch.manual_seed(0)
        try:
            error = function(*arguments)
        except AssertionError:
            failed = True
            print(f"--- process {rank}, {name}\n{traceback.format_exc()}", file=sys.stderr)
        except BaseException:
            print(f"--- process {rank}, {name}", file=sys.stderr)
            raise
        else:
            print(f"{name}: {error}")
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    speed_up()
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
