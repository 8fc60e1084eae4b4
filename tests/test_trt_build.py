"""Real builds with TensorRT-RTX, which compiles without a GPU, and every way in which a build fails."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from clip_export.backends import _trt_build, _trt_errors, _trt_inspect, _trt_library, _trt_worker, tensorrt_rtx
from clip_export.backends._trt_library import TENSORRT, TENSORRT_RTX
from clip_export.backends._trt_phases import STEPS, Phases
from clip_export.backends._trt_profiles import check_profiles
from clip_export.backends.building import PORTABLE, BuildReport, BuildRequest, Profile, ShapeRange
from clip_export.errors import (
    ClipExportError,
    DeviceError,
    InputError,
    MissingDependencyError,
    OutputError,
    PlanBuildError,
    UnsupportedOperatorError,
)

TOKENS, WIDTH, HEADS = 16, 128, 2
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def save(path: Path, nodes: list[Any], weights: list[Any], shape: tuple[str | int, ...], kind: int = HALF) -> Path:
    """One input x, one output y."""
    inputs = [helper.make_tensor_value_info("x", kind, list(shape))]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", kind, None)], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def weight(name: str, *shape: int, kind: int = HALF) -> Any:
    values = np.random.default_rng(5).normal(0, 0.05, shape)
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(kind)), name)


def attention_graph(path: Path, *, kind: int = HALF, causal: bool = False) -> Path:
    """One attention as the operator: x [batch, 16, 128] to y of the same shape."""
    heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "is_causal": int(causal)}
    nodes = [
        helper.make_node("MatMul", ["x", "qkv"], ["projected"], name="attention/qkv"),
        helper.make_node("Split", ["projected"], ["q", "k", "v"], axis=-1, num_outputs=3, name="attention/Split"),
        helper.make_node("Attention", ["q", "k", "v"], ["mixed"], name="attention/Attention", **heads),
        helper.make_node("MatMul", ["mixed", "out"], ["y"], name="attention/out"),
    ]
    weights = [weight("qkv", WIDTH, 3 * WIDTH, kind=kind), weight("out", WIDTH, WIDTH, kind=kind)]
    return save(path, nodes, weights, ("batch", TOKENS, WIDTH), kind)


def primitive_graph(path: Path) -> Path:
    """One attention as MatMul, scale, Softmax, MatMul: x [batch, heads, 16, 64]."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["keys"], perm=[0, 1, 3, 2], name="block.0/Transpose"),
        helper.make_node("MatMul", ["x", "keys"], ["raw"], name="block.0/Scores"),
        helper.make_node("Mul", ["raw", "scale"], ["scores"], name="block.0/Scale"),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1, name="block.0/Softmax"),
        helper.make_node("MatMul", ["shares", "x"], ["y"], name="block.0/Values"),
    ]
    return save(path, nodes, [numpy_helper.from_array(np.float16(0.125), "scale")], ("batch", HEADS, TOKENS, 64))


def matmul_graph(path: Path, kind: int = HALF) -> Path:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")]
    return save(path, nodes, [weight("w", WIDTH, WIDTH, kind=kind)], ("batch", WIDTH), kind)


def batches(*ranges: tuple[int, int, int], shape: tuple[int, ...] = (TOKENS, WIDTH)) -> tuple[Profile, ...]:
    return tuple({"x": ShapeRange(min=(a, *shape), opt=(b, *shape), max=(c, *shape))} for a, b, c in ranges)


@pytest.fixture(scope="module")
def library() -> _trt_library.Library:
    return _trt_library.load(TENSORRT_RTX)


@pytest.fixture
def no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without one, wherever the tests run, but for those that need one."""

    def none() -> None:
        raise DeviceError("there is no NVIDIA driver on this machine", hint="install it")

    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(_trt_library, "current_gpu", none)


pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (tmp_path / "graphs").mkdir()
    return attention_graph(tmp_path / "graphs" / "tiny.onnx")


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    (tmp_path / "plans").mkdir()
    return tmp_path / "plans"


def build(graph: Path, plans: Path, target: str | None = "sm_89", **options: Any) -> BuildReport:
    options.setdefault("profiles", batches((1, 4, 8)))
    progress = options.pop("progress", lambda *_: None)
    request = BuildRequest(graph=graph, plan=plans / "a.plan", compute_capability=target, **options)
    return tensorrt_rtx.build_plan(request, progress=progress)


def refused(kind: type[ClipExportError], graph: Path, plans: Path, *words: str, **options: Any) -> ClipExportError:
    """The error of a build that must fail, saying `words`, and leave nothing behind."""
    with pytest.raises(kind) as caught:
        build(graph, plans, **options)
    assert list(plans.iterdir()) == []
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert caught.value.hint, "an error says what to do next"
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600, "the compiler's pages are cut to a readable length"
    return caught.value


@pytest.mark.parametrize("target", ["sm_75", "sm_86", "sm_89", "sm_120", PORTABLE])
def test_a_graph_is_built_for_a_gpu_that_is_not_here(
    graph: Path, plans: Path, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    report = build(graph, plans, target, profiles=batches((1, 1, 2), (3, 8, 16)))
    assert list(plans.iterdir()) == [plans / "a.plan"]
    assert report.plan_bytes == (plans / "a.plan").stat().st_size > 0
    assert (report.compute_capability, report.attention, report.unfused) == (target, "operator", ())
    assert (report.gpu, report.activation_bytes, report.inspector) == (None, None, None)
    assert report.seconds > 0
    assert report.peak_memory_mib > 50
    assert report.version.startswith("1.")
    assert capfd.readouterr() == ("", ""), "a library writes nothing on its caller's streams"


def test_plans_for_different_gpus_differ_and_those_for_one_are_the_same(graph: Path, plans: Path) -> None:
    found = []
    for target in ("sm_86", "sm_89", PORTABLE, "sm_86"):
        build(graph, plans, target)
        found.append(hashlib.sha256((plans / "a.plan").read_bytes()).hexdigest())
    assert len(set(found)) == 3
    assert found[0] == found[3]


def naive_half(source: Path, target: Path) -> Path:
    """The graph with every weight and activation in fp16, its outputs in fp32."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    outputs = [output.name for output in model.graph.output]
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = HALF
        for names in (node.input, node.output):
            names[:] = [f"{name}.half" if name in outputs else name for name in names]
    model.graph.node.extend(helper.make_node("Cast", [f"{name}.half"], [name], to=FLOAT) for name in outputs)
    del model.graph.value_info[:]
    onnx.save(model, target)
    return target


def test_a_text_tower_is_built_with_several_profiles_and_says_how_far_it_is(
    demo_bundle: Path, plans: Path, tmp_path: Path
) -> None:
    said: list[tuple[str, int, int]] = []
    profiles = tuple(
        {
            "input_ids": ShapeRange(min=(1, 2), opt=(batch, 16), max=(batch, 77)),
            "eot_index": ShapeRange(min=(1,), opt=(batch,), max=(batch,)),
        }
        for batch in (2, 16)
    )
    graph = naive_half(demo_bundle / "text.onnx", tmp_path / "text.onnx")
    report = build(graph, plans, profiles=profiles, progress=lambda *step: said.append(step))
    assert report.attention == "operator"
    done = [step[1] for step in said]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, STEPS)
    assert len(set(done)) > 20, "a bar that moves"
    assert {(what, total) for what, _, total in said} == {("compiling text.onnx", STEPS)}


def test_two_builds_at_once(graph: Path, plans: Path) -> None:
    def one(target: str) -> BuildReport:
        (plans / target).mkdir()
        return build(graph, plans / target, target)

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(one, ["sm_86", "sm_120"]))
    assert [report.compute_capability for report in reports] == ["sm_86", "sm_120"]
    assert (plans / "sm_86/a.plan").read_bytes() != (plans / "sm_120/a.plan").read_bytes()


def test_a_timing_cache_is_left_alone_where_it_would_do_nothing(graph: Path, plans: Path, tmp_path: Path) -> None:
    build(graph, plans, timing_cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_options_of_the_compiler_are_taken(graph: Path, plans: Path) -> None:
    assert build(graph, plans, workspace_mib=64, optimization_level=0, tf32=True).plan_bytes > 0


# What cannot be built


@pytest.mark.parametrize("target", ["sm_90", "8.9", "sm_100", ""])
def test_an_unknown_gpu_is_refused_with_those_that_are_known(graph: Path, plans: Path, target: str) -> None:
    refused(PlanBuildError, graph, plans, "sm_75, sm_80", f"found {target}", "portable", target=target)


def test_without_a_gpu_the_gpu_must_be_named(graph: Path, plans: Path) -> None:
    words = ("no GPU is here", "no NVIDIA driver", "say which GPU: sm_75", PORTABLE)
    refused(DeviceError, graph, plans, *words, target=None)


@pytest.mark.parametrize("domain", ["", "com.example"])
def test_an_unknown_operator_is_named(tmp_path: Path, plans: Path, domain: str) -> None:
    nodes = [helper.make_node("Gallop", ["x"], ["y"], name="horse", domain=domain)]
    graph = save(tmp_path / "odd.onnx", nodes, [], ("batch", 8))
    error = refused(UnsupportedOperatorError, graph, plans, "odd.onnx", "Gallop (node horse): no such operator")
    assert isinstance(error, UnsupportedOperatorError)
    assert error.operators == ("Gallop",)


def test_an_attribute_that_the_compiler_lacks_is_told(tmp_path: Path, plans: Path) -> None:
    nodes = [helper.make_node("Resize", ["x", "", "s"], ["y"], name="shrink", mode="cubic", antialias=1)]
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "s")
    graph = save(tmp_path / "resize.onnx", nodes, [scales], (1, 3, 8, 8), FLOAT)
    refused(UnsupportedOperatorError, graph, plans, "Resize (node shrink): Antialiasing is not supported", profiles=())


def test_every_refused_operator_is_listed(tmp_path: Path, plans: Path) -> None:
    nodes = [
        helper.make_node("Gallop", ["x"], ["a"], name="one"),
        helper.make_node("Trot", ["a"], ["y"], name="two"),
    ]
    graph = save(tmp_path / "odd.onnx", nodes, [], ("batch", 8))
    error = refused(UnsupportedOperatorError, graph, plans, "Gallop", "Trot")
    assert isinstance(error, UnsupportedOperatorError)
    assert error.operators == ("Gallop", "Trot")


@pytest.mark.parametrize(("keep", "words"), [(400, "truncated"), (0, "empty")])
def test_a_truncated_graph(graph: Path, plans: Path, keep: int, words: str) -> None:
    os.truncate(graph, keep)
    refused(PlanBuildError, graph, plans, "tiny.onnx", words)


def test_weights_that_are_not_there(graph: Path, plans: Path) -> None:
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="tiny.data", size_threshold=0)
    os.truncate(graph.parent / "tiny.data", 1000)
    refused(PlanBuildError, graph, plans, "tiny.onnx keeps weights in", "tiny.data, which is shorter")
    (graph.parent / "tiny.data").unlink()
    refused(PlanBuildError, graph, plans, "tiny.onnx keeps weights in", "tiny.data, which is missing")


def test_a_graph_whose_shapes_do_not_fit(tmp_path: Path, plans: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")]
    graph = save(tmp_path / "bad.onnx", nodes, [weight("w", 8, 8)], (2, 9))
    refused(PlanBuildError, graph, plans, "cannot read bad.onnx", "linear", "must match", profiles=())


def test_no_graph_and_no_directory(graph: Path, plans: Path) -> None:
    refused(InputError, graph.with_name("no.onnx"), plans, "there is no graph at")
    with pytest.raises(OutputError, match="there is no directory"):
        build(graph, plans / "none")


def test_fp32_attention_takes_the_primitive_graph(tmp_path: Path, plans: Path) -> None:
    graph = attention_graph(tmp_path / "full.onnx", kind=FLOAT)
    words = ("no fused kernel for an Attention operator of full.onnx", "dedicated kernel", "MatMul and Softmax")
    refused(PlanBuildError, graph, plans, *words)


def test_a_causal_attention_needs_a_batch_beyond_one(demo_bundle: Path, tmp_path: Path, plans: Path) -> None:
    graph = naive_half(demo_bundle / "text.onnx", tmp_path / "text.onnx")
    one = {
        "input_ids": ShapeRange(min=(1, 2), opt=(1, 16), max=(1, 77)),
        "eot_index": ShapeRange(min=(1,), opt=(1,), max=(1,)),
    }
    words = ("where the batch can only be 1", "let every profile reach a batch of 2")
    refused(PlanBuildError, graph, plans, *words, profiles=(one,))


def test_turing_multiplies_no_fp32(tmp_path: Path, plans: Path) -> None:
    graph = matmul_graph(tmp_path / "full.onnx", FLOAT)
    profiles = batches((1, 4, 8), shape=(WIDTH,))
    words = ("no fp32 matrices on sm_75", "FP32 GEMM is not supported", "--precision fp16all")
    refused(PlanBuildError, graph, plans, *words, target="sm_75", profiles=profiles)
    assert build(graph, plans, "sm_86", profiles=profiles).attention is None


def test_fp8_needs_a_gpu_that_has_it(tmp_path: Path, plans: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="dq"),
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"], name="qw"),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"], name="dqw"),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="linear"),
    ]
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0])
    weights = [weight("w", WIDTH, WIDTH), numpy_helper.from_array(np.float16(0.05), "s"), zero]
    graph = save(tmp_path / "eight.onnx", nodes, weights, ("batch", WIDTH))
    profiles = batches((1, 4, 8), shape=(WIDTH,))
    refused(PlanBuildError, graph, plans, "fp8, which sm_86 lacks", "sm_89 or later", target="sm_86", profiles=profiles)
    assert build(graph, plans, "sm_89", profiles=profiles).plan_bytes > 0


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("strip_weights", "only where a GPU is"),
        ("refit", "only where a GPU is"),
        ("version_compatible", "lean runtime library is not installed"),
        ("hardware_compatibility", "no levels of hardware compatibility"),
    ],
)
def test_what_rtx_cannot_do_here(graph: Path, plans: Path, option: str, words: str) -> None:
    refused(PlanBuildError, graph, plans, words, **{option: True})


def test_options_outside_their_limits(graph: Path, plans: Path) -> None:
    refused(InputError, graph, plans, "from 0 to 5, found 9", optimization_level=9)
    refused(InputError, graph, plans, "at least 1 MiB, found 0", workspace_mib=0)


def test_profiles_must_fit_the_graph(graph: Path, plans: Path) -> None:
    refused(InputError, graph, plans, "no profile is given for the free axes of x *x16x128", profiles=())
    wide = batches((1, 4, 8), shape=(TOKENS, 2 * WIDTH))
    refused(InputError, graph, plans, "profile 1 has x 1x16x256; the graph's is *x16x128", profiles=wide)


def test_what_check_profiles_says() -> None:
    inputs = {"ids": (-1, -1), "eot": (-1,), "scale": (1,)}
    eot = ShapeRange(min=(1,), opt=(2,), max=(4,))
    ids = ShapeRange(min=(1, 2), opt=(2, 8), max=(4, 77))
    check_profiles(
        inputs, [{"ids": ids, "eot": eot}, {"ids": ids, "eot": eot, "scale": ShapeRange(min=(1,), opt=(1,), max=(1,))}]
    )
    check_profiles({"scale": (1,)}, [])
    for profile, words in (
        ({"ids": ids}, "profile 1 gives no range for input eot"),
        ({"ids": ids, "eot": eot, "mask": eot}, "profile 1 names mask; the graph's inputs are ids, eot, scale"),
        ({"ids": eot, "eot": eot}, "profile 1 has ids 1; the graph's is *x*"),
        ({"ids": ids, "eot": eot, "scale": eot}, "profile 1 has scale 2; the graph's is 1"),
    ):
        with pytest.raises(InputError) as caught:
            check_profiles(inputs, [profile])
        assert caught.value.message == words


# The end of a build before its end

# Tests that a shell started in the background ignore SIGINT, and hand that on.
BUILD = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from clip_export.backends import tensorrt_rtx
from clip_export.backends.building import BuildRequest, ShapeRange

def say(what, done, total):
    print(done, flush=True)

shape = (16, 128)
profile = {"x": ShapeRange(min=(1, *shape), opt=(4, *shape), max=(8, *shape))}
request = BuildRequest(
    graph=Path(sys.argv[1]), plan=Path(sys.argv[2]), profiles=(profile,) * 8, compute_capability="sm_89"
)
tensorrt_rtx.build_plan(request, progress=say)
"""


@pytest.fixture
def running(graph: Path, plans: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], psutil.Process]]]:
    """Starts a build in a process of its own and returns it, and its worker, in the middle of compiling."""
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], psutil.Process]:
        command = [sys.executable, "-c", BUILD, str(graph), str(plans / "a.plan")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) > 0:
                break
        (worker,) = psutil.Process(process.pid).children()
        return process, worker

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_the_build_at_once(running: Any, plans: Path) -> None:
    process, worker = running()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert not worker.is_running()
    assert list(plans.iterdir()) == []


def test_ctrl_c_in_the_terminal_does_not_reach_the_worker(running: Any) -> None:
    process, worker = running()
    assert os.getsid(worker.pid) == worker.pid != os.getsid(process.pid)


def test_a_worker_does_not_outlive_its_parent(running: Any) -> None:
    process, worker = running()
    process.kill()
    process.wait()
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


WORKER = """
import os, time
from clip_export.backends import _trt_worker

def build(line, events):
    os.write(1, b"native code prints what it likes")
    events.step(7)
    time.sleep({seconds})
    return {{}}

_trt_worker.build = build
_trt_worker.main()
"""


@pytest.mark.parametrize(("seconds", "status"), [(0, 0), (60, 1)])
def test_a_worker_ends_when_nobody_is_left_to_listen(seconds: int, status: int) -> None:
    command = [sys.executable, "-c", WORKER.format(seconds=seconds)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline()) == {"step": 7}, "standard output holds events and nothing else"
        if seconds:
            worker.stdin.close()  # as when the parent is gone
        assert worker.wait(timeout=20) == status


def test_an_exception_from_progress_ends_the_build(graph: Path, plans: Path) -> None:
    class EnoughError(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done > 0:
            raise EnoughError

    with pytest.raises(EnoughError):
        build(graph, plans, progress=stop)
    assert list(plans.iterdir()) == []
    assert psutil.Process().children() == []


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, ("too little memory", "--jobs 1")), (signal.SIGSEGV, ("crashed", "SIGSEGV"))],
)
def test_a_worker_that_is_killed(graph: Path, plans: Path, number: int, words: tuple[str, ...]) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if 0 < done < STEPS:
            for worker in psutil.Process().children():
                worker.send_signal(number)

    refused(PlanBuildError, graph, plans, "tiny.onnx", *words, progress=kill)


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files is POSIX's")
def test_a_full_disk_leaves_the_old_plan(graph: Path, plans: Path) -> None:
    import resource

    (plans / "a.plan").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"the plan cannot be written into .*plans: file too large") as caught:
            build(graph, plans)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.hint
    assert [path.read_bytes() for path in plans.iterdir()] == [b"old"]
    build(graph, plans)
    assert (plans / "a.plan").stat().st_size > 100_000


def test_the_callback_is_called_while_the_compiler_is_silent(graph: Path, plans: Path) -> None:
    def freeze(what: str, done: int, total: int) -> None:
        calls.append(time.monotonic())
        workers = psutil.Process().children()
        if done > 0 and len(calls) < 1000 and workers and workers[0].status() != psutil.STATUS_STOPPED:
            workers[0].suspend()
            calls[:] = [0.0] * 1000
        elif len(calls) == 1003:
            workers[0].resume()

    calls: list[float] = []
    build(graph, plans, progress=freeze)
    assert len(calls) > 1003


def test_a_large_parent_is_not_the_workers_memory() -> None:
    large = bytearray(400 * 1024 * 1024)
    large[::4096] = b"x" * len(large[::4096])
    code = "from clip_export.backends import _trt_worker; print(_trt_worker.peak_memory_mib())"
    found = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 5 < found < 300


def test_a_bug_in_the_worker_keeps_its_traceback(graph: Path, plans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trt_build, "encode", lambda *_: json.dumps({"module": "tensorrt_rtx"}))
    with pytest.raises(RuntimeError, match=r"ended with 1:\n(.|\n)*KeyError: 'request'"):
        build(graph, plans)


def test_a_request_survives_the_way_to_the_worker(graph: Path, plans: Path) -> None:
    request = BuildRequest(
        graph=graph, plan=plans / "a", profiles=batches((1, 2, 3)), timing_cache=plans / "c", refit=True
    )
    target = tensorrt_rtx.target("sm_89")
    module, found, there = _trt_worker.decode(_trt_worker.encode("tensorrt_rtx", request, target, plans / "part"))
    assert (module, there) == ("tensorrt_rtx", target)
    assert found == BuildRequest(
        graph=graph, plan=plans / "part", profiles=batches((1, 2, 3)), timing_cache=plans / "c", refit=True
    )


def test_progress_of_nested_phases_never_falls() -> None:
    phases = Phases()
    steps = [
        phases.start("all", None, 2),
        phases.start("half", "all", 4),
        phases.advance("half", 1),
        phases.advance("half", 4),
        phases.finish("half"),
        phases.advance("all", 1),
        phases.start("again", "all", 10),
        phases.advance("again", 5),
        phases.finish("again"),
        phases.advance("all", 2),
        phases.finish("all"),
    ]
    assert steps == [0, 0, 125, 500, 500, 500, 500, 750, 750, STEPS - 1, STEPS - 1]
    assert phases.advance("unheard of", 3) == STEPS - 1


# Attention


def parsed_sites(library: _trt_library.Library, graph: Path) -> tuple[_trt_inspect.Site, ...]:
    from clip_export.backends._trt_compile import Compilation

    request = BuildRequest(graph=graph, plan=graph, profiles=batches((1, 2, 4), shape=(HEADS, TOKENS, 64)))
    compilation = Compilation(library, request, library.target("sm_89"), lambda _: None)
    compilation.parse()
    return compilation._sites


def test_attention_is_found_in_what_the_parser_made(library: _trt_library.Library, tmp_path: Path) -> None:
    (site,) = parsed_sites(library, primitive_graph(tmp_path / "primitive.onnx"))
    assert site == _trt_inspect.Site(scores="block.0/Scores", softmax="block.0/Softmax", values="block.0/Values")
    assert site.scope == "block.0"


def test_a_softmax_that_ends_a_classifier_is_no_attention() -> None:
    layers = [
        _trt_inspect.Layer(node="linear", type="MATRIX_MULTIPLY", inputs=("x", "w"), outputs=("a",)),
        _trt_inspect.Layer(node="softmax", type="SOFTMAX", inputs=("a",), outputs=("b",)),
    ]
    assert _trt_inspect.attention_sites(layers) == ()


def inspected(*layers: tuple[str, str, list[str]]) -> str:
    entries = [
        {"Name": name, "LayerType": kind, "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)}
        for name, kind, nodes in layers
    ]
    return json.dumps({"Layers": entries, "Bindings": []})


SITES = tuple(
    _trt_inspect.Site(scores=f"block.{n}/Scores", softmax=f"block.{n}/Softmax", values=f"block.{n}/Values")
    for n in (0, 1)
)
FUSED = ("_gemm_mha_v2", "kgen", ["block.0/Scores", "block.0/Scale", "block.0/Softmax", "block.0/Values"])
FUSED_TOO = ("_gemm_mha_v2_2", "kgen", ["block.1/Scores", "block.1/Softmax", "block.1/Values"])


def test_attention_in_one_layer_of_the_engine_is_fused() -> None:
    assert _trt_inspect.unfused(inspected(FUSED, ("fc", "gemm", ["block.0/fc"]), FUSED_TOO), SITES) == ()


@pytest.mark.parametrize(
    "layers",
    [
        [("a", "gemm", ["block.1/Scores"]), ("b", "kgen", ["block.1/Softmax"]), ("c", "gemm", ["block.1/Values"])],
        # a transposition of the second MatMul sits with the Softmax; the product itself is a kernel of its own
        [("b", "kgen", ["block.1/Scores", "block.1/Softmax", "block.1/Values"]), ("c", "gemm", ["block.1/Values"])],
        [
            (
                "{ForeignNode[block.1/Scores...block.1/Values]}",
                "fused",
                ["block.1/Scores", "block.1/Softmax", "block.1/Values"],
            )
        ],
        [("region", "Myelin", ["block.1/Scores", "block.1/Softmax", "block.1/Values"])],
        [],
    ],
)
def test_attention_in_several_layers_is_named(layers: list[tuple[str, str, list[str]]]) -> None:
    assert _trt_inspect.unfused(inspected(FUSED, *layers), SITES) == ("block.1",)


def test_an_inspector_that_gives_names_only_proves_nothing() -> None:
    assert _trt_inspect.unfused(json.dumps({"Layers": ["_gemm_mha_v2"]}), SITES) == ("block.0", "block.1")


def test_fusion_that_is_required_but_cannot_be_known(tmp_path: Path, plans: Path) -> None:
    graph = primitive_graph(tmp_path / "primitive.onnx")
    profiles = batches((1, 2, 4), shape=(HEADS, TOKENS, 64))
    words = ("primitive.onnx", "cannot be known here", "only a GPU")
    refused(PlanBuildError, graph, plans, *words, profiles=profiles, require_fused_attention=True)
    report = build(graph, plans, profiles=profiles)
    assert (report.attention, report.unfused) == (None, ())


def test_fusion_that_is_required_of_a_graph_without_attention(tmp_path: Path, plans: Path) -> None:
    graph = matmul_graph(tmp_path / "linear.onnx")
    profiles = batches((1, 4, 8), shape=(WIDTH,))
    refused(PlanBuildError, graph, plans, "holds no attention", profiles=profiles, require_fused_attention=True)


def test_fusion_that_is_required_and_proven_by_the_operator(graph: Path, plans: Path) -> None:
    assert build(graph, plans, require_fused_attention=True).attention == "operator"


# What compilers say that are not here

ATTEMPT = _trt_errors.Attempt(title="TensorRT 11.1", graph="text.onnx", compute_capability="sm_90", gpu=True)


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)", DeviceError, "not enough free memory"),
        ("Cuda Runtime (cudaError 35: CUDA driver version is insufficient)", DeviceError, "no NVIDIA driver"),
        (
            "Error Code 10: Internal Error (Could not find any implementation)",
            PlanBuildError,
            "could not compile text.onnx",
        ),
        ("[graph.cpp::compile::12] x" + "y" * 900, PlanBuildError, "…"),
        ("CHECK(status == CUDA_SUCCESS) failed", PlanBuildError, "could not compile text.onnx for sm_90"),
    ],
)
def test_the_compilers_words_become_a_sentence(said: str, kind: type[ClipExportError], words: str) -> None:
    error = _trt_errors.compile_error([("WARNING", "of no interest"), ("ERROR", said)], ATTEMPT)
    assert type(error) is kind
    assert words in error.message
    assert "graph.cpp" not in error.message
    assert error.hint


def test_a_compiler_that_says_nothing() -> None:
    assert "it gave no reason" in _trt_errors.compile_error([], ATTEMPT).message


# The libraries


def module(directory: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(("flavour", "extra"), [(TENSORRT, "[tensorrt]"), (TENSORRT_RTX, "[tensorrt-rtx]")])
def test_a_library_that_is_not_installed(flavour: Any, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, flavour.module, None)
    with pytest.raises(MissingDependencyError) as caught:
        _trt_library.load(flavour)
    assert caught.value.message == f"{flavour.title} is not installed"
    assert f"clip-export{extra}" in str(caught.value.hint)
    status = _trt_library.status(flavour)
    assert (status.works, status.version, status.reason) == (False, None, f"{flavour.title} is not installed")


@pytest.mark.parametrize(
    "text",
    [
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')",
        "import tensorrt_bindings_of_nobody",
        "raise OSError('libnvinfer.so.11: invalid ELF header')",
    ],
)
def test_bindings_without_their_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    module(tmp_path, "tensorrt", text, monkeypatch)
    with pytest.raises(MissingDependencyError, match="TensorRT is installed, but cannot load its libraries") as caught:
        _trt_library.load(TENSORRT)
    assert "NVIDIA's own package index" in str(caught.value.hint)


def test_a_library_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = "__version__ = '8.6.1'\nclass BuilderFlag: FP16 = 1\nclass ILayer: metadata = ''\n"
    module(tmp_path, "tensorrt", old, monkeypatch)
    with pytest.raises(MissingDependencyError) as caught:
        _trt_library.load(TENSORRT)
    assert "TensorRT 8.6.1 is too old: it lacks " in caught.value.message
    assert "IExecutionContext.set_input_shape" in caught.value.message
    assert "STRONGLY_TYPED" in caught.value.message
    assert "ILayer.metadata" not in caught.value.message
    assert "10.12" in str(caught.value.hint)


def test_status_without_a_gpu_says_that_plans_can_be_built() -> None:
    status = tensorrt_rtx.status()
    assert not status.works
    assert status.version is not None
    assert status.reason == "builds plans here, and runs none: there is no NVIDIA driver on this machine"
    assert status.install == "install it"


def test_a_library_for_this_gpu_only_needs_a_gpu(
    library: _trt_library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trt_library.Library, "builds_anywhere", False)  # as full TensorRT, which has no names for GPUs
    for wanted in (None, "sm_89", PORTABLE):
        with pytest.raises(DeviceError, match="builds on the GPU that the plan is for, and finds none") as caught:
            library.target(wanted)
        assert "tensorrt-rtx, which builds anywhere" in str(caught.value.hint)


def test_what_a_target_is(library: _trt_library.Library) -> None:
    target = library.target("sm_120")
    assert (target.backend, target.compute_capability, target.gpu) == ("tensorrt-rtx", "sm_120", None)
    assert library.compute_capabilities[:4] == ("sm_75", "sm_80", "sm_86", "sm_89")
    supported = {name: library.supports(name) for name in ("sm_75", "sm_87", "sm_89", "sm_90", "sm_100", "sm_130")}
    assert supported == {
        "sm_75": True, "sm_87": False, "sm_89": True, "sm_90": False, "sm_100": False, "sm_130": True,
    }  # fmt: skip


def test_a_logger_prints_nothing_and_keeps_what_matters(
    library: _trt_library.Library, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = library.logger()
    severity = library.trt.ILogger
    for kind in (severity.VERBOSE, severity.INFO, severity.WARNING, severity.ERROR, severity.INTERNAL_ERROR):
        logger.log(kind, kind.name)
    assert logger.messages == [(name, name) for name in ("WARNING", "ERROR", "INTERNAL_ERROR")]
    assert capfd.readouterr() == ("", "")


def test_threads_are_gone_after_a_build(graph: Path, plans: Path) -> None:
    before = threading.active_count()
    build(graph, plans)
    assert threading.active_count() == before


# With a GPU


@pytest.fixture(params=[TENSORRT, TENSORRT_RTX], ids=lambda flavour: flavour.backend)
def here(request: pytest.FixtureRequest) -> _trt_library.Library:
    """Each library that is installed, where it supports this GPU."""
    try:
        library = _trt_library.load(request.param)
    except MissingDependencyError as error:
        pytest.skip(error.message)
    gpu = _trt_library.current_gpu()
    if not library.supports(gpu.compute_capability):
        pytest.skip(f"{library.title} does not support {gpu.name}")
    return library


@pytest.mark.gpu
def test_a_plan_for_this_gpu_is_inspected(here: _trt_library.Library, graph: Path, plans: Path) -> None:
    request = BuildRequest(graph=graph, plan=plans / "a.plan", profiles=batches((1, 1, 2), (3, 8, 16)))
    report = _trt_build.build_plan(here, request)
    gpu = _trt_library.current_gpu()
    assert (report.gpu, report.compute_capability) == (gpu.name, gpu.compute_capability)
    assert (report.driver, report.cuda) == (gpu.driver, gpu.cuda)
    assert report.attention == "operator"
    assert report.activation_bytes is not None
    assert len(report.activation_bytes) == 2
    assert report.inspector is not None
    assert json.loads(report.inspector)["Layers"]


@pytest.mark.gpu
def test_written_out_attention_is_looked_up_in_the_engine(
    here: _trt_library.Library, tmp_path: Path, plans: Path
) -> None:
    graph = primitive_graph(tmp_path / "primitive.onnx")
    profiles = batches((1, 2, 4), shape=(HEADS, TOKENS, 64))
    report = _trt_build.build_plan(here, BuildRequest(graph=graph, plan=plans / "a.plan", profiles=profiles))
    assert (report.attention, report.unfused) in [("inspector", ()), (None, ("block.0",))]


@pytest.mark.gpu
def test_a_timing_cache_is_written_and_read_again(here: _trt_library.Library, graph: Path, plans: Path) -> None:
    if here.builds_anywhere:
        pytest.skip("a compiler for named GPUs has no timing cache")
    cache = plans / "timing.cache"
    request = BuildRequest(graph=graph, plan=plans / "a.plan", profiles=batches((1, 4, 8)), timing_cache=cache)
    for content in (None, b"of another release", None):
        if content is not None:
            cache.write_bytes(content)
        report = _trt_build.build_plan(here, request)
        assert not any("timing cache" in warning for warning in report.warnings)
        assert cache.stat().st_size > 100
    assert {path.name for path in plans.iterdir()} == {"a.plan", "timing.cache"}
