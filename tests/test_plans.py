"""Plans: their entry in the manifest, the key that names their folder, the choice among them, down to each sentence."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from bundles_made import PROFILES, SPEC, make_plan
from hypothesis import given
from hypothesis import strategies as st

from clip_export.backends.building import ShapeRange
from clip_export.errors import NoPlanError, SpecError
from clip_export.plan_selection import PREFERENCE, Machine, Selection, explain, select
from clip_export.plans import Plan, gpu_memory_bytes, plan_folder
from clip_export.spec import Tower, from_dict, to_dict

RTX = Machine(backend="tensorrt-rtx", version="1.7.1.116", compute_capability="sm_89", host_code=True)
FULL = Machine(backend="tensorrt", version="10.13.3.9", compute_capability="sm_86", host_code=True)


def full(**changes: Any) -> Plan:
    """A plan that fits FULL."""
    fields = {"backend": "tensorrt", "version": "10.13.3.9", "compute_capability": "sm_86"}
    return make_plan(**fields | changes)


def choose(
    plans: list[Plan],
    machine: Machine = RTX,
    *,
    towers: tuple[Tower, ...] = ("text",),
    precision: str | None = None,
    graphs: dict[str, str] | None = None,
    sizes: dict[str, int] | None = None,
) -> Selection:
    current = {plan.graph: plan.graph_sha256 for plan in plans} if graphs is None else graphs
    return select(plans, machine, towers=towers, precision=precision, graphs=current, sizes=sizes)


def reason(plan: Plan, machine: Machine, **asked: Any) -> str:
    """Why the only plan there is was passed over; empty if it was chosen."""
    selection = choose([plan], machine, **asked)
    assert bool(selection.chosen) == (not selection.passed_over)
    return "" if selection.chosen else selection.passed_over[0][1]


# The folder


def folder(**changes: Any) -> str:
    key: dict[str, Any] = {
        "backend": "tensorrt",
        "version": "10.13.3",
        "compute_capability": "sm_89",
        "precision": "fp16",
        "graphs": {"text": "a" * 64, "image": "b" * 64},
        "profiles": PROFILES,
        "options": {"tf32": "true", "workspace_mib": "512"},
    }
    return plan_folder(**key | changes)


def test_the_folder_is_a_golden_one() -> None:
    """Another name would leave every plan that users have built unfound."""
    assert folder() == "plans/tensorrt-10.13.3-sm_89-fp16-cd51b8ea"


def test_equal_keys_give_one_folder_and_each_change_another() -> None:
    shuffled = {"options": {"workspace_mib": "512", "tf32": "true"}, "graphs": {"image": "b" * 64, "text": "a" * 64}}
    assert folder(**shuffled) == folder()
    changes: list[dict[str, Any]] = [
        {"version": "10.13.4"},
        {"compute_capability": "sm_86"},
        {"precision": "bf16"},
        {"backend": "tensorrt-rtx"},
        {"graphs": {"text": "a" * 64, "image": "c" * 64}},
        {"graphs": {"text": "a" * 64}},
        {"profiles": {"text": PROFILES["text"][:1], "image": PROFILES["image"]}},
        {"profiles": {"text": PROFILES["text"][::-1], "image": PROFILES["image"]}},
        {"options": {"tf32": "true"}},
    ]
    folders = {folder(**change) for change in changes}
    assert len(folders) == len(changes)
    assert folder() not in folders


@given(version=st.text(max_size=40))
def test_the_folder_is_a_path_that_a_bundle_may_hold(version: str) -> None:
    assert re.fullmatch(r"plans/[a-z0-9][a-z0-9._+-]{0,127}", folder(version=version))


# The entry


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file": "text.plan"}, r"'text.plan' is not the place of a plan: expected plans/FOLDER/text.plan"),
        ({"file": "plans/a/b/text.plan"}, "is not the place of a plan"),
        ({"file": "plans/a/image.plan"}, "is not the place of a plan: expected plans/FOLDER/text.plan"),
        ({"file": "../plans/a/text.plan"}, "is not the place of a plan"),
        ({"file": "plans/../text.plan", "inspector": "text.json"}, "expected the JSON of its inspector beside it"),
        ({"inspector": "report.json"}, "expected the JSON of its inspector beside it, found 'report.json'"),
        ({"folder": "plans/a", "inspector": "plans/a/text.plan"}, "expected the JSON of its inspector beside it"),
        ({"version": "../1"}, r"'../1' is not a version"),
        ({"version": ""}, "'' is not a version"),
        ({"version": "1" * 65}, "is not a version"),
        ({"compute_capability": "8.9"}, "'8.9' is not a compute_capability"),
        ({"compute_capability": "sm_089"}, "is not a compute_capability"),
        ({"graph_sha256": "A" * 64}, "is not a graph_sha256"),
        ({"gpu": "\x1b[31m"}, "gpu must be short and printable"),
        ({"driver": "5" * 129}, "driver must be short and printable"),
        ({"options": {"speed": "max"}}, "unknown option speed .known: attention, hardware_compatibility, optimization"),
        ({"options": {"optimization_level": "6"}}, "option optimization_level cannot be '6'"),
        ({"options": {"tf32": "false"}}, "option tf32 cannot be 'false'"),
        ({"options": {"hardware_compatibility": "true"}}, "option hardware_compatibility cannot be 'true'"),
        ({"profiles": ()}, "expected 1 to 64 profiles, found 0"),
        ({"profiles": PROFILES["text"] * 33}, "expected 1 to 64 profiles, found 66"),
        ({"profiles": ({},)}, r"every profile needs the same inputs, found \[\]"),
        ({"profiles": (*PROFILES["text"], *PROFILES["image"])}, r"needs the same inputs, found \['pixels'\]"),
        ({"profiles": ({"x": ShapeRange(min=(), opt=(), max=())},)}, "x has 0 axes"),
        ({"profiles": ({"x": ShapeRange(min=(1,) * 9, opt=(1,) * 9, max=(1,) * 9)},)}, "x has 9 axes"),
        ({"profiles": ({"x": ShapeRange(min=(1,), opt=(1,), max=(2**31,))},)}, r"x cannot be as large as \[2147483648"),
        ({"profiles": ({"x": ShapeRange(min=(1, 1), opt=(1, 1), max=(2**21, 2**20))},)}, "x cannot be as large as"),
        ({"seconds": -1.0}, "building cannot take -1.0 seconds"),
        ({"seconds": 1e300}, r"building cannot take 1e\+300 seconds"),
        ({"peak_memory_mib": 2**62}, "building cannot take 4611686018427387904 MiB"),
        ({"activation_bytes": (1,)}, "expected activation_bytes for each of 2 profiles, found 1"),
        ({"activation_bytes": (1, -1)}, r"expected activation_bytes for each of 2 profiles, found \[1, -1\]"),
    ],
)
def test_an_entry_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make_plan(**changes)


@st.composite
def shape_ranges(draw: st.DrawFn) -> ShapeRange:
    axes = [sorted(draw(st.tuples(*[st.integers(1, 2048)] * 3))) for _ in range(draw(st.integers(1, 3)))]
    low, middle, high = zip(*axes, strict=True)
    return ShapeRange(min=low, opt=middle, max=high)


@st.composite
def any_plan(draw: st.DrawFn) -> Plan:
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=2, unique=True))
    profiles = draw(st.lists(st.fixed_dictionaries({name: shape_ranges() for name in names}), min_size=1, max_size=3))
    count = len(profiles)
    return make_plan(
        draw(st.sampled_from(["text", "image"])),
        folder="plans/drawn",
        profiles=tuple(profiles),
        options=draw(st.fixed_dictionaries({}, optional={"tf32": st.just("true"), "workspace_mib": st.just("64")})),
        seconds=draw(st.floats(0, 1e6)),
        peak_memory_mib=draw(st.integers(0, 10**6)),
        attention=draw(st.sampled_from(["operator", "inspector", None])),
        gpu=draw(st.none() | st.just("NVIDIA L4")),
        activation_bytes=draw(st.none() | st.lists(st.integers(0, 2**40), min_size=count, max_size=count).map(tuple)),
    )


@given(plan=any_plan())
def test_an_entry_survives_json(plan: Plan) -> None:
    assert from_dict(Plan, json.loads(json.dumps(to_dict(plan)))) == plan


# Does it fit?


@pytest.mark.parametrize(
    ("plan", "machine", "words"),
    [
        (make_plan(), RTX, ""),
        (full(), FULL, ""),
        (full(), RTX, "compiled by tensorrt, not by tensorrt-rtx"),
        (make_plan(compute_capability="sm_86"), RTX, "built for sm_86, this GPU is sm_89"),
        (make_plan(compute_capability="portable"), RTX, ""),
        (
            make_plan(compute_capability="portable"),
            dataclasses.replace(RTX, compute_capability="sm_75"),
            "built for sm_80 and later, this GPU is sm_75",
        ),
        (make_plan(compute_capability="portable"), dataclasses.replace(RTX, compute_capability="sm_120"), ""),
        (
            make_plan(compute_capability="portable"),
            dataclasses.replace(RTX, compute_capability="unknown"),
            "built for sm_80 and later, this GPU is unknown",
        ),
        (full(compute_capability="sm_80", options={"hardware_compatibility": "ampere_plus"}), FULL, ""),
        (
            full(compute_capability="sm_80", options={"hardware_compatibility": "ampere_plus"}),
            dataclasses.replace(FULL, compute_capability="sm_75"),
            "built for sm_80 and later, this GPU is sm_75",
        ),
        (full(options={"hardware_compatibility": "same_compute_capability"}), FULL, ""),
        (
            full(compute_capability="sm_80", options={"hardware_compatibility": "same_compute_capability"}),
            FULL,
            "built for sm_80, this GPU is sm_86",
        ),
        (
            make_plan(version="1.7.0.1"),
            RTX,
            "compiled by tensorrt-rtx 1.7.0.1, the version here is 1.7.1.116",
        ),
        (full(version="10.13.3.9+cu12"), FULL, ""),
        (full(version="10.12.0.36"), FULL, "compiled by tensorrt 10.12.0.36, the version here is 10.13.3.9"),
        (full(version="10.12.0.36", options={"version_compatible": "true"}), FULL, ""),
        (
            full(version="10.14.1.48", options={"version_compatible": "true"}),
            FULL,
            "compiled by tensorrt 10.14.1.48, newer than 10.13.3.9 here",
        ),
        (
            full(version="10.13.3.9", options={"version_compatible": "true"}),
            dataclasses.replace(FULL, version="11.4.1"),
            "",
        ),
        (
            full(version="10.13.3.9", options={"version_compatible": "true"}),
            dataclasses.replace(FULL, version="12.0.0"),
            "compiled by tensorrt 10.13.3.9, which is too old even for a version compatible plan: "
            "the version here is 12.0.0",
        ),
        (
            make_plan(version="1.7.0", options={"version_compatible": "true"}),
            RTX,
            "compiled by tensorrt-rtx 1.7.0, the version here is 1.7.1.116",
        ),
        (
            make_plan(compute_capability="sm_86", version="1.6"),
            RTX,
            "compiled by tensorrt-rtx 1.6, the version here is 1.7.1.116; built for sm_86, this GPU is sm_89",
        ),
        (make_plan(precision="int8"), RTX, "its precision int8 is taken only where it is asked for"),
    ],
)
def test_what_fits_and_why_not(plan: Plan, machine: Machine, words: str) -> None:
    assert reason(plan, machine) == words


@pytest.mark.parametrize(
    ("held", "asked", "words"),
    [
        ("fp16", "fp16", ""),
        ("fp16all", "fp16", ""),
        ("int8", "int8", ""),
        ("fp16", "fp32", "its precision is fp16, asked for is fp32"),
        ("fp16", "fp16all", "its precision is fp16, asked for is fp16all"),
    ],
)
def test_a_precision_that_is_asked_for(held: str, asked: str, words: str) -> None:
    assert reason(make_plan(precision=held), RTX, precision=asked) == words


def test_a_stale_plan_is_passed_over() -> None:
    words = "compiled from an earlier text.fp16.onnx, which has changed since"
    assert reason(make_plan(), RTX, graphs={"text.fp16.onnx": "0" * 64}) == words
    assert reason(make_plan(), RTX, graphs={}) == words


def test_a_plan_that_the_memory_cannot_hold() -> None:
    plan = make_plan()
    small = dataclasses.replace(RTX, free_bytes=500 * 2**20)
    words = "its weights take 813 MiB of GPU memory, 500 MiB are free"
    assert reason(plan, small, sizes={plan.file: 812 * 2**20 + 1}) == words
    assert reason(plan, small, sizes={plan.file: 500 * 2**20}) == ""
    assert reason(plan, RTX, sizes={plan.file: 2**60}) == ""


# Which is better?


@pytest.mark.parametrize(
    ("worse", "better", "words"),
    [
        ({"compute_capability": "portable"}, {}, "is built for this GPU alone"),
        ({"options": {"hardware_compatibility": "ampere_plus"}}, {}, "is built for this GPU alone"),
        ({"profiles": PROFILES["text"][:1]}, {}, "has more profiles"),
        ({"folder": "plans/a"}, {"folder": "plans/b"}, "comes later by name"),
    ],
)
def test_the_better_of_two_that_fit(worse: dict[str, Any], better: dict[str, Any], words: str) -> None:
    first, second = make_plan(**worse), make_plan(**better)
    for plans in ([first, second], [second, first]):
        selection = choose(plans)
        assert selection.chosen == {"text": second}
        assert selection.passed_over == ((first, f"fits, but {second.file} {words}"),)


def test_a_newer_version_is_better() -> None:
    options = {"version_compatible": "true"}
    old, new = full(version="10.9.0", options=options), full(version="10.13.0", options=options)
    selection = choose([new, old], FULL)
    assert selection.chosen == {"text": new}
    assert selection.passed_over == ((old, f"fits, but {new.file} is of a newer version"),)


def test_exactness_is_worth_more_than_a_version() -> None:
    options = {"version_compatible": "true"}
    old = full(version="10.9.0", options=options)
    new = full(version="10.13.0", options=options | {"hardware_compatibility": "ampere_plus"})
    assert choose([new, old], FULL).chosen == {"text": old}


def test_precisions_are_preferred_in_the_order_of_the_table() -> None:
    plans = [make_plan(precision=precision) for precision in PREFERENCE]
    for given_up in range(len(PREFERENCE)):
        rest = plans[given_up:]
        selection = choose(rest[::-1])
        assert selection.chosen["text"].precision == PREFERENCE[given_up]
        words = [f"fits, but {PREFERENCE[given_up]} is preferred to {plan.precision}" for plan in rest[:0:-1]]
        assert [why for _, why in selection.passed_over] == words


def test_towers_are_of_one_precision() -> None:
    text16, text32, image32 = make_plan(), make_plan(precision="fp32"), make_plan("image", precision="fp32")
    selection = choose([text16, text32, image32], towers=("text", "image"))
    assert selection.chosen == {"text": text32, "image": image32}
    assert selection.passed_over == ((text16, "fits, but no fp16 plan of the image tower does"),)


def test_half_of_a_pair_is_none() -> None:
    text, image = make_plan(), make_plan("image", compute_capability="sm_120")
    selection = choose([text, image], towers=("text", "image"))
    assert selection.chosen == {}
    assert selection.passed_over == (
        (text, "fits, but no fp16 plan of the image tower does"),
        (image, "built for sm_120, this GPU is sm_89"),
    )


def test_plans_of_other_towers_are_not_looked_at() -> None:
    selection = choose([make_plan(), make_plan("image", compute_capability="sm_75")], towers=("text",))
    assert list(selection.chosen) == ["text"]
    assert selection.passed_over == ()


@given(order=st.permutations(range(6)))
def test_the_order_of_the_manifest_does_not_matter(order: list[int]) -> None:
    plans = [make_plan(folder=f"plans/p{i}", precision=p) for i, p in enumerate(["fp16", "fp16", "bf16"])]
    plans += [make_plan("image", folder=f"plans/p{i}", precision=p) for i, p in enumerate(["fp16", "bf16", "bf16"])]
    selection = choose([plans[i] for i in order], towers=("text", "image"))
    assert {tower: plan.file for tower, plan in selection.chosen.items()} == {
        "text": "plans/p1/text.plan",
        "image": "plans/p0/image.plan",
    }
    assert len(selection.passed_over) == 4


def test_a_plan_with_code_of_its_own_has_to_be_allowed() -> None:
    plan, cautious = full(options={"version_compatible": "true"}), dataclasses.replace(FULL, host_code=False)
    assert choose([plan], FULL).chosen == {"text": plan}
    selection = choose([plan], cautious)
    assert selection.chosen == {}
    assert [reason for _, reason in selection.passed_over] == [
        "version compatible, so it carries code, and EngineOptions(allow_host_code=True) was not given"
    ]
    plain = full()
    assert choose([plan, plain], cautious).chosen == {"text": plain}


def test_a_gpu_that_rtx_does_not_build_for_is_offered_a_portable_plan() -> None:
    error = explain(choose([], dataclasses.replace(RTX, compute_capability="sm_90")))
    assert error.hint is not None
    assert "--engine tensorrt-rtx --gpu portable" in error.hint


# The error


def test_no_plan_fits() -> None:
    plans = [make_plan(compute_capability="sm_86"), make_plan("image", compute_capability="sm_86")]
    error = explain(choose(plans, towers=("text", "image")), bundle="engines/my clip")
    assert isinstance(error, NoPlanError)
    assert error.message == (
        "no plan of the bundle fits tensorrt-rtx 1.7.1.116 on sm_89, for text and image:\n"
        f"  {plans[0].file}: built for sm_86, this GPU is sm_89\n"
        f"  {plans[1].file}: built for sm_86, this GPU is sm_89"
    )
    command = "clip-export build 'engines/my clip' --engine tensorrt-rtx --gpu sm_89 --precision fp16"
    assert error.hint == f"build one with: {command}"


def test_no_plan_at_all() -> None:
    error = explain(choose([], FULL, precision="bf16"))
    assert error.message == "the bundle holds no plan for text; tensorrt 10.13.3.9 on sm_86 needs one"
    assert error.hint == "build one with: clip-export build BUNDLE --engine tensorrt --precision bf16"


def test_hundreds_of_plans_do_not_fill_the_terminal() -> None:
    plans = [make_plan(folder=f"plans/p{i}", compute_capability="sm_86") for i in range(100)]
    lines = explain(choose(plans)).message.splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 80 more"


# Memory


def test_memory_of_a_text_plan() -> None:
    """Batch 8 and 8 tokens: int32 ids and positions in, two embeddings of 4 and one pooled row of 64 out."""
    plan = make_plan(outputs=("embedding", "pooled", "normalized"), activation_bytes=(1000, 3000))
    memory = gpu_memory_bytes(plan, 10_000, SPEC)
    assert memory.weights == 10_000
    assert memory.buffers == 2 * (8 * 8 * 4 + 8 * 4 + 8 * (4 + 64 + 4) * 4)
    assert memory.activations == 3000
    assert memory.at_least == 10_000 + memory.buffers + 3000


def test_memory_of_an_image_plan() -> None:
    """Batch 8: uint8 pixels in, 5 tokens of 64 out. Where no GPU has said so, activations are unknown, not zero."""
    memory = gpu_memory_bytes(make_plan("image", outputs=("hidden_states",)), 10_000, SPEC)
    assert memory.buffers == 2 * (8 * 3 * 16 * 16 + 8 * 5 * 64 * 4)
    assert memory.activations is None
    assert memory.at_least == 10_000 + memory.buffers


def test_a_plan_without_weights_takes_those_of_its_graph() -> None:
    plan = make_plan(options={"strip_weights": "true", "refit": "true"})
    assert plan.needs_graph
    assert gpu_memory_bytes(plan, 10, SPEC, graph_bytes=1000).weights == 1010
    assert not make_plan().needs_graph
    assert gpu_memory_bytes(make_plan(), 10, SPEC, graph_bytes=1000).weights == 10
