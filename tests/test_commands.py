"""The command line as a user has it: what is printed where, with which exit code, in which words."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pictures
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image
from typer.testing import CliRunner, Result

import clip_export
from clip_export.bundle import Bundle, write_manifest
from clip_export.commands import app
from clip_export.commands._group import spread
from clip_export.commands._installed import packages, version_fits
from clip_export.commands._output import columns_width, print_columns, print_json, printable, size_text
from clip_export.commands._progress import Bar

COMMANDS = ["build", "inspect", "verify", "bench", "explain", "embed", "similarity", "context", "doctor"]
CHELSEA, COFFEE = (str(pictures.PHOTOGRAPHS[name]) for name in ("chelsea", "coffee"))


def run(*args: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin, prog_name="clip-export")


def run_process(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clip_export", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def error_of(result: Result, code: int = 1) -> tuple[str, str]:
    """(error, hint) of a command that failed as it should: stdout empty, exit code 1, or `code`."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    match = re.search(r"^error: (.*?)\n(?:\nhint: (.*)\n)?\Z", result.stderr, re.DOTALL | re.MULTILINE)
    assert match is not None, result.stderr
    return match[1], match[2] or ""


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, golden_text: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*filter(None, [command]), "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    golden_text(result.stdout, f"help/{command or 'clip-export'}.txt")


def test_help_loads_nothing_that_is_slow() -> None:
    heavy = ["torch", "onnx", "onnxruntime", "numpy", "PIL", "tokenizers", "transformers", "rich", "pyarrow"]
    for args in (["--help"], ["build", "--help"], ["--version"], ["similarity"]):
        code = f"""
import sys
from clip_export.__main__ import main
sys.argv = ["clip-export", *{args!r}]
try:
    main()
except SystemExit:
    pass
print([name for name in {heavy!r} if name in sys.modules])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    assert run("--version").stdout == f"clip-export {clip_export.__version__}\n"


def test_doors() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, root / "cli.py", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout == run_process("--help").stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["verify"], "Missing argument 'BUNDLE'"),
        (["build", "x", "--towers", "text,visual"], "expected text or image, found 'visual'"),
        (["build", "x", "--towers", ","], "expected text or image, found nothing"),
        (["build", "x", "--activation", "relu"], "'relu'"),
        (["embed", "x", "-o", "y.npy"], "give one of them: --texts FILE or --images PATH..."),
        (["embed", "x", "-o", "y.npy", "--texts", "a", "--images", "b"], "give one of them"),
        (["embed", "x", "-o", "y.npy", "--images", "b", "--truncate"], "only texts can be cut"),
        (["embed", "x", "-o", "y.npy", "--texts", "a", "--batch-size", "0"], "'--batch-size'"),
        (["similarity", "x", "--images", "a", "--texts", "b", "--plto", "c.png"], "--plto"),
    ],
)
def test_usage_errors(args: list[str], words: str) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert result.stderr.startswith("Usage: clip-export ")


# Several values after one flag


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("B --images a b --json", "B --images a --images b --json"),
        ("--images a b --texts x y z", "--images a --images b --texts x --texts y --texts z"),
        ("--images a --images b c", "--images a --images b --images c"),
        ("--images=a b", "--images=a --images b"),
        ("--images -5 b", "--images -5 --images b"),
        ("--texts x - y", "--texts x --texts - --texts y"),
        ("--images a --plot p.png b", "--images a --plot p.png b"),
        ("--images a -- b --images c d", "--images a -- b --images c d"),
        ("--images", "--images"),
        ("--other a b", "--other a b"),
    ],
)
def test_values_are_spread(args: str, expected: str) -> None:
    assert spread(args.split(), {"--images", "--texts"}) == expected.split()


@given(st.lists(st.text(min_size=1).filter(lambda text: not text.startswith("-")), min_size=1))
def test_any_values_are_spread(values: list[str]) -> None:
    found = spread(["--texts", *values], {"--texts"})
    assert found[::2] == ["--texts"] * len(values)
    assert found[1::2] == values


def test_both_ways_of_giving_values(tiny_bundle: Path) -> None:
    short = run("similarity", tiny_bundle, "--images", CHELSEA, COFFEE, "--texts", "a cat", "-1 °C", "--json")
    assert short.exit_code == 2  # a text with a dash in front has its own flag
    short = run(
        "similarity", tiny_bundle, "--images", CHELSEA, COFFEE, "--texts", "a cat", "--texts", "-1 °C", "--json"
    )
    pairs = [("--images", CHELSEA), ("--images", COFFEE), ("--texts", "a cat"), ("--texts", "-1 °C")]
    long = run("similarity", tiny_bundle, *(part for pair in pairs for part in pair), "--json")
    assert short.stdout == long.stdout
    assert json.loads(short.stdout)["texts"] == ["a cat", "-1 °C"]


# build, inspect, verify


def test_build(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("build", tiny_checkpoint, "--towers", "image", "--outputs", "embedding, pooled")
    assert result.exit_code == 0, result.output
    assert result.stdout == "engines/tiny\n"
    assert re.fullmatch(r"built image in [\d.]+ s, [\d.]+ MiB\nnext: clip-export verify engines/tiny\n", result.stderr)
    manifest = Bundle.open("engines/tiny").manifest
    assert manifest.spec.towers == ("image",)
    assert set(manifest.variants["fp32"]["image"].outputs) == {"embedding", "pooled"}
    message, hint = error_of(run("build", tiny_checkpoint, "--towers", "image"))
    assert "already holds a bundle" in message
    assert "--force" in hint
    verified = run("verify", "engines/tiny")
    assert verified.exit_code == 0
    assert re.search(r"^  image +pooled +fp32 .* ok$", verified.stdout, re.MULTILINE)


def test_build_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    message, _ = error_of(run("build", tmp_path, "-o", tmp_path / "out"))
    assert f"no checkpoint in directory {tmp_path}" in message
    assert not (tmp_path / "out").exists()


def test_inspect(tiny_bundle: Path) -> None:
    result = run("inspect", tiny_bundle)
    assert (result.exit_code, result.stderr) == (0, "")
    manifest = Bundle.open(tiny_bundle).manifest
    assert result.stdout.startswith("tiny, bundle schema 4\n")
    for words in (
        "\ntowers\n",
        "77 tokens of 600 -> 2 layers of width 128, 2 heads, quick_gelu, causal -> embedding of 64",
        "32 x 32 pixels in patches of 16 x 16 -> 2 layers of width 128",
        "huggingface dialect; start 598, end 599, padded with 599",
        "short side to 32, bicubic; crop 32; mean 0.4815 0.4578 0.4082, std 0.2686 0.2613 0.2758",
        "12.18 x cosine",  # exp(2.5), which checkpoints_made gives to seed 0
        "input_ids, eot_index",
        "tiny (huggingface)",
        *(f"{name} " for name in manifest.provenance.versions),
        *(entry.sha256 for entry in manifest.files.values()),
    ):
        assert words in result.stdout
    golden = Bundle.open(tiny_bundle).golden()
    assert golden.text is not None
    assert golden.image is not None
    assert f"{len(golden.text.texts)} texts, {len(golden.image.files)} images" in result.stdout


def test_inspect_as_json(tiny_bundle: Path) -> None:
    result = run("inspect", tiny_bundle, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    assert found.pop("golden")["texts"] >= 16
    assert found == {key: value for key, value in manifest.items() if key != "sha256"}


def test_a_damaged_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = _copied(tiny_bundle, tmp_path)
    data = bytearray((copy / "text.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "text.onnx").write_bytes(data)
    for command in ("inspect", "verify"):
        message, hint = error_of(run(command, copy))
        assert message.startswith(f"text.onnx in {copy} is changed: expected sha256 ")
        assert "build the bundle again" in hint


@pytest.mark.parametrize(("command", "code"), [("inspect", 1), ("verify", 2)])
def test_no_bundle(command: str, code: int, tmp_path: Path) -> None:
    message, hint = error_of(run(command, tmp_path), code)
    assert message == f"{tmp_path} is not a bundle: it has no manifest.json"
    assert "clip-export build" in hint
    assert error_of(run(command, tmp_path / "none"), code)[0] == f"{tmp_path}/none does not exist"


def test_verify(tiny_bundle: Path) -> None:
    result = run("verify", tiny_bundle)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("tiny on onnxruntime, cpu\n")
    for tower in ("text", "image"):
        assert re.search(rf"^  {tower} +embedding +fp32 +\d+ +1\.0+ +0\.99999 .* ok$", result.stdout, re.MULTILINE)
    lines = result.stdout.splitlines()
    assert lines[-3:] == [
        "token ids and pixels: equal",
        "hostile inputs, batches, threads, fp32: 12 of 12 checks passed",
        "passed",
    ]
    found = json.loads(run("verify", tiny_bundle, "--json", "--golden-only").stdout)
    expected = clip_export.verify(tiny_bundle, hostile=False).to_dict()
    assert found | {"environment": []} == expected | {"environment": []}  # which has the time


@pytest.mark.parametrize("noise", [0.02, float("nan")])
def test_verify_of_an_engine_that_is_off(tiny_bundle: Path, tmp_path: Path, noise: float) -> None:
    """Weights are moved and the manifest written anew, as a careless tool would leave a bundle."""
    copy = _copied(tiny_bundle, tmp_path)
    manifest = Bundle.open(copy).manifest
    model = onnx.load(copy / "image.onnx")
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    moved = numpy_helper.to_array(largest)
    moved = moved + (noise * np.random.default_rng(0).normal(size=moved.shape)).astype(np.float32)
    largest.CopyFrom(numpy_helper.from_array(moved, largest.name))
    onnx.save(model, copy / "image.onnx")
    (copy / "manifest.json").unlink()
    write_manifest(copy, name="tiny", spec=manifest.spec, provenance=manifest.provenance, variants=manifest.variants)
    result = run("verify", copy)
    assert result.exit_code == 1
    assert re.search(r"^  image +embedding .* FAILED$", result.stdout, re.MULTILINE)
    assert re.search(r"^  text +embedding .* ok$", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("FAILED: below the contract\n")
    as_json = run("verify", copy, "--json")
    assert as_json.exit_code == 1
    rows = {row["tower"]: row for row in json.loads(as_json.stdout)["runs"][0]["rows"]}
    assert (rows["image"]["passed"], rows["text"]["passed"]) == (False, True)
    assert (rows["image"]["min_cosine"] is None) == np.isnan(noise)


def test_unknown_backend(tiny_bundle: Path) -> None:
    assert error_of(run("verify", tiny_bundle, "--backend", "abacus"), 2) == (
        "there is no backend 'abacus'",
        f"choose one of: {', '.join(clip_export.backends.names())}",
    )


def _copied(bundle: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


# embed


def test_embed_images(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "a.png").write_bytes(Path(CHELSEA).read_bytes())
    (folder / "b.png").write_bytes(Path(COFFEE).read_bytes())
    (folder / "notes.txt").write_text("no image")
    output = tmp_path / "out.npy"
    result = run("embed", tiny_bundle, "--images", folder, CHELSEA, "-o", output, "--batch-size", 2)
    assert (result.exit_code, result.stdout) == (0, f"{output}\n")
    assert "note: 3 images; other files left out: 1 .txt\n" in result.stderr
    assert re.search(r"^3 rows of 64 in [\d.]+ s \(\d+ a second\)$", result.stderr, re.MULTILINE)
    with clip_export.load(tiny_bundle) as encoder:
        np.testing.assert_allclose(np.load(output), encoder.encode_image([COFFEE, CHELSEA, CHELSEA]), atol=1e-5)


def test_embed_lists_what_fails(tiny_bundle: Path, tmp_path: Path) -> None:
    damaged, output = tmp_path / "damaged.png", tmp_path / "out.npy"
    damaged.write_bytes(Path(CHELSEA).read_bytes()[:9000])
    args = ["embed", tiny_bundle, "--images", damaged, CHELSEA, tmp_path / "none.png", "-o", output]
    result = run(*args)
    message, hint = error_of(result)
    assert f"failed: '{damaged}' cannot be decoded: " in result.stderr
    assert f"failed: '{tmp_path}/none.png': there is no such file\n" in result.stderr
    assert message.startswith("2 of 3 images cannot be encoded, and nothing was written; the first: image 0: ")
    assert "--skip-errors" in hint
    assert not output.exists()
    skipped = run(*args, "--skip-errors")
    assert (skipped.exit_code, skipped.stdout) == (0, f"{output}\n")
    assert skipped.stderr.count("failed: ") == 2
    assert "1 rows of 64" in skipped.stderr
    assert "; 2 left out, listed above\n" in skipped.stderr


def test_embed_texts_from_a_file_and_from_stdin(tiny_bundle: Path, tmp_path: Path) -> None:
    text = "a cat\r\n\r\nein Hund auf dem Sofa\n猫"
    (tmp_path / "texts.txt").write_bytes(text.encode())
    for name, source, stdin in (("a", tmp_path / "texts.txt", None), ("b", "-", text.encode())):
        result = run("embed", tiny_bundle, "--texts", source, "-o", tmp_path / f"{name}.npy", stdin=stdin)
        assert result.exit_code == 0, result.output
    with clip_export.load(tiny_bundle) as encoder:
        expected = encoder.encode_text(["a cat", "", "ein Hund auf dem Sofa", "猫"])
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-5)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_embed_names_lines(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes(b"a cat\ncaf\xe9\n" + b"long " * 300)
    args = ["embed", tiny_bundle, "--texts", tmp_path / "texts.txt", "-o", tmp_path / "a.npy", "--no-truncate"]
    result = run(*args)
    assert "failed: line 2: not UTF-8: byte 0xe9 at position 3\n" in result.stderr
    assert re.search(r"^failed: line 3: .*77", result.stderr, re.MULTILINE)
    assert error_of(result)[0].startswith("2 of 3 texts cannot be encoded")
    assert run(*args, "--skip-errors", "--truncate").exit_code == 0
    assert np.load(tmp_path / "a.npy").shape == (2, 64)


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (
            ["--texts", "{}/none.txt", "-o", "{}/a.npy"],
            "none.txt cannot be read: No such file or directory",
            "- for stdin",
        ),
        (["--texts", "{}", "-o", "{}/a.npy"], "cannot be read: Is a directory", "- for stdin"),
        (["--texts", "{}/empty", "-o", "{}/a.npy"], "there are no texts to encode", "at least one text"),
        (["--images", "{}", "-o", "{}/a.npy"], "expected image files in {}, found only 1 other file", "check the path"),
        (["--texts", "{}/empty", "-o", "{}/a.csv"], "the suffix '.csv' means no format", "OUT.npy or OUT.parquet"),
        (["--texts", "{}/empty", "-o", "{}/no/a.npy"], "there is no directory {}/no", "mkdir -p {}/no"),
    ],
)
def test_embed_refuses(tiny_bundle: Path, tmp_path: Path, args: list[str], message: str, hint: str) -> None:
    (tmp_path / "empty").touch()
    found = error_of(run("embed", tiny_bundle, *(arg.format(tmp_path) for arg in args)))
    assert message.format(tmp_path) in found[0]
    assert hint.format(tmp_path) in found[1]
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# similarity


def test_similarity(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    texts = ["a tabby cat", "une tasse de café", "猫"]
    result = run("similarity", tiny_bundle, "--images", CHELSEA, COFFEE, "--texts", *texts)
    assert (result.exit_code, result.stderr) == (0, "")
    with clip_export.load(tiny_bundle) as encoder:
        expected = encoder.similarity([CHELSEA, COFFEE], texts)
    heading, *rows = result.stdout.splitlines()
    assert [part for part in re.split(r"\s{2,}", heading) if part] == texts
    for name, row, values in zip(("chelsea.png", "coffee.png"), rows, expected, strict=True):
        found = row.split()
        assert found[0] == name
        np.testing.assert_allclose([float(cell.strip("*")) for cell in found[1:]], values, atol=0.0051)
        assert [cell.startswith("*") for cell in found[1:]] == [i == values.argmax() for i in range(3)]


def test_similarity_where_there_is_little_room(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    texts = ["a photo of a tabby cat that looks at you", "a cup of coffee"]
    lines = run("similarity", tiny_bundle, "--images", CHELSEA, "--texts", *texts).stdout.splitlines()
    assert lines[0].split() == ["1", "2"]
    assert lines[1].split()[0] == "chelsea.png"
    assert lines[2:] == ["", f"  1  {texts[0]}", f"  2  {texts[1]}"]


def test_similarity_as_json_and_softmax(tiny_bundle: Path) -> None:
    args = ["similarity", tiny_bundle, "--images", CHELSEA, COFFEE, "--texts", "a cat", "coffee", "--json"]
    plain, soft = (json.loads(run(*args, *more).stdout) for more in ([], ["--softmax"]))
    assert set(plain) == {"images", "texts", "similarity"}
    assert plain["images"] == [CHELSEA, COFFEE]
    matrix = np.array(plain["similarity"])
    with clip_export.load(tiny_bundle) as encoder:
        np.testing.assert_array_equal(
            matrix.astype(np.float32), encoder.similarity([CHELSEA, COFFEE], ["a cat", "coffee"])
        )
    exponentials = np.exp(matrix)
    np.testing.assert_allclose(soft["probability"], exponentials / exponentials.sum(axis=1, keepdims=True), rtol=1e-6)


def test_similarity_as_a_picture(tiny_bundle: Path, tmp_path: Path) -> None:
    args = ["similarity", tiny_bundle, "--images", CHELSEA, "--texts", "a cat", "--plot"]
    assert run(*args, tmp_path / "a.png").exit_code == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGB"
    assert "expected a suffix for a picture, found '.xyz'" in error_of(run(*args, tmp_path / "a.xyz"))[0]


def test_similarity_of_images_that_are_not(tiny_bundle: Path, tmp_path: Path) -> None:
    message, _ = error_of(run("similarity", tiny_bundle, "--images", tmp_path / "none.png", "--texts", "a"))
    assert "none.png': there is no such file" in message


# doctor


def test_doctor() -> None:
    result = run("doctor")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"python    {sys.version.split()[0]}, {sys.executable}" in result.stdout
    for name in ("numpy", "tokenizers", "torch"):
        assert re.search(rf"^  {name} +{re.escape(metadata.version(name))}$", result.stdout, re.MULTILINE)
    assert re.search(r"^  onnxruntime .* works: .*CPUExecutionProvider", result.stdout, re.MULTILINE)
    assert "\nwhat to install\n" in result.stdout


def test_doctor_as_json() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["clip_export"] == clip_export.__version__
    assert {"export", "cpu", "cuda", "parquet"} <= set(found["extras"])
    assert "dev" not in found["extras"]
    assert found["extras"]["cpu"] == []
    assert {package["name"] for package in found["packages"]["base"]} >= {"numpy", "pillow", "tokenizers", "typer"}


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process where onnxruntime cannot be imported and the metadata of pyarrow are gone."""
    code = """
import importlib.metadata, sys
sys.modules["onnxruntime"] = None
real = importlib.metadata.version
def version(name):
    if name == "pyarrow":
        raise importlib.metadata.PackageNotFoundError(name)
    return "1.0" if name == "torch" else real(name)
importlib.metadata.version = version
from clip_export.__main__ import main
sys.argv = ["clip-export", "doctor"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^  torch +1\.0 +needs torch>=2", done.stdout, re.MULTILINE)
    assert re.search(r"^  pyarrow +not installed +needs pyarrow>=15", done.stdout, re.MULTILINE)
    assert "extra export (to build bundles from checkpoints): incomplete" in done.stdout
    assert re.search(
        r"^  onnxruntime +does not work: onnxruntime is installed but cannot be imp", done.stdout, re.MULTILINE
    )
    for advice in ("clip-export[export]", "clip-export[parquet]", "clip-export[cpu]"):
        assert done.stdout.count(f"pip install '{advice}'") == 1


def test_requirements_of_a_checkout_are_those_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_export.commands import _installed

    monkeypatch.setattr(_installed, "NAME", "no-such-distribution")
    checkout = packages()
    monkeypatch.undo()
    installed = packages()
    assert set(checkout) == set(installed)
    for extra, group in installed.items():
        assert {package.name for package in checkout[extra]} == {package.name for package in group}


@pytest.mark.parametrize("clauses", ["", ">=2.9,<2.14", "==2.6.0", "!=1.0", "~=2.9.1", "<=3", ">2.9"])
@pytest.mark.parametrize("version", ["2.9", "2.13.0", "2.14", "2.6.0", "1.0", "3", "2.9.1", "2.9.7", "3.0.1"])
def test_version_ranges(version: str, clauses: str) -> None:
    """Against packaging, which implements PEP 440."""
    from packaging.specifiers import SpecifierSet

    assert version_fits(version, clauses) == SpecifierSet(clauses).contains(version)


# How things are said


def test_errors_of_the_disk_are_sentences(tiny_bundle: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    for args in (["inspect", tiny_bundle], ["--help"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "clip_export", *args],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 1
        assert done.stderr == "error: no space left on device\n\nhint: free some space, or write to another disk\n"


def test_a_file_that_may_not_grow(tiny_bundle: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    for name in ("a.npy", "a.parquet"):
        output = tmp_path / name
        args = ("embed", tiny_bundle, "--texts", "-", "-o", output)
        done = run_process(*args, input="\n".join(map(str, range(600))), preexec_fn=limit)
        assert done.returncode == 1
        assert f"error: {output} cannot be written: file too large\n\nhint: write fewer rows" in done.stderr
        assert not list(tmp_path.iterdir())


def test_a_closed_pipe_is_quiet(tiny_bundle: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "clip_export", "inspect", tiny_bundle],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_an_interruption_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    """A real SIGINT, at a moment that the test chooses: between the second text and the third."""
    code = f"""
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
from clip_export import inputs
from clip_export.__main__ import main
real = inputs.read_lines
def read_lines(file):
    for number, line in enumerate(real(file)):
        if number == 2:
            print(len(list(pathlib.Path({str(tmp_path)!r}).iterdir())), flush=True)
            signal.raise_signal(signal.SIGINT)
        yield line
inputs.read_lines = read_lines
sys.argv = ["clip-export", "embed", {str(tiny_bundle)!r}, "--texts", "-", "-o", {str(tmp_path / "a.npy")!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], input="a\nb\nc\n", capture_output=True, text=True, check=False)
    assert done.stdout == "2\n"  # the two files that were being written, under hidden names
    assert done.stderr == "interrupted; nothing half-written was left\n"
    assert done.returncode == 130
    assert not list(tmp_path.iterdir())


def test_warnings_are_lines(tiny_bundle: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(deep)
    done = run_process("embed", tiny_bundle, "--images", deep, "-o", tmp_path / "a.npy")
    assert done.returncode == 0
    assert done.stderr.count("warning: ") == 1
    assert re.search(r"^warning: '.*deep\.png': levels outside 0\.\.255 are clipped", done.stderr, re.MULTILINE)


def test_bugs_keep_their_traceback(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Bundle, "open", broken)
    result = run("inspect", tiny_bundle)
    assert isinstance(result.exception, ZeroDivisionError)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    message, _ = error_of(run("inspect", tmp_path / "\x1b[31mred"))
    assert "\\x1b[31mred" in message
    assert printable("a\x1bb\nc\td\u202e") == "a\\x1bb\nc\\td\\u202e"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_in_a_terminal_and_cleared() -> None:
    stream = Terminal()
    with Bar(stream, delay_s=0) as bar:
        bar("reading [weights]", 1, 4)
        bar._timer.join()
        bar._display.refresh()
        bar("exporting", 3, 4)
        bar._display.refresh()
    assert "reading [weights]" in stream.getvalue()
    assert "3/4" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize(("stream", "delay_s"), [(io.StringIO(), 0), (Terminal(), 60)])
def test_progress_is_silent(stream: io.StringIO, delay_s: float) -> None:
    with Bar(stream, delay_s=delay_s) as bar:
        bar("working", 1, 2)
        if delay_s == 0 and bar._timer.is_alive():
            bar._timer.join()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3_879_731, "3.7 MiB"),
        (2**41, "2.0 TiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text


def test_columns_line_up_in_any_script(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["", "猫", "a"], ["x\ny", "1", "22.5"]]
    print_columns(rows, numbers=True)
    assert capsys.readouterr().out == "       猫     a\n  x y   1  22.5\n"
    assert columns_width(rows) == 15


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": "é\udce9"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"a": [None, 1.5, [None]], "b": "é\udce9"}


def test_embed_does_not_replace_what_it_reads(tiny_bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "keep.rows.jsonl"
    source.write_text("a\nb\n")
    found = CliRunner().invoke(
        app, ["embed", str(tiny_bundle), "--texts", str(source), "-o", str(tmp_path / "keep.npy")]
    )
    assert found.exit_code == 1
    assert "would be replaced by what is written" in found.stderr
    assert source.read_text() == "a\nb\n"
