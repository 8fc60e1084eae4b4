"""Publishing: whatever happens to a build, the target is the old bundle, the new one, or nothing; never half of one."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles_made import fill, make_plan, with_plans
from crashing import leave_as_killed_between_the_renames

from clip_export.bundle import Bundle, write_manifest
from clip_export.errors import (
    BundleBusyError,
    BundleError,
    BundleIntegrityError,
    BundleNotFoundError,
    BundleSchemaError,
    ClipExportError,
)
from clip_export.publish import discard, extended, staged

TESTS = Path(__file__).parent
PRELUDE = """
import os, signal, sys
from pathlib import Path
from bundles_made import fill, with_plans
from clip_export.bundle import Bundle
from clip_export.errors import ClipExportError, BundleBusyError
from clip_export.publish import extended, staged
target = Path(sys.argv[1])
"""


def build(target: Path, name: str = "small", *, force: bool = False) -> None:
    with staged(target, force=force) as staging:
        fill(staging, name)


def script(body: str, target: Path, *, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Run `body` in a process of its own, with `target` defined."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [*prefix, sys.executable, "-c", PRELUDE + body, str(target)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_bundle_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "engines" / "deep" / "a-clip"
    with staged(target) as staging:
        assert staging.parent == target.parent
        assert staging.name.startswith(".a-clip.building-")
        assert names(staging) == []
        fill(staging)
        assert not target.exists()
    assert Bundle.open(target).name == "small"
    assert names(target.parent) == ["a-clip"]


def test_it_is_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        build(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750


def test_relative_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    build(Path("a"))
    build(Path("x/../b"))
    build(Path("../c"))
    assert names(tmp_path / "here") == ["a", "b", "x"]
    assert names(tmp_path) == ["c", "here"]


@pytest.mark.parametrize("name", ["with space", "ünï", "a*b[c]", "a.building-0123abcd", ".hidden", "-"])
def test_unusual_names(tmp_path: Path, name: str) -> None:
    build(tmp_path / name)
    build(tmp_path / name, "second", force=True)
    assert names(tmp_path) == [name]


def test_a_build_touches_only_its_own_leavings(tmp_path: Path) -> None:
    others = [".a.building-12345678", ".ab.building-12345678", ".a.building-xyz", ".a.replaced-12345678x", "a.lock"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    build(tmp_path / "a")
    assert names(tmp_path) == sorted(["a", *others[1:]])


# The target before the build


def test_a_bundle_is_replaced_only_by_force(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target, "old")
    with pytest.raises(BundleError, match="already holds a bundle") as raised:
        build(target, "new")
    assert raised.value.hint == "replace it with --force"
    assert Bundle.open(target).name == "old"
    build(target, "new", force=True)
    assert Bundle.open(target).name == "new"
    assert names(tmp_path) == ["a"]


def test_a_damaged_bundle_and_a_newer_one_are_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target)
    (target / "text.onnx").unlink()
    (target / "image.onnx").write_bytes(b"")
    manifest = (target / "manifest.json").read_bytes()
    (target / "manifest.json").write_bytes(manifest.replace(b'"schema_version": 4', b'"schema_version": 7'))
    build(target, "new", force=True)
    assert Bundle.open(target).name == "new"


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    build(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def _notes_in_a_bundle(target: Path) -> None:
    build(target)
    (target / "notes.txt").write_text("mine")


def _git_in_a_bundle(target: Path) -> None:
    build(target)
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").write_text("mine")


def _damaged_manifest(target: Path) -> None:
    build(target)
    (target / "manifest.json").write_bytes(b"{")


def _web_extension(target: Path) -> None:
    target.mkdir()
    (target / "manifest.json").write_text('{"manifest_version": 3, "name": "an extension", "files": {}}')


def _directory(target: Path) -> None:
    (target / "photos").mkdir(parents=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_notes_in_a_bundle, "it holds notes.txt, which the bundle does not list"),
        (_git_in_a_bundle, "it holds .git/HEAD, which the bundle does not list"),
        (_damaged_manifest, "it is not a bundle: manifest.json is not valid JSON"),
        (_web_extension, "it is not a bundle: its manifest.json is that of another program"),
        (_directory, "it is not a bundle: .* it has no manifest.json"),
        (lambda target: target.write_text("mine"), "is a file"),
        (lambda target: target.symlink_to("/nowhere"), "is a symbolic link to /nowhere"),
        (lambda target: target.symlink_to(target.parent), "is a symbolic link to"),
    ],
)
def test_what_is_not_ours_is_never_touched(
    tmp_path: Path, prepare: Callable[[Path], object], words: str, force: bool
) -> None:
    target = tmp_path / "a"
    prepare(target)
    before = sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=words) as raised:
        build(target, force=force)
    assert raised.value.hint
    assert sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before


def test_what_the_user_adds_during_a_build_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target, "old")
    with pytest.raises(BundleError, match=r"it holds notes\.txt"), staged(target, force=True) as staging:
        fill(staging)
        (target / "notes.txt").write_text("mine")
    assert (target / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("target", ["/", ".", "", "..", "../here", "../../here/..", "/tmp/.."])
def test_the_current_directory_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(BundleError, match=r"is the current directory, or holds it|is not a bundle"):
        build(Path(target), force=True)
    assert names(tmp_path) == ["here"]
    assert names(tmp_path / "here") == []


def test_a_place_inside_a_bundle(tmp_path: Path) -> None:
    build(tmp_path / "a")
    with pytest.raises(BundleError, match="lies inside the bundle"):
        build(tmp_path / "a" / "b")
    assert Bundle.open(tmp_path / "a").name == "small"


def test_a_nul_in_the_path(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="it holds a NUL"):
        build(Path(f"{tmp_path}/a\0b"))


# The build fails


@pytest.mark.parametrize(
    "error", [RuntimeError("torch"), KeyboardInterrupt(), SystemExit(3), FileNotFoundError(2, "x")]
)
def test_what_the_block_raises_comes_out_and_nothing_stays(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a"
    build(target, "old")
    with pytest.raises(type(error)) as raised, staged(target, force=True) as staging:
        fill(staging)
        raise error
    assert raised.value is error
    assert Bundle.open(target).name == "old"
    assert names(tmp_path) == ["a"]


def test_an_incomplete_bundle_is_not_published(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with pytest.raises(BundleNotFoundError, match=r"it has no manifest\.json"), staged(target):
        pass
    with pytest.raises(BundleError, match=r"late.onnx in .* is not listed"), staged(target) as staging:
        fill(staging)
        (staging / "late.onnx").touch()
    with pytest.raises(BundleError, match=r"report.json is missing from"), staged(target) as staging:
        fill(staging)
        (staging / "report.json").unlink()
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "second rename"])
def test_a_disk_that_fails_while_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    target = tmp_path / "a"
    build(target, "old")
    rename = Path.rename

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    def rename_all_but_staging(self: Path, to: Path) -> Path:
        if ".building-" in self.name and to == target:
            raise OSError(code, os.strerror(code), str(self))
        return rename(self, to)

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "rename", rename_all_but_staging)
    with pytest.raises(BundleError, match=f"cannot write {target}: {os.strerror(code)}") as raised:
        build(target, "new", force=True)
    assert isinstance(raised.value.__cause__, OSError)
    assert Bundle.open(target).name == "old"
    assert names(tmp_path) == ["a"]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    build(tmp_path / "a", "old")
    body = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with staged(target, force=True) as staging:
        fill(staging)
except ClipExportError as error:
    print(error)
"""
    output, errors = script(body, tmp_path / "a").communicate()
    assert errors == ""
    assert output == (
        f"cannot write {tmp_path}/a: File too large\nhint: free some space, or choose another place with -o\n"
    )
    assert Bundle.open(tmp_path / "a").name == "old"
    assert names(tmp_path) == ["a"]


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """On a real file system of 64 KiB, mounted where only the child sees it."""
    mount = (
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=64k t {tmp_path} && "$@"',
        "sh",
    )
    probe = subprocess.run([*mount, "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {probe.stderr.decode().strip()}")
    body = """
with staged(target) as staging:
    fill(staging, "old")
try:
    with staged(target, force=True) as staging:
        fill(staging)
        (staging / "text.onnx.data").write_bytes(bytes(100_000))
except ClipExportError as error:
    print(error.message)
print(Bundle.open(target).name, os.listdir(target.parent))
"""
    output, errors = script(body, tmp_path / "a", prefix=mount).communicate()
    assert errors == ""
    assert output == f"cannot write {tmp_path}/a: No space left on device\nold ['a']\n"


def test_a_place_that_may_not_be_written() -> None:
    body = """
if os.geteuid() == 0:
    os.setuid(65534)
try:
    with staged(target) as staging:
        fill(staging)
except ClipExportError as error:
    print(error)
"""
    # Not tmp_path, whose parents only the user who runs the tests may enter.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name).resolve()
        directory.chmod(0o555)
        output, errors = script(body, directory / "a").communicate()
        assert errors == ""
        assert output == (
            f"cannot write {directory}/a: Permission denied ({directory}/.a.lock)\n"
            "hint: check the permissions, or choose another place with -o\n"
        )
        assert names(directory) == []


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match=r"cannot write .*: (File exists|Not a directory)"):
        build(tmp_path / "file" / "a")


# Killed, and more than one


@pytest.mark.parametrize(("mode", "expected"), [
    ("new", {"nothing", "new"}),
    ("replace", {"old", "new", "old aside"}),
    ("recover", {"old", "new", "old aside"}),
])  # fmt: skip
def test_killed_at_every_operation(tmp_path: Path, mode: str, expected: set[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "crashing.py"), str(tmp_path), mode]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    crashes = [line.split(" ", 1) for line in done.stdout.splitlines()]
    operations = Counter(operation for operation, _ in crashes)
    assert {found for _, found in crashes} == expected
    assert operations["os.rename"] == {"new": 1, "replace": 3, "recover": 4}[mode]
    assert len(crashes) > 25


HOLD = """
with staged(target) as staging:
    (staging / "text.onnx").write_bytes(b"half")
    print("inside", flush=True)
    sys.stdin.read(1)
"""


def test_two_builders_and_a_kill(tmp_path: Path) -> None:
    target = tmp_path / "a"
    first = script(HOLD, target)
    assert first.stdout is not None
    assert first.stdout.readline() == "inside\n"
    with pytest.raises(BundleBusyError, match=f"another process is building {target}"):
        build(target)
    build(tmp_path / "b")  # another name is free
    left = names(tmp_path)
    assert len(left) == 3
    assert left[:2] == [".a.building-" + left[0][-8:], ".a.lock"]
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert names(tmp_path) == left
    build(target)
    assert names(tmp_path) == ["a", "b"]


def test_a_bundle_that_was_being_replaced_is_put_back_first(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target, "old")
    leave_as_killed_between_the_renames(target)
    with pytest.raises(BundleNotFoundError, match=r"the bundle that was there is .*/\.a\.replaced-0123abcd"):
        Bundle.open(target)
    with pytest.raises(BundleError, match="already holds a bundle"):
        build(target, "new")
    assert Bundle.open(target).name == "old"
    assert names(tmp_path) == ["a"]


def test_ctrl_c_cleans_up(tmp_path: Path) -> None:
    # A shell starts jobs in the background with SIGINT ignored, and Python leaves it so.
    process = script("signal.signal(signal.SIGINT, signal.default_int_handler)\n" + HOLD, tmp_path / "a")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert "KeyboardInterrupt" in errors
    assert names(tmp_path) == []


def test_one_thread_locks_out_another_of_the_same_process(tmp_path: Path) -> None:
    with staged(tmp_path / "a") as staging:
        fill(staging)
        with pytest.raises(BundleBusyError):
            build(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_builders_exclude_each_other(tmp_path: Path) -> None:
    """Four processes build one target over and over: the file that marks the inside is never there already."""
    body = """
built = 0
while built < 6:
    try:
        with staged(target, force=True) as staging:
            marker = os.open(target.parent / "inside", os.O_CREAT | os.O_EXCL)
            fill(staging, str(os.getpid()))
            os.close(marker)
            os.unlink(target.parent / "inside")
        built += 1
    except BundleBusyError:
        pass
print(built)
"""
    processes = [script(body, tmp_path / "a") for _ in range(4)]
    assert [process.communicate() for process in processes] == [("6\n", "")] * 4
    assert names(tmp_path) == ["a"]
    assert Bundle.open(tmp_path / "a").name in {str(process.pid) for process in processes}


def test_reading_while_it_is_replaced(tmp_path: Path) -> None:
    """A reader gets one bundle or the other, or an error of ours; never a mixture, and never a bare OSError."""
    target = tmp_path / "a"
    build(target, "0")
    body = """
for n in range(1, 26):
    with staged(target, force=True) as staging:
        fill(staging, str(n))
"""
    writer = script(body, target)
    seen = set()
    while writer.poll() is None:
        try:
            bundle = Bundle.open(target)
        except BundleError:
            continue
        seen.add(int(bundle.name))
    assert writer.communicate() == ("", "")
    assert Bundle.open(target).name == "25"
    assert len(seen) > 1


# Extending


def extend(target: Path) -> None:
    """Add fp16 graphs and a plan of each."""
    with extended(target) as (bundle, staging):
        with_plans(staging, known=bundle)


def snapshot(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of writing and bytes of every file, hidden or not."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(f.relative_to(directory)): (f.stat().st_ino, f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def test_a_bundle_is_extended(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target)
    with extended(target) as (bundle, staging):
        assert bundle == Bundle.open(target)
        assert names(staging) == ["golden.safetensors", "image.onnx", "report.json", "text.onnx", "tokenizer.json"]
        with_plans(staging, known=bundle)
        assert Bundle.open(target).manifest.plans == ()
    assert [plan.tower for plan in Bundle.open(target).manifest.plans] == ["image", "text"]
    assert names(tmp_path) == ["a"]


def test_what_is_there_is_linked_and_not_copied(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target)
    before = snapshot(target)
    extend(target)
    between = snapshot(target)
    extend_again(target)
    after = snapshot(target)
    shared = {"golden.safetensors", "image.onnx", "text.onnx", "tokenizer.json"}
    assert {name for name in before if before[name] == between[name]} == shared
    assert {name for name in between if between[name] == after[name]} == between.keys() - {
        "report.json",
        "manifest.json",
        "image.fp16.onnx.data",  # weights with a second hard link are refused by ONNX's libraries
    }
    assert all((target / name).stat().st_nlink == 1 for name in after)


def extend_again(target: Path) -> None:
    """A second plan beside those that `extend` added, whose graphs and files are left alone."""
    with extended(target) as (bundle, staging):
        plan = make_plan(folder="plans/later")
        (staging / plan.file).parent.mkdir(parents=True)
        (staging / plan.file).write_bytes(b"later")
        old = bundle.manifest
        write_manifest(
            staging,
            name=old.name,
            spec=old.spec,
            provenance=old.provenance,
            variants=old.variants,
            plans=[*old.plans, plan],
            known=bundle,
        )


def test_caches_of_running_plans_go_along(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target)
    extend(target)
    folder = target / "plans" / "both"
    (folder / ".runtime.text.cache").write_bytes(b"compiled here")
    (folder / ".runtime.text.cache.123").write_bytes(b"half writ")
    (folder / ".runtime.link.cache").symlink_to(tmp_path)
    extend_again(target)
    assert names(folder) == [".runtime.text.cache", "image.plan", "text.plan"]
    assert (folder / ".runtime.text.cache").read_bytes() == b"compiled here"


def test_a_file_is_replaced_beside_the_old_one(tmp_path: Path) -> None:
    """Old readers keep the old bytes: what they have open is never written to."""
    target = tmp_path / "a"
    build(target)
    extend(target)
    kept = tmp_path / "kept"
    shutil.copytree(target, kept, copy_function=os.link)
    before = snapshot(kept)
    with extended(target) as (bundle, staging), (target / "text.fp16.onnx").open("rb") as reader:
        beside = staging / "beside"
        beside.write_bytes(b"another half")
        beside.rename(staging / "text.fp16.onnx")
        discard(staging, "plans/both/image.plan")
        (staging / "plans" / "both" / "image.plan").write_bytes(b"another plan")
        (staging / "report.json").write_text('{"layers": 2}')
        write_manifest(
            staging,
            name=bundle.name,
            spec=bundle.spec,
            provenance=bundle.manifest.provenance,
            variants=bundle.manifest.variants,
            known=bundle,
        )
        assert reader.read() == b"half of text.fp16.onnx"
    assert snapshot(kept) == before
    assert Bundle.open(target).report() == {"layers": 2}
    assert (target / "text.fp16.onnx").read_bytes() == b"another half"
    assert Bundle.open(kept).name == "small"


def test_discarding(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target)
    extend(target)
    before = snapshot(target)
    with pytest.raises(ZeroDivisionError), extended(target) as (_, staging):
        discard(staging, "plans/both")
        discard(staging, "text.fp16.onnx")
        discard(staging, "nothing/here")
        assert names(staging / "plans") == []
        assert "text.fp16.onnx" not in names(staging)
        for name in ("..", "../a", "plans/../../a", "/etc/passwd", "", "."):
            with pytest.raises(BundleError, match="is no file inside the bundle"):
                discard(staging, name)
        raise ZeroDivisionError
    assert snapshot(target) == before


def test_a_link_that_is_written_through_is_noticed(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target)
    with (
        pytest.raises(BundleIntegrityError, match=r"text.onnx in .*/a was written to while the bundle was extended"),
        extended(target) as (bundle, staging),
    ):
        (staging / "text.onnx").write_bytes(b"graph of SMALL")
        with_plans(staging, known=bundle)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP])
def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    target = tmp_path / "a"
    build(target)
    before = snapshot(target)

    def no_link(source: Path, destination: Path) -> None:
        raise OSError(code, os.strerror(code), str(source), None, str(destination))

    monkeypatch.setattr(os, "link", no_link)
    extend(target)
    after = snapshot(target)
    assert {name for name in before if before[name][2] == after[name][2]} == before.keys() - {"manifest.json"}
    assert not {inode for inode, *_ in before.values()} & {inode for inode, *_ in after.values()}
    assert len(Bundle.open(target).manifest.plans) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["link", "fsync", "rename"])
def test_a_disk_that_fails_while_extending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    target = tmp_path / "a"
    build(target)
    before = snapshot(target)
    rename = Path.rename

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    def rename_all_but_staging(self: Path, to: Path) -> Path:
        return fail() or self if ".building-" in self.name and to == target else rename(self, to)

    if call == "rename":
        monkeypatch.setattr(Path, "rename", rename_all_but_staging)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(BundleError, match=f"cannot write {target}: {os.strerror(code)}") as raised:
        extend(target)
    assert raised.value.hint is not None
    assert raised.value.hint.endswith(", or extend a copy of the bundle")
    assert snapshot(target) == before
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [RuntimeError("trt"), KeyboardInterrupt(), SystemExit(3), ClipExportError("x")])
def test_what_an_extension_raises_leaves_the_bundle_as_it_was(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a"
    build(target)
    before = snapshot(target)
    with pytest.raises(type(error)) as raised, extended(target) as (bundle, staging):
        with_plans(staging, known=bundle)
        raise error
    assert raised.value is error
    assert snapshot(target) == before
    assert names(tmp_path) == ["a"]


def test_an_extension_without_a_manifest_is_not_published(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target)
    before = snapshot(target)
    with pytest.raises(BundleNotFoundError, match=r"it has no manifest\.json"), extended(target):
        pass
    assert snapshot(target) == before
    assert names(tmp_path) == ["a"]


def _newer_schema(target: Path) -> None:
    build(target)
    manifest = (target / "manifest.json").read_bytes()
    (target / "manifest.json").write_bytes(manifest.replace(b'"schema_version": 4', b'"schema_version": 5'))


def _same_size(target: Path) -> None:
    build(target)
    (target / "image.onnx").write_bytes(bytes(1024))


def _linked(target: Path) -> None:
    build(target.with_name("real"))
    target.symlink_to("real")


@pytest.mark.parametrize(
    ("prepare", "error", "words", "hint"),
    [
        (lambda target: None, BundleNotFoundError, "a does not exist", "make one with: clip-export build"),
        (_directory, BundleNotFoundError, "a is not a bundle: it has no manifest.json", "make one with"),
        (lambda target: target.write_text("x"), BundleNotFoundError, "a is a file, not the directory", "make one with"),
        (lambda target: target.symlink_to("nowhere"), BundleError, "a is a symbolic link to nowhere", "give the dir"),
        (_linked, BundleError, "a is a symbolic link to real", "give the directory that it points to"),
        (_notes_in_a_bundle, BundleIntegrityError, "notes.txt in .* is not listed", "move it out of the bundle"),
        (_git_in_a_bundle, BundleError, "a is not replaced: it holds .git/HEAD, which", "extend a copy of the bundle"),
        (_newer_schema, BundleSchemaError, "schema 5 was written by a newer clip-export", "update clip-export"),
        (_damaged_manifest, BundleSchemaError, "manifest.json is not valid JSON", "build the bundle again"),
        (_same_size, BundleIntegrityError, "image.onnx in .* is changed: expected sha256", "build the bundle again"),
    ],
)
def test_what_cannot_be_extended(
    tmp_path: Path, prepare: Callable[[Path], object], error: type[BundleError], words: str, hint: str
) -> None:
    prepare(tmp_path / "a")
    before = snapshot(tmp_path)
    with pytest.raises(error, match=words) as raised:
        extend(tmp_path / "a")
    assert str(raised.value.hint).startswith(hint)
    assert snapshot(tmp_path) == before


def test_a_bundle_in_no_directory_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="does not exist"):
        extend(tmp_path / "no" / "such" / "a")
    assert names(tmp_path) == []


def test_the_current_directory_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(BundleError, match="a is the current directory, or holds it") as raised:
        extend(Path())
    assert raised.value.hint == "leave it first: cd .."


def test_a_bundle_that_was_being_replaced_is_put_back_and_extended(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target, "old")
    leave_as_killed_between_the_renames(target)
    extend(target)
    assert Bundle.open(target).name == "old"
    assert len(Bundle.open(target).manifest.plans) == 2
    assert names(tmp_path) == ["a"]


def test_one_extends_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target)
    with extended(target) as (bundle, staging):
        with pytest.raises(BundleBusyError, match=f"another process is building {target}"):
            extend(target)
        with pytest.raises(BundleBusyError):
            build(target, force=True)
        with_plans(staging, known=bundle)
    assert names(tmp_path) == ["a"]


def test_a_disk_that_is_full_while_extending(tmp_path: Path) -> None:
    build(tmp_path / "a")
    before = snapshot(tmp_path)
    body = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with extended(target) as (bundle, staging):
        (staging / "text.plan").write_bytes(bytes(100_000))
except ClipExportError as error:
    print(error)
"""
    output, errors = script(body, tmp_path / "a").communicate()
    assert errors == ""
    assert output == (
        f"cannot write {tmp_path}/a: File too large\nhint: free some space, or extend a copy of the bundle\n"
    )
    assert snapshot(tmp_path) == before


def test_a_bundle_in_a_place_that_may_not_be_written() -> None:
    body = """
if os.geteuid() == 0:
    os.setuid(65534)
try:
    with extended(target):
        pass
except ClipExportError as error:
    print(error)
"""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name).resolve()
        build(directory / "a")
        directory.chmod(0o555)
        before = snapshot(directory)
        output, errors = script(body, directory / "a").communicate()
        assert errors == ""
        assert output == (
            f"cannot write {directory}/a: Permission denied ({directory}/.a.lock)\n"
            "hint: check the permissions, or extend a copy of the bundle\n"
        )
        assert snapshot(directory) == before
        directory.chmod(0o755)


def test_an_extension_that_is_killed_at_every_operation(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "crashing_extension.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    crashes = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert {found for _, found in crashes} == {"old", "extended", "old aside"}
    operations = Counter(operation for operation, _ in crashes)
    assert operations["os.link"] == 4
    assert operations["os.rename"] == 3
    assert len(crashes) > 40


def test_ctrl_c_while_extending(tmp_path: Path) -> None:
    build(tmp_path / "a")
    before = snapshot(tmp_path)
    body = """
signal.signal(signal.SIGINT, signal.default_int_handler)
with extended(target) as (bundle, staging):
    print("inside", flush=True)
    sys.stdin.read(1)
"""
    process = script(body, tmp_path / "a")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert "KeyboardInterrupt" in errors
    assert snapshot(tmp_path) == before


def test_reading_while_it_is_extended(tmp_path: Path) -> None:
    target = tmp_path / "a"
    build(target)
    body = """
import time
for _ in range(20):
    with extended(target) as (bundle, staging):
        with_plans(staging, known=bundle)
    time.sleep(0.02)  # on one core the reader has its turn here
    with staged(target, force=True) as staging:
        fill(staging)
    time.sleep(0.02)
"""
    writer = script(body, target)
    seen = set()
    while writer.poll() is None:
        try:
            seen.add(len(Bundle.open(target).manifest.plans))
        except BundleError:
            continue
    assert writer.communicate() == ("", "")
    assert seen == {0, 2}
