"""The kernels in C++: large shapes, any mixture of dtypes, threads, the phases alone, agreement with Triton's."""

from dataclasses import replace

import pytest
import torch
from oracle import FORMS, LAYOUTS, PARAMETERS, assert_close, pre_activation, problem, relative_error, run
from resfused.kernels import cpu
from resfused.kernels.activation import RELU
from resfused.kernels.cpu import functions

import resfused
from resfused import functional, reference
from resfused.operator import phases

CPU = torch.device("cpu")
# Planes in one part, in pieces and several to a part; rows in one part and many, and to the last of a pack.
LARGE = [(16, 64, 28, 28), (3, 5, 130, 101), (32, 256, 7, 7), (6, 24, 64, 64), (4097, 24), (70, 2048), (2, 3, 300, 401)]


@pytest.fixture(autouse=True)
def native(_reproducible, monkeypatch):
    """The backend in force, and the list of what went to the library."""
    ran = []
    run_record = functions._run

    def counted(function, record):
        ran.append(function.__name__)
        run_record(function, record)

    monkeypatch.setattr(functions, "_run", counted)
    with resfused.use_backend("native"):
        yield ran


def with_clear_signs(p, width=1e-4):
    """No gradient where z is so near to zero that its rounding may decide the sign."""
    return replace(p, dy=p.dy.where(pre_activation(p).abs() > width, 0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_values_of_many_elements(form, layout, shape, native):
    for training in (True, False):
        p = with_clear_signs(problem(form, shape, torch.float32, CPU, training=training, layout=layout))
        assert_close(run(functional, p), run(reference, p, torch.float64), 5e-6)
    assert native == ["resfused_forward", "resfused_backward"] * 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 64, 28, 28), (32, 40, 7, 7), (5000, 30)], ids=str)
def test_same_bits_whatever_the_threads(form, layout, shape):
    """Also with both gradients of a forked output, which channels_last writes early and contiguous late."""
    for dtype in (torch.float32, torch.bfloat16):
        p = problem(form, shape, dtype, CPU, layout=layout)
        found = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            found.append(run(functional, p) | forked_gradients(p))
        for other in found[1:]:
            assert all(torch.equal(other[name], found[0][name]) for name in found[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 130, 101), (32, 48, 7, 7), (70, 72, 3, 8)], ids=str)
def test_stores_past_the_caches(layout, shape, monkeypatch):
    """As of tensors larger than these: planes and rows on lines and off them."""
    monkeypatch.setattr(functions, "_caches", lambda: (2**18, 0))
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 2e-2)):
        p = with_clear_signs(problem(FORMS[2], shape, dtype, CPU, layout=layout), 1e-4 if dtype.itemsize > 2 else 1e-2)
        assert_close(run(functional, p), run(reference, p, torch.float64), tolerance)


def forked_gradients(p):
    """What the backward kernels make of dy as the sum of two halves."""
    names = ("input", "residual", *PARAMETERS)
    norms, x, residual, mask, stats = forward(p)
    wanted = cpu.Gradients(*(n in p.tensors for n in names))
    kept = residual if norms[1] else None
    dtype = None if residual is None else residual.dtype
    found = cpu.backward(p.dy * 0.25, p.dy * 0.75, cpu.Kept(x, None, kept, dtype, mask, stats, *norms), wanted)
    return {f"forked {n}": g for n, g in zip(names, found, strict=True) if g is not None}


def forward(p, training=True):
    """The norms, input, residual, mask and statistics of a call of the kernels alone."""
    t = {n: v.clone() if "running" in n else v for n, v in p.tensors.items()}

    def norm(prefix):
        vectors = [t[f"{prefix}{n}"] for n in ("weight", "bias", "running_mean", "running_var")]
        return cpu.Norm(*vectors, 0.1, 1e-3)

    norms = norm(""), norm("residual_") if "residual_weight" in t else None
    masked = "residual" in t and norms[1] is None
    _, mask, stats = cpu.forward(t["input"], t.get("residual"), *norms, training, masked)
    return norms, t["input"], t.get("residual"), mask, stats


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 20, 9, 7), (8, 40, 40, 30)], ids=str)
def test_pairs_of_gradients_are_added(form, layout, shape):
    torch.set_num_threads(2)
    p = problem(form, shape, torch.float64, CPU, layout=layout)
    whole = forked_gradients(replace(p, dy=p.dy * 4 / 3).with_())
    names = ("input", "residual", *PARAMETERS)
    norms, x, residual, mask, stats = forward(p)
    wanted = cpu.Gradients(*(n in p.tensors for n in names))
    kept = residual if norms[1] else None
    dtype = None if residual is None else residual.dtype
    one = cpu.backward(p.dy * 4 / 3, None, cpu.Kept(x, None, kept, dtype, mask, stats, *norms), wanted)
    assert_close(whole, {f"forked {n}": g for n, g in zip(names, one, strict=True) if g is not None}, 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_agreement_with_triton(form, layout, dtype):
    """Two implementations that share no code, to the rounding of the results; planes by columns among them."""
    for shape in ((2, 17, 5, 3), (33, 2, 3, 3), (9, 8)):
        p = problem(form, shape, dtype, CPU, layout=layout)
        p = with_clear_signs(p, 1e-4)
        ours = run(functional, p)
        with resfused.use_backend("triton"):
            theirs = run(functional, p)
        unit = torch.finfo(dtype).eps
        assert_close(
            ours, theirs, max(unit, 16 * unit if dtype.itemsize > 2 else 0, 4e-7 if dtype.itemsize == 4 else 0)
        )


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("of_input", DTYPES, ids=str)
@pytest.mark.parametrize("of_residual", DTYPES, ids=str)
def test_any_two_dtypes(layout, form, of_input, of_residual):
    """As exact as the narrowest of what a result was made of; its dtype is eager's."""
    p = problem(form, (3, 21, 5, 7), torch.float64, CPU, layout=layout)
    y = torch.promote_types(of_input, of_residual)

    def own(name, tensor):
        dtype = of_residual if name.startswith("residual") else of_input
        narrow = dtype.itemsize == 2 and tensor.dim() == 1
        return tensor.to(torch.float32 if narrow else dtype)

    p = replace(p, tensors={n: own(n, t) for n, t in p.tensors.items()}, dy=p.dy.to(y))
    p = with_clear_signs(p)
    ours, eager, exact = run(functional, p), run(reference, p), run(reference, p, torch.float64)
    wide = torch.float64 in (of_input, of_residual)
    for name in exact:
        assert ours[name].dtype == eager[name].dtype, name
        limit = max(torch.finfo(ours[name].dtype).eps, 1e-14 if wide else 2e-6)
        assert relative_error(ours[name], exact[name]) <= limit, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even(dtype):
    """Every value of two bytes through norm + ReLU that changes nothing, and sums that lie half way between two."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    channels = every.shape[1]
    neutral = torch.zeros(channels), torch.ones(channels)
    y = functional.batch_norm_relu(every, *neutral, training=False, eps=0.0)
    assert torch.equal(y.nan_to_num(7), every.relu().nan_to_num(7))
    halves = torch.randn(1, 4096).abs() + 1
    step = torch.finfo(dtype).eps / 2
    between = (halves / step).floor() * step + torch.randint(-2, 3, halves.shape) * step * 2**-8
    neutral = torch.zeros(4096), torch.ones(4096)
    x = torch.zeros(1, 4096, dtype=dtype)
    # The bias carries float32 into the sum, and what leaves is rounded.
    y = functional.batch_norm_relu(x, *neutral, None, between[0].contiguous(), training=False, eps=0.0)
    assert torch.equal(y, between.to(dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_phases_alone(form, layout, dtype):
    """What statistics over several processes are made of, each against plain PyTorch in float64."""
    for shape in ((3, 21, 5, 7), (8, 24, 30, 40)):
        p = with_clear_signs(problem(form, shape, dtype, CPU, layout=layout))
        tolerance = 1e-12 if dtype is torch.float64 else 5e-6
        x, residual, t = p.tensors["input"], p.tensors.get("residual"), p.tensors
        two = form == FORMS[2]
        affine = (t["weight"], t["bias"], two, t.get("residual_weight"), t.get("residual_bias"), *RELU)
        wide = [v.double() if isinstance(v, torch.Tensor) else v for v in affine]

        def double(v):
            return None if v is None else v.double()

        local = cpu.local_statistics(x, residual, two)
        exact = phases.local_statistics(double(x), double(residual), two)
        assert_close({"local": local}, {"local": exact}, tolerance)
        values = x.numel() // x.shape[1]
        stats = torch.stack(
            [r for i in range(0, len(exact), 2) for r in (exact[i], (exact[i + 1] / values + 0.1).rsqrt())]
        )
        own = stats.to(dtype)
        norms = (
            cpu.Norm(*affine[:2], None, None, 0.0, 0.0),
            cpu.Norm(*affine[3:5], None, None, 0.0, 0.0) if two else None,
        )
        y, mask = cpu.normalise(x, residual, own, *norms, residual is not None and not two)
        exact_y, on = phases.normalise(double(x), double(residual), stats, *wide, True)
        assert_close({"y": y}, {"y": exact_y}, tolerance)
        if mask is not None:
            assert not ((cpu.unpack_mask(mask, x) != on) & (exact_y > 1e-4)).any()
            assert not (cpu.unpack_mask(mask, x) & (y == 0)).any()
        second = residual if two else None
        given = None if residual is None or two else residual.dtype
        kept = cpu.Kept(x, None, second, given, mask, own, *norms)
        dy = p.dy.where(on & (exact_y.abs() > 1e-4), 0)
        for fork in (None, dy):
            wanted = [form == FORMS[1], True, True, two, two]
            sums, gradients = cpu.local_sums(dy, fork, kept, cpu.Gradients(False, *wanted))
            arguments = (double(dy), double(fork), double(x), double(second), given, on, stats)
            exact_sums, *rest = phases.local_sums(*arguments, *wide, wanted)
            found = [g for g in gradients if g is not None]
            names = [str(i) for i in range(len(rest))]
            assert_close({"sums": sums}, {"sums": exact_sums}, tolerance)
            assert_close(dict(zip(names, found, strict=True)), dict(zip(names, rest, strict=True)), tolerance)
            means = exact_sums / values
            for dz in (None, gradients.residual):
                pair = cpu.input_gradients(dy, fork, dz, kept, means.to(dtype), (True, two))
                exact_pair = phases.input_gradients(
                    double(dy), double(fork), None, double(x), double(second), on, stats, means, *wide, (True, two)
                )
                found = [g for g in pair if g is not None]
                names = [str(i) for i in range(len(exact_pair))]
                assert_close(dict(zip(names, found, strict=True)), dict(zip(names, exact_pair, strict=True)), tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_and_alone_agree(form, native):
    """In one graph, forward and backward, with the operators of the dispatcher."""
    torch._dynamo.reset()
    p = problem(form, (4, 8, 6, 5), torch.float64, CPU)
    names = [n for n in ("input", "residual", *PARAMETERS) if n in p.tensors]

    def call(t):
        return torch.cat([v.flatten() for v in torch.autograd.grad((step(p, t) * p.dy).sum(), [t[n] for n in names])])

    def step(p, t):
        from oracle import call as of_form

        return of_form(functional, p, t)

    def leaves():
        return {n: v.clone().requires_grad_(n in names) for n, v in p.tensors.items()}

    alone = call(leaves())
    ran = len(native)
    compiled = torch.compile(lambda t: step(p, t), fullgraph=True, backend="aot_eager")
    t = leaves()
    found = torch.autograd.grad((compiled(t) * p.dy).sum(), [t[n] for n in names])
    torch.testing.assert_close(torch.cat([v.flatten() for v in found]), alone, rtol=1e-12, atol=1e-12)
    assert len(native) == ran + 2


def test_a_mask_of_other_kernels_is_refused():
    """33 images of 3x3: Triton's masks go by columns."""
    p = problem(FORMS[1], (33, 2, 3, 3), torch.float32, CPU)
    leaf = p.tensors["input"].requires_grad_()
    y = functional.batch_norm_add_relu(leaf, p.tensors["residual"], None, None, training=True)
    with resfused.use_backend("triton"), pytest.raises(RuntimeError, match="backend was changed between"):
        y.sum().backward()


def test_empty_batches_take_plain_operators(native):
    assert functional.batch_norm_relu(torch.ones(0, 3), None, None, training=True).shape == (0, 3)
    assert not native
