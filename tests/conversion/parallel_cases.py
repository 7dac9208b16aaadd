"""What each of several processes runs for test_fuse_parallel.py: fused models in PyTorch's data parallelism."""

import copy
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from oracle import assert_close, relative_error
from small_networks import activations, backward, chain, fused_and_eager, kernels, state, step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import resfused

CPU = torch.device("cpu")
RECOMPUTED = 3
"""Of the chain's four outputs: nobody keeps the last."""


def run(rank, processes, store):
    """Every case in turn; the first that fails raises, and all processes are ended."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=timedelta(seconds=60)
    )
    try:
        for case in CASES:
            case()
    finally:
        dist.destroy_process_group()


def own(x):
    """Of each process its own values."""
    return x + 0.1 * (dist.get_rank() + 1) * x.cos()


def averaged(results):
    """A single process's results, with the gradients of parameters averaged over all."""
    for name, tensor in results.items():
        if name.startswith("gradient of ") and name != "gradient of the input":
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
    return results


def counted_step(model, x):
    """The results of a step, how many fused nodes it had, and how many of them were given two gradients to add."""
    with (
        mock.patch.object(kernels, "forward", wraps=kernels.forward) as forwards,
        mock.patch.object(kernels, "backward", wraps=kernels.backward) as backwards,
    ):
        results = step(model, x)
    return results, forwards.call_count, sum(call.args[1] is not None for call in backwards.call_args_list)


def ddp(recompute=False):
    """Two steps, of which the second begins with the statistics of the first process."""
    fused, eager = fused_and_eager(chain(), CPU, recompute=recompute)
    single = copy.deepcopy(eager)
    fused, eager = DistributedDataParallel(fused), DistributedDataParallel(eager)
    x = own(activations(CPU))
    actual, nodes, pairs = counted_step(fused, x)
    assert (nodes, pairs) == (4, 1)
    assert_close(actual, averaged(step(single, x)), 1e-9)
    assert_close(actual, step(eager, x), 1e-9)
    assert_close(step(fused, x), step(eager, x), 1e-9)


def ddp_recomputing():
    with mock.patch.object(kernels, "normalise", wraps=kernels.normalise) as counted:
        ddp(recompute=True)
    assert counted.call_count == 2 * RECOMPUTED


def synchronised_recomputing():
    """The statistics of all processes, of which the last phase makes the outputs again."""
    eager = fused_and_eager(chain(), CPU)[1]
    x = own(activations(CPU))
    results = []
    for recompute in (True, False):
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(eager))
        resfused.fuse_(model, recompute=recompute)
        with mock.patch.object(kernels, "normalise", wraps=kernels.normalise) as counted:
            results.append(step(model, x))
        # They are the last phase of the forward too, which is the fused one's in a single process.
        forwards = 0 if dist.get_world_size() == 1 else 4
        assert counted.call_count == forwards + (RECOMPUTED if recompute else 0)
    assert_close(*results, 0.0)
    if dist.get_world_size() == 1:
        assert_close(results[0], step(eager, x), 1e-9)


def ddp_accumulates():
    fused, eager = (
        DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True)
        for model in fused_and_eager(chain(), CPU)
    )
    x = own(activations(CPU))
    for model in (fused, eager):
        with model.no_sync():
            backward(model(x))
        backward(model(x + 1))
    assert_close(state(fused), state(eager), 1e-9)


def ddp_compiled():
    fused, eager = map(DistributedDataParallel, fused_and_eager(chain(), CPU))
    x = own(activations(CPU))
    assert_close(step(torch.compile(fused, backend="aot_eager"), x), step(eager, x), 1e-9)


def sharded(fuse_first, recompute=False):
    """Blocks and the root sharded: fused inside the blocks, which are handed no pairs, as they have FSDP's hooks."""
    fused, eager = fused_and_eager(chain(), CPU, recompute=recompute)
    if not fuse_first:
        resfused.unfuse_(fused)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (fused.layer1[0], fused.layer2[0], fused):
        fully_shard(module, mesh=mesh)
    if not fuse_first:
        resfused.fuse_(fused)
    x = own(activations(CPU))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (fused, eager)]
    for _ in range(2):
        actual, nodes, pairs = counted_step(fused, x)
        assert (nodes, pairs) == (4, 0)
        actual = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in actual.items()}
        assert_close(actual, averaged(step(eager, x)), 1e-9)
        for optimizer in optimizers:
            optimizer.step()
    fused.eval()
    eager.eval()
    with torch.no_grad():
        assert relative_error(fused(x), eager(x)) < 1e-9


def fused_then_sharded():
    sharded(fuse_first=True)


def sharded_then_fused():
    sharded(fuse_first=False)


def sharded_recomputing():
    """What keeps an output wants it when the parameters that it was made with are gathered no more."""
    with mock.patch.object(kernels, "normalise", wraps=kernels.normalise) as counted:
        sharded(fuse_first=True, recompute=True)
    assert counted.call_count == 2 * RECOMPUTED


CASES = (
    ddp, ddp_recomputing, synchronised_recomputing, ddp_accumulates, ddp_compiled,
    fused_then_sharded, sharded_then_fused, sharded_recomputing,
)  # fmt: skip
