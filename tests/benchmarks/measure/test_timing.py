"""Nodes and networks timed on small shapes: what is timed, what is left out and why; never how long it takes."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import commands
import pytest
import run
import torch
from measure import measuring, network_timing, node_timing, variants
from measure.network_timing import WAYS, Judge, Workload
from measure.node_timing import Comparison
from measure.timing import Deadline, interleaved, rotation
from measure.variants import VARIANTS, Variant
from record import results
from record.results import NetworkTime, NodeTime
from resfused.kernels import cpu
from rich.console import Console
from rivals import RIVALS
from workloads.nodes import NETWORKS, Node

import resfused
from resfused import reference

PLACE = Node("norm+add+relu", 8, 3, 3, 1)
WORKLOAD = Workload("small/cifar_resnet8", "training", 2, 8)


@pytest.fixture
def m(device, tmp_path):
    """What a command begins with, and its result file."""
    return measuring.Measuring(
        results.Run(tmp_path / "here.json", {}), 100.0, Deadline(5), device, True, Console(quiet=True)
    )


def measured(m, kind):
    (found,) = results.load([m.run.path]).values()
    return found.of(kind)


def comparison(device, *names, **changes):
    """Of one tiny node."""
    return Comparison(**{
        "nodes": [PLACE], "batches": [2], "dtype": torch.bfloat16, "layout": "channels_last", "repetitions": 3,
        "variants": names, "device": device, **changes,
    })  # fmt: skip


def test_every_variant_of_a_node_is_timed(m):
    # Eager's backward refuses running statistics that the forwards after it have changed.
    names = ("eager", "resfused", "resfused again", "eager contiguous", "eager float16")
    node_timing.time_nodes([comparison(m.device, *names)], m)
    times = measured(m, NodeTime)
    assert [(t.variant, t.phase) for t in times] == [(v, p) for p in ("forward", "backward", "both") for v in names]
    assert all(len(t.samples_ms) == 3 and min(t.samples_ms) > 0 for t in times)
    assert all(0 < t.error < 2e-2 for t in times)
    assert m.run.left_out == []
    forward = times[0]
    # x twice, s, y in two bytes each, and a bit an element.
    assert forward.least_bytes == 2 * 72 * (4 * 2 + 1 / 8)
    assert forward.of_copy == pytest.approx(forward.least_bytes / forward.milliseconds / 1e6 / 100)


@pytest.mark.parametrize("name", ["torch.compile", "torch.compile max-autotune"])
def test_a_compiled_variant(m, name):
    torch._dynamo.reset()
    node_timing.time_nodes([comparison(m.device, name, nodes=[Node("norm+relu", 8, 3, 3, 1)])], m)
    assert len(measured(m, NodeTime)) == 3
    assert m.run.left_out == []


def test_a_ninth_shape_is_compiled_too(m, monkeypatch):
    """Dynamo gives up after eight shapes of one function, and would run the ninth eagerly."""
    compile = torch.compile
    compiled = set()

    def backend(graph, examples):
        compiled.add(max(tuple(e.shape) for e in examples))
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda function, mode, **options: compile(function, backend=backend, **options)
    )
    nodes = [Node("norm+relu", 2, size, size, 1) for size in range(2, 12)]
    node_timing.time_nodes([comparison(m.device, "torch.compile", nodes=nodes, repetitions=1)], m)
    assert m.run.left_out == []
    assert compiled == {(2, 2, size, size) for size in range(2, 12)}


def test_a_wrong_variant_is_not_timed(m, monkeypatch):
    halved = SimpleNamespace(batch_norm_add_relu=lambda *args: reference.batch_norm_add_relu(*args) * 0.5)
    monkeypatch.setitem(VARIANTS, "resfused", Variant(lambda: halved))
    node_timing.time_nodes([comparison(m.device, "resfused", "eager")], m)
    assert {t.variant for t in measured(m, NodeTime)} == {"eager"}
    ((what, reason),) = m.run.left_out
    assert what == "resfused on norm+add+relu 8x3x3, batch 2, bfloat16 channels_last"
    assert reason.startswith("WRONG: ")
    assert m.failed


def test_what_cannot_be_had_is_left_out_with_the_reason(m, monkeypatch):
    def missing():
        raise RuntimeError("needs the package x")

    def unsupported(*args):
        raise RuntimeError("no such form\nand more")

    monkeypatch.setitem(VARIANTS, "x", Variant(missing))
    monkeypatch.setitem(VARIANTS, "y", Variant(lambda: SimpleNamespace(batch_norm_add_relu=unsupported)))
    node_timing.time_nodes([comparison(m.device, "x", "y", "eager")], m)
    assert m.run.left_out == [
        ("x, bfloat16 channels_last", "needs the package x"),
        ("y on norm+add+relu 8x3x3, batch 2, bfloat16 channels_last", "no such form"),
    ]
    assert {t.variant for t in measured(m, NodeTime)} == {"eager"}
    assert not m.failed
    monkeypatch.setitem(VARIANTS, "resfused", VARIANTS["y"])
    node_timing.time_nodes([comparison(m.device, "resfused")], m)
    assert m.failed


def test_a_variant_that_is_the_comparison_itself_is_not_timed_twice():
    contiguous, float16 = VARIANTS["eager contiguous"], VARIANTS["eager float16"]
    assert contiguous.applies(torch.bfloat16, "channels_last")
    assert not contiguous.applies(torch.bfloat16, "contiguous")
    assert float16.applies(torch.bfloat16, "channels_last")
    assert not float16.applies(torch.float16, "channels_last")
    assert not float16.applies(torch.float32, "channels_last")
    assert VARIANTS["attorch"].applies(torch.float32, "contiguous")
    assert VARIANTS["apex groupbn"].applies(torch.float16, "channels_last")
    assert not VARIANTS["apex groupbn"].applies(torch.float32, "channels_last")


def test_after_the_deadline_nothing_begins(m, monkeypatch):
    late = measuring.Measuring(m.run, m.copy, Deadline(0), m.device, True, m.console)
    node_timing.time_nodes([comparison(m.device, "eager")], late)
    network_timing.time_networks([WORKLOAD], ["eager"], 1, late)
    assert m.run.left_out == [
        ("norm+add+relu 8x3x3, batch 2, bfloat16 channels_last", "the 0 minutes were over"),
        ("eager, small/cifar_resnet8 training, batch 2, bfloat16", "the 0 minutes were over"),
    ]
    network_timing.time_networks([WORKLOAD], ["resfused"], 1, late)
    assert measured(m, NodeTime) == []
    assert not late.failed


def test_variants_take_turns(device):
    order = []
    calls = {name: [lambda name=name, i=i: order.append(f"{name}{i}") for i in range(5)] for name in "abc"}
    samples = interleaved(calls, 30, torch.device("cpu"))
    turns = ["".join(called[0] for called in order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(turns) == 31
    assert set(turns) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert [int(called[1]) for called in order] == [i % 5 for i in range(len(order))]
    assert {name: len(s) for name, s in samples.items()} == {"a": 30, "b": 30, "c": 30}
    assert min(map(len, interleaved(calls, 1, torch.device("cpu"), least_seconds=0.01).values())) > 1
    assert rotation(2**27, 30, torch.device("cuda")) == 4
    assert rotation(2**40, 30, torch.device("cuda")) == 1
    assert rotation(1, 30, torch.device("cuda")) == 30


def test_a_step_is_a_step_of_sgd(device):
    """Against the same step written out; and the comparison before it changes no weight."""
    step = Judge(WORKLOAD, device).step(network_timing.Way(dtype=torch.float64))
    model = step._model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits, gradients = step.results()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert logits.shape == (2, 10)
    step.run()
    expected = torch.cat(
        [(p - 0.01 * g).flatten() for p, g in zip(before.values(), split(gradients, model), strict=True)]
    )
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), expected)


def split(vector, model):
    parts = vector.split([p.numel() for p in model.parameters()])
    return [part.view_as(p) for part, p in zip(parts, model.parameters(), strict=True)]


def test_ways_of_a_network_are_timed(m):
    names = ["resfused", "eager", "eager contiguous", "eager float16"]
    workloads = [WORKLOAD, Workload(WORKLOAD.network, "inference", 2, 8)]
    with resfused.use_backend("auto" if m.device.type == "cuda" else "torch"):
        network_timing.time_networks(workloads, names, 2, m)
    times = measured(m, NetworkTime)
    assert [(t.mode, t.variant) for t in times] == [(w.mode, name) for w in workloads for name in names]
    assert all(len(t.samples_ms) == 2 and t.images_s == pytest.approx(2000 / t.milliseconds) for t in times)
    assert all(0 < t.error < 1 for t in times)
    assert m.run.left_out == []


@pytest.fixture
def native_calls(monkeypatch):
    """How often each direction ran on the kernels in C++."""
    calls = Counter()

    def counting(name, function):
        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu, name, counting(name, getattr(cpu, name)))
    return calls


def test_what_is_called_ours_ran_on_the_kernels(m, native_calls):
    """On a CPU: a repetition that warms up, those that are timed and the comparison before them; others never."""
    m = replace(m, device=torch.device("cpu"))
    c = comparison(m.device, "resfused", repetitions=2)
    steps, places = 3, 7
    with resfused.use_backend(measuring.BACKENDS["cpu"]):
        node_timing.time_nodes([c], m)
        assert native_calls == {"forward": 1 + 3 + 1 + 3, "backward": 1 + 3 + 3}
        native_calls.clear()
        network_timing.time_networks([WORKLOAD], ["resfused"], 1, m)
        assert native_calls == {"forward": steps * places, "backward": steps * places}
        native_calls.clear()
        node_timing.time_nodes([replace(c, variants=("eager",))], m)
        network_timing.time_networks([WORKLOAD], ["eager"], 1, m)
    assert not native_calls
    assert m.run.left_out == []


def test_a_network_without_anything_to_fuse_is_not_ours(m, monkeypatch):
    monkeypatch.setattr(network_timing.resfused, "fuse_", lambda model, **named: SimpleNamespace(fused=[]))
    network_timing.time_networks([WORKLOAD], ["resfused"], 1, m)
    assert m.run.left_out == [
        ("resfused, small/cifar_resnet8 training, batch 2, bfloat16", "fuse_ finds nothing in it")
    ]
    assert m.failed


def test_a_wrong_network_is_not_timed(m, monkeypatch):
    """Fused, and one norm's weight doubled."""

    fuse = resfused.fuse_

    def fused_wrongly(model, **named):
        torch.nn.init.constant_(model[3].bn2.weight, 3)
        return fuse(model, **named)

    monkeypatch.setattr(network_timing.resfused, "fuse_", fused_wrongly)
    network_timing.time_networks([WORKLOAD], ["resfused", "eager"], 1, m)
    ((what, reason),) = m.run.left_out
    assert what == "resfused, small/cifar_resnet8 training, batch 2, bfloat16"
    assert reason.startswith("WRONG: off by ")
    assert m.failed


def test_the_nodes_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--small", "--form", "norm+relu", "--dtype", "float32", "--layout", "contiguous"]
    options += ["--batch", "2", "--repetitions", "1"]
    others = [option for name in (*RIVALS, "eager float16", "eager") for option in ("--against", name)]
    assert run.main(["nodes", *options, *others]) == 0
    assert run.main(["--results", "results/mine.json", "nodes", *options, "--against", "eager"]) == 0
    found = json.loads((tmp_path / "results" / "mine.json").read_text())["runs"][0]
    assert {(t["variant"], t["dtype"], t["layout"]) for t in found["nodes"]} == {
        (variant, "float32", "contiguous") for variant in ("resfused", "resfused again", "eager")
    }
    assert found["settings"]["command"] == "nodes"
    (first,) = (p for p in (tmp_path / "results").glob("*.json") if p.name != "mine.json")
    left_out = {entry["what"] for entry in json.loads(first.read_text())["runs"][0]["left_out"]}
    if not torch.cuda.is_available():
        assert left_out == {f"{name}, float32 contiguous" for name in (*RIVALS, "eager float16")}
    assert "Nodes, float32 contiguous" in capsys.readouterr().out


def test_a_damaged_result_file_is_said_before_anything_is_measured(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text("{")
    for command in ([], ["nodes"]):
        with pytest.raises(SystemExit, match="2"):
            run.main([*command, "--results", str(path)])
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"run.py: error: {path} cannot be read")
    assert path.read_text() == "{"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.interpreter
def test_cuda_graphs_need_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["nodes", "--cuda-graph", "--results", str(tmp_path / "x.json")])
    assert "--cuda-graph needs a CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run.main(["nodes", "--device", "cuda", "--results", str(tmp_path / "x.json")])
    assert "--device cuda needs a CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run.main(["profile", "--results", str(tmp_path / "x.json")])
    assert "profile needs a CUDA GPU" in capsys.readouterr().err


def test_the_networks_that_are_timed():
    def chosen(*options, device="cuda", small=False):
        args = commands.parser("").parse_args(["networks", *options])
        here = SimpleNamespace(device=torch.device(device), small=small)
        return [tuple(vars(w).values()) for w in network_timing.workloads(args, here)]

    assert chosen("--batch", "64") == [
        ("torchvision/resnet50", "training", 64, 224, "bfloat16"),
        ("torchvision/resnet18", "training", 64, 224, "bfloat16"),
        ("torchvision/resnet101", "training", 64, 224, "bfloat16"),
        ("torchvision/resnet50", "inference", 64, 224, "bfloat16"),
    ]
    assert chosen("--network", "cifar/resnet20", "--mode", "inference") == [
        ("cifar/resnet20", "inference", 256, 32, "bfloat16"), ("cifar/resnet20", "inference", 64, 32, "bfloat16")
    ]  # fmt: skip
    assert chosen("--image-size", "8", small=True) == [("small/cifar_resnet8", "training", 2, 8, "bfloat16")]
    assert chosen("--dtype", "float32", device="cpu") == [
        ("torchvision/resnet50", "training", 16, 224, "float32"),
        ("torchvision/resnet18", "training", 16, 224, "float32"),
        ("torchvision/resnet50", "inference", 16, 224, "float32"),
    ]
    assert {workload[-1] for workload in chosen(device="cpu")} == {"float32", "bfloat16"}
    gpu = SimpleNamespace(device=torch.device("cuda"), small=False)
    assert network_timing.standard_workload(gpu) == Workload("torchvision/resnet50", "training", 256, 224)


def test_the_nodes_that_are_timed():
    def chosen(*options, device):
        args = commands.parser("").parse_args(["nodes", *options])
        here = SimpleNamespace(device=torch.device(device), small=False)
        return [
            (str(c), len(c.nodes), tuple(c.batches), node_timing.TINY in c.nodes)
            for c in node_timing.filtered(args, here)
        ]

    assert chosen(device="cuda") == [("bfloat16 channels_last", 23, (256, 32), False)]
    assert chosen("--network", "resnet50", "--batch", "8", "--layout", "contiguous", device="cpu") == [
        ("float32 contiguous", 16, (8,), False), ("bfloat16 contiguous", 16, (8,), False)
    ]  # fmt: skip
    assert [(c, n) for c, n, _, tiny in chosen(device="cpu") if tiny] == [
        (f"{dtype} {layout}", 17) for dtype in ("float32", "bfloat16") for layout in ("channels_last", "contiguous")
    ]


def test_every_shape_is_timed_once():
    shapes = [(n.form, n.channels, n.height) for n in node_timing.unique(NETWORKS["resnet50"]().nodes)]
    assert len(shapes) == len(set(shapes)) == 16


@pytest.mark.gpu
def test_cuda_graphs_of_nodes_and_networks(m):
    """Every variant and way that a GPU has; what is not there may only be another library."""
    c = comparison(m.device, *VARIANTS, cuda_graph=True, nodes=[Node("norm+add+relu", 64, 14, 14, 1)])
    node_timing.time_nodes([c], m)
    workload = Workload("small/torchvision_basic", "training", 8, 32)
    network_timing.time_networks([workload], list(WAYS), 2, m)
    assert {t.variant for t in measured(m, NodeTime)} >= set(variants.STANDARD)
    assert {t.variant for t in measured(m, NetworkTime)} == set(WAYS)
    assert all(t.peak_bytes > 0 for t in measured(m, NetworkTime))
