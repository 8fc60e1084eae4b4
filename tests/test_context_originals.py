"""Context against the tools themselves: diffusers' pipelines and compel, on random weights in the three architectures.

The towers of the reference are compared here, which is quick; test_context_bundle.py compares what a bundle's graphs
give, and test_full_size.py does both at full size.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import diffusion_made
import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracles
import pytest
import torch
from diffusion_made import originals

import clip_export
from clip_export.checkpoints import Options
from clip_export.context.dialects import _compel_grammar as grammar
from clip_export.errors import InputError

PROMPTS = ["a photo of a red fox, high quality", "", "A (cat:1.3) on the [mat] ** &amp; caf\u00e9 \u4e00\u53ea\u732b"]
NEGATIVES = ["blurry, low quality", "", "text"]
LONG = "a fox in the snow, " * 20
WITHIN = 1e-4


def encoded(pipe: Any, prompts: list[str], negatives: list[str] | None, clip_skip: int | None) -> list[Any]:
    """prompt_embeds, negative_prompt_embeds and, of SDXL, both pooled ones, from the pipeline's own encode_prompt."""
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompts,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negatives,
            clip_skip=clip_skip,
        )
    return [array.numpy() for array in found]


def close(found: np.ndarray | None, expected: np.ndarray) -> bool:
    return found is not None and found.shape == expected.shape and float(np.abs(found - expected).max()) <= WITHIN


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_diffusers_pipelines_encode_the_same_at_every_clip_skip(family: str, clip_skip: int | None) -> None:
    pipe, clip = originals(family)
    expected = encoded(pipe, PROMPTS, NEGATIVES, clip_skip)
    spelling = None if clip_skip is None else f"diffusers:{clip_skip}"
    found = clip.context(PROMPTS, negative=NEGATIVES, clip_skip=spelling)
    assert close(found.hidden_states, expected[0])
    assert close(found.negative_hidden_states, expected[1])
    if family == "sdxl":
        assert close(found.pooled, expected[2])
        assert close(found.negative_pooled, expected[3])
    else:
        assert found.pooled is None


def test_clip_skip_changes_the_context_of_a_prompt() -> None:
    _, clip = originals("sd1")
    states = [clip.context(["a fox"], clip_skip=skip).hidden_states for skip in ("last", "penultimate", "last-2")]
    assert all(np.abs(first - second).max() > 0.1 for first, second in [states[:2], states[1:]])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_no_negative_prompt_is_what_the_pipeline_makes_of_none(family: str) -> None:
    """SDXL's pipeline has zeros for no negative prompt, and encodes an empty one."""
    pipe, clip = originals(family)
    expected = encoded(pipe, ["a fox"], None, None)
    found = clip.context(["a fox"], negative=[None])
    assert close(found.negative_hidden_states, expected[1])
    assert bool((expected[1] == 0).all()) == (family == "sdxl")


def test_a_prompt_that_does_not_fit_is_cut_with_a_warning() -> None:
    pipe, clip = originals("sd1")
    expected = encoded(pipe, [LONG], [""], None)
    with pytest.warns(
        UserWarning, match=r"diffusers cuts a prompt after 75 tokens; this one has 120.*: 'the snow , a fox"
    ):
        found = clip.context([LONG])
    assert close(found.hidden_states, expected[0])


def test_every_layer_is_that_of_transformers() -> None:
    pipe, clip = originals("sd1")
    ids = torch.from_numpy(clip.tokenize(["a red fox"])).long()
    with torch.no_grad():
        hidden = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
        for depth in range(4):
            expected = pipe.text_encoder.text_model.final_layer_norm(hidden[-1 - depth]).numpy()
            assert close(clip.context(["a red fox"], clip_skip=f"last-{depth}").hidden_states, expected)


# Textual inversion in diffusers


@pytest.mark.parametrize("vectors", [1, 3])
def test_an_embedding_stands_where_its_name_does_as_in_diffusers(tmp_path: Path, vectors: int) -> None:
    pipe = diffusion_made.pipeline(tmp_path, "sd1")
    clip = clip_export.reference(diffusion_made.write_folder(pipe, tmp_path / "sd1"), Options(context=True))
    learned = 0.1 * torch.randn(vectors, 128, generator=torch.Generator().manual_seed(5))
    path = tmp_path / "learned.pt"
    torch.save({"<cat-toy>": learned if vectors > 1 else learned[0]}, path)
    with torch.no_grad():
        pipe.load_textual_inversion(path.as_posix())
    prompts = ["a <cat-toy> on the mat", "no toy here", "<CAT-TOY>, <cat-toy>!"]
    expected = encoded(pipe, prompts, ["", "", "ugly <cat-toy>"], None)
    found = clip.context(prompts, negative=["", "", "ugly <cat-toy>"], embeddings={"<cat-toy>": path})
    assert close(found.hidden_states, expected[0])
    assert close(found.negative_hidden_states, expected[1])
    assert not close(clip.context(prompts).hidden_states, expected[0])


# Compel

COMPEL_PROMPTS = [
    "a photo of a red fox",
    "a (red fox)1.3 in the snow",
    "a red++ fox-- in (deep snow)0.5, winter",
    '"a fox"1.2 and (a (nested)+ thing)0.7',
    "(a fox).attend(0.6) and a dog",
    '("a fox","a dog in the snow").blend(0.7, 0.3)',
    '("a fox","a dog").blend(1, 1, no_normalize)',
    '("a fox","a (dog)0.4 house").and()',
    "one. " * 39 + "two (three, four)0.3 five",
    "a fox, " + "very " * 72 + "(long)1.5 prompt, with commas. And sentences; here",
    "plain (" + "word " * 80 + ")0.6",
    "",
]


def compel_of(pipe: Any, family: str) -> Any:
    wrappers = oracles.compel().convenience_wrappers
    return (wrappers.CompelForSDXL if family == "sdxl" else wrappers.CompelForSD)(pipe)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_compel_gives_the_same(family: str) -> None:
    pipe, clip = originals(family)
    tool = compel_of(pipe, family)
    for prompt in COMPEL_PROMPTS if family == "sd1" else COMPEL_PROMPTS[2:5:2]:  # its parser is made anew each time
        with torch.no_grad():
            expected = tool([prompt], negative_prompt=["blurry (ugly)0.5"])
        found = clip.context([prompt], negative=["blurry (ugly)0.5"], dialect="compel")
        assert close(found.hidden_states, expected.embeds.numpy()), prompt
        assert close(found.negative_hidden_states, expected.negative_embeds.numpy()), prompt
        if family == "sdxl":
            assert close(found.pooled, expected.pooled_embeds.numpy()), prompt


def test_parts_of_a_conjunction_have_weights() -> None:
    pipe, clip = originals("sd1")
    prompt = '("a fox","a (dog)0.4 house").and(1, 0.5)'
    with torch.no_grad():
        expected = compel_of(pipe, "sd1")([prompt]).embeds.numpy()
    assert close(clip.context([prompt], dialect="compel").hidden_states, expected)


def test_several_prompts_are_padded_as_compel_pads_them() -> None:
    pipe, clip = originals("sd1")
    prompts = ["a fox", "one. " * 40]
    with torch.no_grad():
        expected = compel_of(pipe, "sd1")(prompts).embeds.numpy()
    assert close(clip.context(prompts, dialect="compel").hidden_states, expected)


@pytest.mark.parametrize(
    "name",
    [
        "LAST_HIDDEN_STATES_NORMALIZED",
        "PENULTIMATE_HIDDEN_STATES_NORMALIZED",
        "PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED",
    ],
)
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_compels_names_of_layers_are_taken(family: str, name: str) -> None:
    pipe, clip = originals(family)
    compel = oracles.compel()
    kind = getattr(compel.ReturnedEmbeddingsType, name)
    tool = compel.Compel(pipe.tokenizer, pipe.text_encoder, returned_embeddings_type=kind)
    with torch.no_grad():
        expected = tool(["a (red)1.4 fox"]).numpy()
    found = clip.context(["a (red)1.4 fox"], dialect="compel", clip_skip=f"compel:{name}")
    assert close(found.hidden_states, expected)


@functools.cache
def compel_parser() -> Any:
    return oracles.compel().prompt_parser.PromptParser()


def compel_reads(prompt: str) -> object:
    """What compel's own parser makes of a prompt, in our form; "error" where it raises."""
    blend_class = oracles.compel().prompt_parser.Blend

    def flat(part: Any) -> tuple[tuple[str, float], ...]:
        return tuple((fragment.text, fragment.weight) for fragment in part.children)

    try:
        found = compel_parser().parse_conjunction(prompt)
    except Exception:  # noqa: BLE001  (pyparsing's errors, ValueError, AttributeError: whatever stops compel)
        return "error"
    if not found.prompts:
        return "error"  # there is nothing to concatenate then
    prompts = [
        grammar.Blend(tuple(map(flat, part.prompts)), tuple(part.weights), part.normalize_weights)
        if isinstance(part, blend_class)
        else flat(part)
        for part in found.prompts
    ]
    return grammar.Joined(tuple(prompts), tuple(found.weights))


def we_read(prompt: str) -> object:
    try:
        return grammar.parse(prompt)
    except InputError:
        return "error"


@pytest.mark.parametrize(
    ("prompt", "read"), [("( " * 64 + "a", ("( " * 64 + "a", 1.0)), ("(" * 64 + "a" + ")" * 64, ("a", 1.0))]
)
def test_brackets_take_no_time_that_doubles_with_each(prompt: str, read: tuple[str, float]) -> None:
    """compel's own parser takes seconds for 16 of them."""
    assert grammar.parse(prompt).prompts == ((read,),)


@pytest.mark.parametrize("prompt", ["(" * 3000 + "a" + ")" * 3000, "a " + "(" * 3000])
def test_too_many_brackets_in_brackets_are_refused(prompt: str) -> None:
    with pytest.raises(InputError, match="expected at most 64 parentheses inside of each other"):
        grammar.parse(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a fox" + "+" * 8000, "expected a finite weight in the prompt"),
        (f"(a fox){'9' * 400}", "expected a finite weight in the prompt, found inf"),
        (f'("a", "b").blend({"9" * 40}, 1)', "expected a finite weight in the prompt"),
        ('("a", "b").blend(1, -1)', "add up to 0"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_weights_of_compel_that_leave_no_numbers_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        originals("sd1")[1].context([prompt], dialect="compel")


def _read_alike(prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert we_read(prompt) == compel_reads(prompt)


PIECES = st.sampled_from(
    [
        *'ab (),.+-=:\\"é',
        *("fox", "++", "--", "1.3", "0.5", "2", "\\(", "\\)", '\\"', "(a b)", "(c)1.2", '"q r"', "foo+", "x-y", "-z"),
        *(".attend(", '("a fox", "b+ c")', '("a", (b)1.2, c)', ".blend(", ".and(", "0.7, 0.3)", "no_normalize)"),
    ]
)


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(PIECES, max_size=6).map("".join))
def test_the_grammar_reads_what_compel_reads(prompt: str) -> None:
    _read_alike(prompt)


@pytest.mark.slow
@hypothesis.settings(max_examples=300)
@hypothesis.given(st.lists(PIECES, max_size=9).map("".join))
def test_the_grammar_reads_what_compel_reads_in_many_prompts(prompt: str) -> None:
    """Its parser takes a second for a prompt."""
    _read_alike(prompt)
