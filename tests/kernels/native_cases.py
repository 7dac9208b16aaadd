"""A covering set of problems on the kernels in C++, for a process with a library of its own; prints "whole" at its end.

``python native_cases.py FLAG...``: further flags of the compiler.
"""

import sys
from dataclasses import replace
from itertools import product

import torch
from activation_cases import EVERY, WANTED, check, check_points, clear_of_kinks, exists, hardsigmoid, ours
from oracle import FORMS, LAYOUTS, assert_close, problem, run
from resfused.kernels.cpu import build
from smooth_digits import assert_accurate
from test_native import forked_gradients, with_clear_signs

import resfused
from resfused import functional, reference

SHAPES = [(2, 1), (33, 3), (5, 130), (3, 37, 5, 5), (2, 16, 3, 8), (5, 3, 7, 7), (2, 3, 50, 90), (300, 20)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}

build.FLAGS = (*build.FLAGS, *sys.argv[1:])
# Those for any activation have every access.
build.library_of = lambda activation, kind: build.Library(build.ANY, kind)
torch.manual_seed(0)
torch.set_num_threads(2)
resfused.set_backend("native")
case = 0
for shape in SHAPES:
    for layout in LAYOUTS:
        for form in FORMS:
            for dtype, tolerance in TOLERANCE.items():
                case += 1
                # Pairwise: every other dtype, training twice as often as not.
                if (case + case // 4) % 2:
                    continue
                training = case % 3 > 0
                p = problem(form, shape, dtype, torch.device("cpu"), training=training, layout=layout)
                if dtype.itemsize == 2 and form == FORMS[1] and case % 4 < 2:
                    # A mixture of dtypes.
                    p = p.with_(residual=p.tensors["residual"].float())
                p = with_clear_signs(p, 1e-2 if dtype.itemsize == 2 else 1e-4)
                assert resfused.backend_for(p.tensors["input"]) == "native"
                y = torch.promote_types(dtype, p.tensors.get("residual", p.dy).dtype)
                p.__dict__["dy"] = p.dy.to(y)
                assert_close(run(functional, p), run(reference, p, torch.float64), tolerance)
                forked_gradients(p)
reference._FUNCTIONS["hardsigmoid"] = hardsigmoid
wanted = [each for name, each in WANTED.items() if exists(FORMS[2], name)]
for number, (activation, form) in enumerate(product(EVERY, FORMS)):
    dtype, layout = list(TOLERANCE)[number % 4], LAYOUTS[number // 3 % 2]
    p = problem(form, SHAPES[number % 7], dtype, torch.device("cpu"), training=number % 5 < 3, layout=layout)
    p = clear_of_kinks(replace(p, activation=activation, wanted=("bias", *wanted[number % len(wanted)])))
    check(p, ours(p, forked=number % 5 == 0))
for activation, dtype in product(EVERY, (torch.float32, torch.float64)):
    if activation.name != "relu":
        check_points(activation, dtype, float("inf"), False, FORMS[0], torch.device("cpu"))
assert_accurate()
print("whole")
