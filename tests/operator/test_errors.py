"""Bad input: PyTorch's exception types, a message that says what is wrong, nothing changed before. One table of calls.

What PyTorch takes, ours takes with equal numbers, or refuses with a reason.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import FORMS, relative_error
from torch import Tensor, nn

import resfused
from resfused import functional

FUNCTIONS = dict(
    zip(
        FORMS,
        (functional.batch_norm_relu, functional.batch_norm_add_relu, functional.batch_norm_add_batch_norm_relu),
        strict=True,
    )
)
STATISTICS = ("running_mean", "running_var")
VECTORS = (*STATISTICS, "weight", "bias")
SHAPE = (4, 5, 3, 3)
ACCEPTED = ""

NO_TENSORS = {
    "int": 1,
    "float": 1.0,
    "list": [1.0] * 5,
    "ndarray": np.ones(5, np.float32),
    "str": "ones",
    "Size": torch.Size([5]),
}
NO_NUMBERS = {
    "NoneType": None,
    "str": "0.1",
    "list": [0.1],
    "complex": 1j,
    "ndarray": np.ones(2),
    "Tensor": torch.ones(2),
}


class Row(NamedTuple):
    """One call: of a function (by its form), a module (``"BatchNorm..."``) or of ``tail``.

    ``changes``: the arguments or attributes that differ from a good call's; ``message``: what the error says in this
    order, none where the call is accepted; ``stricter``: its type where PyTorch takes the call.
    """

    name: str
    subject: str
    changes: dict[str, Any]
    message: tuple[str, ...]
    stricter: type[Exception] | None = None


def vectors() -> Iterator[Row]:
    forms, modes = cycle(FORMS), cycle((True, False, False))
    for prefix in ("", "residual_"):
        for name in VECTORS:
            bad: list[tuple[Any, tuple[str, ...]]] = [
                *((value, ("must be a Tensor", f"got {kind}")) for kind, value in NO_TENSORS.items()),
                (torch.ones(4), ("must have 5 elements", "got shape (4,)")),
                (torch.ones(1), ("must have 5 elements", "got shape (1,)")),
                (torch.ones(5).double(), ("must have dtype torch.float32", "got torch.float64")),
                (torch.ones(5).half(), ("must have dtype torch.float32", "got torch.float16")),
                (torch.ones(5).long(), ("must have dtype torch.float32", "got torch.int64")),
                (torch.ones(5, device="meta"), ("must be on the device of input", "got meta")),
            ]
            if name in STATISTICS:
                bad.append((torch.ones(5).requires_grad_(), ("must not require a gradient",)))
            for value, message in bad:
                form = FORMS[2] if prefix else next(forms)
                changes = {prefix + name: value, "training": next(modes)}
                yield Row(f"{prefix}{name} {message[-1]}", form, changes, (prefix + name, *message))


def vectors_in_float64() -> Iterator[Row]:
    """Each norm's vectors are held against what that norm is given."""
    wide = {name: torch.ones(5).double() for name in VECTORS}
    second = {f"residual_{name}": vector for name, vector in wide.items()}
    x = torch.randn(SHAPE).double()
    for name in VECTORS:
        message = ("must have dtype torch.float64", "got torch.float32")
        first = {"input": x, **wide, name: torch.ones(5)}
        yield Row(f"input in float64, {name} in float32", FORMS[0], first, (name, *message))
        other = {"residual": x, **second, f"residual_{name}": torch.ones(5)}
        yield Row(f"residual in float64, its {name} in float32", FORMS[2], other, (f"residual_{name}", *message))
        like_input = {"residual": x, **second, **wide}
        message = ("must have dtype torch.float32", "got torch.float64")
        yield Row(f"residual in float64, {name} too", FORMS[2], {**like_input, "training": False}, message)
    yield Row("residual and its vectors in float64", FORMS[2], {"residual": x, **second}, (ACCEPTED,))


def missing_statistics() -> Iterator[Row]:
    for prefix in ("", "residual_"):
        form = FORMS[2] if prefix else FORMS[1]
        for name in STATISTICS:
            changes = {f"{prefix}{name}": None}
            together = (f"{prefix}running_mean and {prefix}running_var must be given together",)
            yield Row(f"no {prefix}{name} in training", form, changes, together)
            message = (f"{prefix}{name} must be given in evaluation mode", "got None")
            yield Row(f"no {prefix}{name} in evaluation", form, {**changes, "training": False}, message)
        neither = {f"{prefix}{name}": None for name in STATISTICS}
        message = (f"{prefix}running_mean must be given in evaluation mode",)
        yield Row(f"no {prefix}statistics in evaluation", form, {**neither, "training": False}, message)
        yield Row(f"no {prefix}statistics in training", form, neither, (ACCEPTED,))


def numbers() -> Iterator[Row]:
    forms, modes = cycle(FORMS), cycle((True, False, False))
    for prefix in ("", "residual_"):
        for name in ("momentum", "eps"):
            for kind, value in NO_NUMBERS.items():
                form = FORMS[2] if prefix else next(forms)
                changes = {prefix + name: value, "training": next(modes)}
                yield Row(f"{prefix}{name} {kind}", form, changes, (prefix + name, "must be a number", f"got {kind}"))
            for value in (np.float32(0.5), 1, True, torch.tensor(0.5)):
                form = FORMS[2] if prefix else next(forms)
                yield Row(f"{prefix}{name} {value!r}", form, {prefix + name: value}, (ACCEPTED,))
        for training, eps, message in (
            (True, 0.0, "must be positive in training"), (True, -1.0, "must be positive"),
            (True, 0, "must be positive"), (False, -1e-3, "must not be negative"),
        ):  # fmt: skip
            changes = {f"{prefix}eps": eps, "training": training}
            form = FORMS[2] if prefix else next(forms)
            yield Row(f"{prefix}eps {eps} {training}", form, changes, (f"{prefix}eps", message, f"got {eps}"))


def modes() -> Iterator[Row]:
    forms = cycle(FORMS)
    for value in ("yes", "", 1, 0, 1.0, None, np.bool_(True), torch.tensor(True), [True]):
        kind = type(value).__name__
        yield Row(f"training {value!r}", next(forms), {"training": value}, ("training must be a bool", f"got {kind}"))


def activations() -> Iterator[Row]:
    forms, modes = cycle(FORMS), cycle((True, False))
    for kind, value in {**NO_TENSORS, "NoneType": None}.items():
        changes = {"input": value, "training": next(modes)}
        yield Row(f"input {kind}", next(forms), changes, ("input must be a Tensor", f"got {kind}"))
        for form in FORMS[1:]:
            changes = {"residual": value, "training": next(modes)}
            message = ("residual must be a Tensor", f"got {kind}")
            yield Row(f"residual {kind} {form}", form, changes, message, stricter=TypeError)
    for dtype in (torch.int32, torch.complex64, torch.bool):
        x = torch.ones(SHAPE).to(dtype)
        yield Row(f"input {dtype}", FORMS[0], {"input": x}, ("input must be of a floating dtype", f"got {dtype}"))
        message = ("residual must be of a floating dtype", f"got {dtype}")
        yield Row(f"residual {dtype}", FORMS[1], {"residual": x}, message, stricter=NotImplementedError)
        yield Row(f"normed residual {dtype}", FORMS[2], {"residual": x}, message, stricter=NotImplementedError)
    for shape in ((5,), ()):
        message = ("input must have at least 2 dimensions", f"got shape {shape}")
        changes = {"input": torch.ones(shape), **dict.fromkeys(VECTORS)}
        yield Row(f"input of shape {shape}", FORMS[0], changes, message)
    for shape in ((1, 5), (1, 5, 1, 1)):
        message = ("input must have more than one value per channel in training", f"got shape {shape}")
        yield Row(f"input of shape {shape}", FORMS[0], {"input": torch.ones(shape)}, message)
    for form in FORMS[1:]:
        for shape in ((4, 5, 3, 2), (1, 5, 3, 3), (4, 5, 9), (5, 4, 3, 3), (4, 5, 1, 9)):
            message = ("residual must have the shape of input, (4, 5, 3, 3)", f"got {shape}")
            changes = {"residual": torch.randn(shape)}
            yield Row(f"residual of shape {shape} {form}", form, changes, message, stricter=RuntimeError)
        changes = {"residual": torch.ones(SHAPE, device="meta")}
        message = ("residual must be on the device of input", "got meta")
        yield Row(f"residual on meta {form}", form, changes, message, stricter=RuntimeError)


def modules() -> Iterator[Row]:
    kinds = cycle(("BatchNormReLU2d", "BatchNormAddReLU2d"))
    for name in ("momentum", "eps"):
        for kind, value in NO_NUMBERS.items():
            if name != "momentum" or value is not None:
                message = (f"{name} must be a number", f"got {kind}")
                yield Row(f"{name} {kind}", next(kinds), {name: value}, message)
    yield Row("momentum None", next(kinds), {"momentum": None}, (ACCEPTED,))
    yield Row("training 1", next(kinds), {"training": 1}, (ACCEPTED,))
    yield Row("eps 0", next(kinds), {"eps": 0.0}, ("eps must be positive in training",))
    for kind in ("BatchNormReLU2d", "BatchNormAddReLU2d"):
        yield Row(
            "weight", kind, {"weight": nn.Parameter(torch.ones(4))}, ("weight must have 5 elements", "got shape (4,)")
        )
        yield Row(
            "running_mean",
            kind,
            {"running_mean": torch.ones(6)},
            ("running_mean must have 5 elements", "got shape (6,)"),
        )
        yield Row(
            "no running_var", kind, {"running_var": None}, ("running_mean and running_var must be given together",)
        )
        for value in (None, 1.0, [1.0], np.ones(SHAPE)):
            message = ("input must be a Tensor", f"got {type(value).__name__}")
            yield Row(f"input {type(value).__name__}", kind, {"input": value}, message)
        yield Row("input of 3 dimensions", kind, {"input": torch.ones(4, 5, 3)}, ("expected 4D input", "got 3D input"))
        yield Row("input of integers", kind, {"input": torch.ones(SHAPE).int()}, ("input must be of a floating dtype",))
        yield Row(
            "one value", kind, {"input": torch.ones(1, 5, 1, 1)}, ("input must have more than one value per channel",)
        )
    for value in (None, 1.0, "x", [1.0], np.ones(SHAPE)):
        message = ("residual must be a Tensor", f"got {type(value).__name__}")
        yield Row(f"residual {type(value).__name__}", kind, {"residual": value}, message, stricter=TypeError)
    for shape in ((4, 5, 3, 2), (1, 5, 3, 3), (4, 5, 9), (5, 4, 3, 3)):
        message = ("residual must have the shape of input", f"got {shape}")
        changes = {"residual": torch.randn(shape)}
        yield Row(f"residual of shape {shape}", kind, changes, message, stricter=RuntimeError)


class Doubled(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def tails() -> Iterator[Row]:
    no_norms = (nn.InstanceNorm2d(5, track_running_stats=True), nn.GroupNorm(1, 5), nn.LayerNorm(3), nn.Identity(),
                nn.BatchNorm2d, None, "bn1", 1, F.relu)  # fmt: skip
    for norm in no_norms:
        kind = type(norm).__name__
        yield Row(
            f"norm {kind}", "tail", {"norm": norm}, ("norm must be a BatchNorm", f"got {kind}"), stricter=TypeError
        )
        if norm is not None:
            message = ("residual_norm must be a BatchNorm", f"got {kind}")
            yield Row(f"residual_norm {kind}", "tail", {"residual_norm": norm}, message, stricter=TypeError)
    yield Row("no second norm", "tail", {"residual_norm": None}, (ACCEPTED,))
    yield Row("nothing added", "tail", {"residual_norm": None, "residual": None}, (ACCEPTED,))
    others = {"plain": nn.BatchNorm2d(5), "in evaluation": nn.BatchNorm2d(5).eval(), "of its own": Doubled(5)}
    for name, norm in others.items():
        yield Row(f"second norm {name}", "tail", {"residual_norm": norm}, (ACCEPTED,))
        bad = {
            "input must be a Tensor": {"input": None},
            "expected 4D input": {"input": torch.ones(4, 5)},
            "input must be of a floating dtype": {"input": torch.ones(SHAPE).int()},
            "residual must be a Tensor": {"residual": None},
            "must have 5 elements": {"norm": nn.BatchNorm2d(5), "input": torch.ones(4, 6, 3, 3)},
        }
        for message, changes in bad.items():
            message = message.replace("5", "6") if "elements" in message else message
            yield Row(f"{message}, second norm {name}", "tail", {"residual_norm": norm, **changes}, (message,))


TABLE = [
    row
    for rows in (vectors, vectors_in_float64, missing_statistics, numbers, modes, activations, modules, tails)
    for row in rows()
]


def good_call(subject: str) -> dict[str, Any]:
    """Arguments of a call, and the attributes of a module, that are right."""
    x, r = torch.randn(SHAPE), torch.randn(SHAPE)
    if subject == "tail":
        return {"norm": nn.BatchNorm2d(5), "input": x, "residual": r, "residual_norm": nn.BatchNorm2d(5)}
    if subject not in FORMS:
        return {"input": x, **({"residual": r} if "Add" in subject else {})}
    norm = {name: torch.rand(5) + 0.5 for name in VECTORS} | {"momentum": 0.3, "eps": 0.1}
    arguments = {"input": x, **norm, "training": True}
    if subject != FORMS[0]:
        arguments["residual"] = r
    if subject == FORMS[2]:
        arguments |= {f"residual_{name}": v.clone() if isinstance(v, Tensor) else v for name, v in norm.items()}
    return arguments


def eager_call(subject: str, a: dict[str, Any]) -> Tensor:
    def normed(prefix: str, x: Any) -> Tensor:
        vectors = [a[f"{prefix}{name}"] for name in VECTORS]
        return F.batch_norm(x, *vectors, a["training"], a[f"{prefix}momentum"], a[f"{prefix}eps"])

    if subject in FORMS:
        y = normed("", a["input"])
        if subject == FORMS[0]:
            return F.relu(y)
        return F.relu(y + (a["residual"] if subject == FORMS[1] else normed("residual_", a["residual"])))
    y = a["norm"](a["input"])
    if a["residual_norm"] is not None:
        return F.relu(y + a["residual_norm"](a["residual"]))
    return F.relu(y + a["residual"] if "Add" in subject or a["residual"] is not None else y)


def our_call(subject: str, a: dict[str, Any]) -> Tensor:
    if subject in FORMS:
        return FUNCTIONS[subject](**a)
    if subject == "tail":
        return resfused.tail(**a)
    return a["norm"](*(a[name] for name in ("input", "residual") if name in a))


def prepared(row: Row, eager: bool, device: torch.device) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """The row's call on tensors of its own, and all that it might change."""

    def own(value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type != "meta":
            moved = value.detach().clone().to(device).requires_grad_(value.requires_grad)
            return nn.Parameter(moved) if isinstance(value, nn.Parameter) else moved
        return copy.deepcopy(value).to(device) if isinstance(value, nn.Module) else value

    torch.manual_seed(0)
    a = {name: own(value) for name, value in {**good_call(row.subject), **row.changes}.items()}
    if row.subject not in (*FORMS, "tail"):
        a["norm"] = (nn.BatchNorm2d if eager else getattr(resfused, row.subject))(5).to(device)
        for name in row.changes:
            if name not in ("input", "residual"):
                setattr(a["norm"], name, a.pop(name))
        a = {"residual": None, "residual_norm": None, **a} if eager else a
    state = {name: value for name, value in a.items() if isinstance(value, Tensor)}
    for name, value in a.items():
        if isinstance(value, nn.Module):
            state |= {f"{name}.{key}": tensor for key, tensor in value.state_dict().items()}
    call = eager_call if eager else our_call
    return lambda: call(row.subject, a), {n: t for n, t in state.items() if t.device.type != "meta"}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("row", TABLE, ids=[f"{row.subject}: {row.name}" for row in TABLE])
def test_calls(row, backend, device):
    ours, state = prepared(row, False, device)
    eager, eager_state = prepared(row, True, torch.device("cpu"))
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    with resfused.use_backend(backend):
        if row.message == (ACCEPTED,):
            assert relative_error(ours().cpu(), eager()) < 1e-5
            for name, tensor in eager_state.items():
                torch.testing.assert_close(state[name].cpu(), tensor, msg=name)
            return
        with pytest.raises(expected(eager, row)) as error:
            ours()
    found = str(error.value)
    assert all(part in found for part in row.message), found
    assert "\n" not in found
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]), name


def expected(eager: Callable[[], Tensor], row: Row) -> type[Exception]:
    """What PyTorch raises, or what ours does where PyTorch takes the call."""
    try:
        eager()
    except Exception as error:
        # Of a wrong type PyTorch says TypeError, or whatever comes where the value is first touched.
        return TypeError if any("must be a " in part for part in row.message) else type(error)
    assert row.stricter is not None, "PyTorch takes this call"
    return row.stricter
