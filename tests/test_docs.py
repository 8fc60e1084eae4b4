"""Every snippet in the README and the docs is run, every output shown is compared, every link leads somewhere.

A fence marked python, console or sh is run, in the order of its page, in a directory with engines/demo, the sample
images and a few real photographs. One that cannot be run says why, in a comment on the line above it:

    <!-- not run: needs the Hub -->

Under a `$ command`, what follows is compared with what it prints: words exactly, decimals to within 0.02 (2e-5 where
five places or more are shown), times not at all; a line `...` stands for any lines. A comment `# float32 [2, 128]`
holds the value of its statement to that.
"""

from __future__ import annotations

import ast
import gzip
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from checkpoints_made import make_openai
from PIL import Image
from typer.testing import CliRunner

import clip_export
from clip_export.commands import app

ROOT = Path(__file__).parents[1]
FRONT = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "engines/README.md")]
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [path.relative_to(ROOT).as_posix() for path in [*FRONT, *DOCS]]

FENCE = re.compile(
    r"^(?:<!-- not run:(?P<reason>.*?)-->\n)?^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
RUN_AS = {"python": "python", "console": "console", "sh": "console"}
SHOWN_ONLY = {"", "text", "json", "toml", "makefile", "markdown", "cmake", "cpp", "c"}
LOOKS_RUNNABLE = re.compile(r"^(\$ |clip-export |import |from \w+ import |pip |make )", re.MULTILINE)
VARIES = re.compile(r"\d+(\.\d+)? s\b|\d\.\de[-+]\d\d|\(\d+ a second\)")
DECIMAL = re.compile(r"-?\d+\.\d+")
SHAPE = re.compile(r"#\s*(float32|int32|uint8|bool) \[([\d, ]+)\]")


@dataclass(frozen=True)
class Snippet:
    """One fence: `line` is where its text begins, `reason` why it is not run or None."""

    line: int
    language: str
    text: str
    reason: str | None


def snippets(text: str) -> list[Snippet]:
    return [
        Snippet(text.count("\n", 0, match.start("text")) + 1, match["language"], match["text"], match["reason"])
        for match in FENCE.finditer(text)
    ]


def page_snippets(page: str) -> list[Snippet]:
    return snippets((ROOT / page).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Command:
    """A command line of a console snippet, and the lines shown under it, blank ones left out."""

    line: str
    output: list[str]


def commands(text: str) -> Iterator[Command]:
    lines = text.replace("\\\n", "").splitlines()
    if not any(line.startswith("$ ") for line in lines):
        yield from (Command(line, []) for line in lines if line.strip() and not line.startswith("#"))
        return
    for block in re.split(r"^\$ ", "\n".join(lines), flags=re.MULTILINE)[1:]:
        first, *rest = block.splitlines()
        yield Command(first.partition("  #")[0].rstrip(), [line for line in rest if line.strip()])


def agrees(expected: list[str], found: list[str]) -> bool:
    """Whether `found` is what `expected` shows, line by line; `...` stands for any lines."""
    if not expected:
        return not found
    if expected[0] == "...":
        return any(agrees(expected[1:], found[start:]) for start in range(len(found) + 1))
    return bool(found) and same_line(expected[0], found[0]) and agrees(expected[1:], found[1:])


def same_line(expected: str, found: str) -> bool:
    first, second = (" ".join(VARIES.sub("~", line).split()) for line in (expected, found))
    if DECIMAL.sub("#", first) != DECIMAL.sub("#", second):
        return False
    pairs = zip(DECIMAL.findall(first), DECIMAL.findall(second), strict=True)
    return all(abs(float(a) - float(b)) <= tolerance(a) for a, b in pairs)


def tolerance(shown: str) -> float:
    """How far a decimal may be from the one shown: cosines, shown to five places or more, are held to the contract."""
    places = len(shown.partition(".")[2])
    return 2e-5 if places >= 5 else 0.02


def run_command(line: str) -> tuple[int, str]:
    """(exit code, what a terminal shows). The command line runs in this process where no shell is needed."""
    if line == "make demo":
        return make_demo()
    words = shlex.split(line)
    if words[0] == "clip-export" and not re.search(r"[|<>*;&$]", line):
        result = CliRunner().invoke(app, words[1:], prog_name="clip-export")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    return done.returncode, done.stdout


def demo_recipe() -> list[str]:
    """The lines of `make demo` after the installation: commands, and what is echoed between them."""
    make = subprocess.run(["make", "-n", "-C", str(ROOT), "demo"], capture_output=True, encoding="utf-8", check=True)
    lines = make.stdout.replace("\\\n", "").splitlines()
    return [line for line in lines if line.startswith((".venv/bin/clip-export ", "echo "))]


def similarity_command() -> str:
    return next(line for line in demo_recipe() if " similarity " in line).removeprefix(".venv/bin/")


def make_demo() -> tuple[int, str]:
    """What `make demo` prints after the installation: each command and its output."""
    output = ""
    for line in demo_recipe():
        if line.startswith("echo "):
            output += " ".join(shlex.split(line)[1:]) + "\n"
            continue
        code, text = run_command(line.removeprefix(".venv/bin/"))
        output += f"{line}\n{text}"
        if code:
            return code, output
    return 0, output


def run_console(snippet: Snippet, page: str) -> None:
    for command in commands(snippet.text):
        code, output = run_command(command.line)
        failure = any(line.startswith("error:") for line in command.output)
        expected = {1, 2} if failure else {0}  # 2: what verify, bench or explain could not measure
        assert code in expected, f"{page}:{snippet.line}: `{command.line}` exits with {code}:\n{output}"
        found = [line for line in output.splitlines() if line.strip()]
        assert not command.output or agrees(command.output, found), (
            f"{page}:{snippet.line}: `{command.line}` shows\n" + "\n".join(command.output) + f"\nand prints\n{output}"
        )


def run_python(snippet: Snippet, page: str, namespace: dict[str, Any]) -> None:
    """Statement by statement, so that a shape in a comment can be held against the value of its statement."""
    lines = snippet.text.splitlines()
    for statement in ast.parse(snippet.text).body:
        value = run_statement(statement, f"{page}:{snippet.line}", namespace)
        assert statement.end_lineno is not None
        stated = SHAPE.search(lines[statement.end_lineno - 1])
        if stated:
            shape = tuple(int(size) for size in stated[2].split(","))
            where = f"{page}:{snippet.line + statement.lineno - 1}"
            assert (str(value.dtype), value.shape) == (stated[1], shape), f"{where}: {value.dtype} {value.shape}"


def run_statement(statement: ast.stmt, where: str, namespace: dict[str, Any]) -> Any:
    """The value of an expression or of the name that is assigned; None for any other statement."""
    if isinstance(statement, ast.Expr):
        return eval(compile(ast.Expression(statement.value), where, "eval"), namespace)
    exec(compile(ast.Module([statement], []), where, "exec"), namespace)
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    return namespace[target.id] if isinstance(target, ast.Name) else None


@pytest.fixture(scope="session")
def bare_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict in OpenAI's names that does not tell its activation."""
    path = tmp_path_factory.mktemp("bare") / "weights.pt"
    make_openai(path, layers=1, width=64, torchscript=False, facts=False)
    return path


@pytest.fixture
def workspace(tmp_path: Path, bare_weights: Path, demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that snippets run in. `build("demo")` takes the bundle that the session has built already."""
    shutil.copytree(demo_bundle, tmp_path / "engines" / "demo")
    shutil.copytree(ROOT / "examples" / "pictures", tmp_path / "examples" / "pictures")
    for script in ("demo_pictures.py", "scenes.py"):
        shutil.copy(ROOT / "examples" / script, tmp_path / "examples")
    shutil.copy(ROOT / "examples" / "pictures" / "captions.txt", tmp_path / "captions.txt")
    shutil.copy(bare_weights, tmp_path)
    (tmp_path / "photos").mkdir()
    for path in pictures.PHOTOGRAPHS.values():
        shutil.copy(path, tmp_path / "photos")
    for name, photograph in (("a.jpg", "china"), ("b.jpg", "flower")):
        shutil.copy(pictures.PHOTOGRAPHS[photograph], tmp_path / name)
    (tmp_path / "captions.gz").write_bytes(gzip.compress((tmp_path / "captions.txt").read_bytes()))
    real = clip_export.build

    def build(checkpoint: str, output: Any = None, *, force: bool = False, **options: Any) -> clip_export.Bundle:
        target = Path(output or "engines/demo")
        stated = {name: value for name, value in options.items() if value is not None and name != "progress"}
        replaces = target.exists() and not force
        if checkpoint != "demo" or target.name != "demo" or stated or replaces:
            return real(checkpoint, output, force=force, **options)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(demo_bundle, target)
        return clip_export.Bundle.open(target)

    monkeypatch.setattr(clip_export, "build", build)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.zh-CN.md"])  # its snippets are README.md's
def test_snippets_run(page: str, workspace: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for snippet in page_snippets(page):
        if snippet.reason is not None or snippet.language not in RUN_AS:
            continue
        if RUN_AS[snippet.language] == "python":
            run_python(snippet, page, namespace)
        else:
            run_console(snippet, page)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_says_why(page: str) -> None:
    for snippet in page_snippets(page):
        where = f"{page}:{snippet.line}"
        assert snippet.language in RUN_AS.keys() | SHOWN_ONLY, f"{where}: fence marked {snippet.language!r}"
        if snippet.language not in RUN_AS:
            assert snippet.reason is None, f"{where}: a reason above a fence that nobody would run"
            assert not LOOKS_RUNNABLE.search(snippet.text), f"{where}: mark it python or console, so that it is run"
        if snippet.reason is not None:
            assert len(snippet.reason.strip()) >= 10, f"{where}: why is it not run?"


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_fences(page: str) -> None:
    """An indented one would be shown as code and never run."""
    prose = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    assert not re.search(r"^ {4}(\$ |clip-export |import |from \w+ import )", prose, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target} does not exist"
        if anchor:
            assert anchor in anchors(path), f"{page}: {target}: there is no such heading"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to headings: lower case, punctuation dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_both_readmes_have_the_same_snippets() -> None:
    """Comments are translated; what is run, what is printed and the figures are not."""
    english, chinese = (
        [(s.language, re.sub(r"\s*#.*", "", s.text), s.reason is None) for s in page_snippets(page)]
        for page in ("README.md", "README.zh-CN.md")
    )
    assert english == chinese
    images = [
        re.findall(r"docs/images/[\w.-]+", (ROOT / page).read_text(encoding="utf-8"))
        for page in ("README.md", "README.zh-CN.md")
    ]
    assert images[0] == images[1]


def test_both_readmes_have_the_same_structure() -> None:
    """Headings by level, rows of tables, and links to the project's own pages."""
    outlines = []
    for page in ("README.md", "README.zh-CN.md"):
        text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
        rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        links = sorted(link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "README" not in link)
        outlines.append((levels, rows, links))
    assert outlines[0] == outlines[1]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w.-]+\.md)\)", index))
    assert {path.name for path in DOCS} - {"index.md"} == linked


def test_the_layers_are_those_that_are_checked() -> None:
    """The drawing of the architecture page against import-linter's contract."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    flow = next(c for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    drawn = [s.text.splitlines() for s in page_snippets("docs/architecture.md") if s.text.startswith("__main__\n")]
    assert drawn == [[layer.replace("clip_export.", "") for layer in flow["layers"]]]


def test_the_demo_has_a_sentence_for_each_image() -> None:
    """In the order of the file names, so that the matrix has its matches on the diagonal."""
    words = shlex.split(similarity_command())
    sentences = words[words.index("--texts") + 1 :]
    names = sorted(path.stem for path in (ROOT / "examples" / "pictures").glob("*.png"))
    assert [name.split("-")[-2:] for name in names] == [sentence.split()[-2:] for sentence in sentences]


def test_the_figure_is_what_the_demo_draws(workspace: Path) -> None:
    line = similarity_command()
    code, output = run_command(line)
    assert code == 0, output
    words = shlex.split(line)
    with (
        Image.open(words[words.index("--plot") + 1]) as drawn,
        Image.open(ROOT / "docs" / "images" / "demo-similarity.png") as shown,
    ):
        assert drawn.size == shown.size
        difference = np.abs(np.asarray(drawn, dtype=int) - np.asarray(shown, dtype=int))
    assert difference.mean() < 0.5, "draw it again: make demo, then copy engines/demo-similarity.png to docs/images"


def test_the_checks_can_fail(workspace: Path) -> None:
    """A wrong shape, a wrong output, a wrong exit code and a mistake in Python are each noticed."""
    text = "<!-- not run: needs a network -->\n```sh\nmake\n```\n\n```python\nx = 1\n```\n"
    assert [(s.language, s.line, s.reason) for s in snippets(text)] == [
        ("sh", 3, " needs a network "),
        ("python", 7, None),
    ]
    wrong_shape = "import numpy as np\nx = np.zeros((2, 3), np.float32)  # float32 [2, 4]\n"
    with pytest.raises(AssertionError, match=r"page:2: float32 \(2, 3\)"):
        run_python(Snippet(1, "python", wrong_shape, None), "page", {})
    with pytest.raises(NameError):
        run_python(Snippet(1, "python", "clips.load('engines/demo')", None), "page", {})
    for shown in (
        "$ clip-export --version\nclip-export 9",
        "$ clip-export verify engines/none",
        "$ clip-export -h\nerror: x",
    ):
        with pytest.raises(AssertionError, match=r"page:1: `clip-export"):
            run_console(Snippet(1, "console", shown, None), "page")
    assert same_line("a  28.41 in 3.1 s", "a 28.40 in 12.9 s")
    assert not same_line("a 28.41", "a 28.44")
    assert same_line("min cosine 1.0000000", "min cosine 0.9999999")
    assert not same_line("min cosine 1.0000000", "min cosine 0.9999000")
    assert not same_line("required 0.99999", "required 0.99900")
    assert not same_line("a 8 b", "a 9 b")
    assert agrees(["a", "...", "d"], ["a", "b", "c", "d"])
    assert not agrees(["a", "...", "d"], ["a", "b", "c"])
