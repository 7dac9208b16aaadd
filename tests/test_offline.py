"""Every kernel compiles for GPUs that are not here, the shapes that specialise to one included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
from offline import compiling_for
import resfused.functional as fused
from resfused import kernels

kernels.INTERPRETED = True  # lets CPU tensors through to launches that compile and run nothing
names = set()
with compiling_for({capability}) as compiled:
    for dtype in (torch.bfloat16, torch.float64):
        for shape in ((2, 64, 8, 8), (2, 3, 5, 1), (4, 1), (2, 1, 3, 3)):
            for training in (True, False):
                x, r = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(2))
                vectors = [torch.zeros(shape[1], dtype=torch.promote_types(dtype, torch.float32)) for _ in range(8)]
                fused.batch_norm_add_relu(x, r, *vectors[:4], training).sum().backward()
                fused.batch_norm_add_batch_norm_relu(x, r, *vectors, training).sum().backward()
print(len(compiled), *sorted({{k.name for k in compiled}}))
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles(capability, tmp_path):
    root = Path(__file__).parent.parent
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{root}:{root / 'benchmarks'}", "TRITON_CACHE_DIR": str(tmp_path)}
    code = CODE.format(capability=capability)
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    count, *names = result.stdout.split()
    assert int(count) > 60
    assert names == [
        "_apply_kernel", "_merge_statistics_kernel", "_merge_sums_kernel", "_normalise_kernel", "_reduce_kernel",
        "_statistics_kernel",
    ]  # fmt: skip
