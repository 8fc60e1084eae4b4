"""AUTOMATIC1111's prompts, against values computed from its rules: stable-diffusion-webui's modules/prompt_parser.py
(parse_prompt_attention, whose docstring has the first examples below), modules/sd_hijack_clip.py (tokenize_line,
process_tokens), modules/sd_emphasis.py (EmphasisOriginal) and modules/sd_models_xl.py (get_learned_conditioning), read
at commits 0674fabd0d82, 00e09382cd85, 255da37da187 and 0bba67e8d994.

The webui cannot be installed from a registry. Tokens and weights of each chunk are written down here by hand from those
rules; states are computed with transformers' CLIPTextModel, and the formula of EmphasisOriginal: z times the weights,
then times the quotient of the means of z before and after, over the whole chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from diffusion_made import originals

from clip_export.context.dialects import a1111
from clip_export.encoder import Encoder
from clip_export.errors import InputError

WITHIN = 1e-4
START, END = 49406, 49407

Segments = Sequence[tuple[str, float]]


@pytest.fixture
def sd1() -> tuple[Any, Encoder]:
    return originals("sd1")


@pytest.fixture
def sdxl() -> tuple[Any, Encoder]:
    return originals("sdxl")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def expected_chunk(
    tokenizer: Any, model: Any, segments: Segments, *, pad: int = END, depth: int = 0, normalized: bool = True
) -> np.ndarray:
    """One chunk from segments of text and weight, by the formula."""
    tokens, weights = [START], [1.0]
    for text, weight in segments:
        ids = ids_of(tokenizer, text)
        tokens += ids
        weights += [weight] * len(ids)
    tokens += [END] + [pad] * (76 - len(tokens))
    weights += [1.0] * (77 - len(weights))
    with torch.no_grad():
        z = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1 - depth]
        norm = getattr(model, "final_layer_norm", None) or model.text_model.final_layer_norm
        z = norm(z) if normalized else z
    z = z.double()  # the means are small rests of large numbers: in float32 their quotient has four digits
    before = z.mean()
    z = z * torch.tensor(weights)[None, :, None]
    return (z * (before / z.mean()))[0].float().numpy()


def close(found: np.ndarray | None, expected: np.ndarray) -> bool:
    return found is not None and found.shape == expected.shape and float(np.abs(found - expected).max()) <= WITHIN


PARSED: dict[str, Segments] = {
    # The examples in the original's own documentation of the function.
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    "\\(literal\\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.573),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641),
        (".", 1.1),
    ],
    # What else its rules say.
    "": [("", 1.0)],
    "[[red]]": [("red", 1 / 1.21)],
    "a [red": [("a ", 1.0), ("red", 1 / 1.1)],
    "red) fox]": [("red) fox]", 1.0)],
    "a :1.2) fox": [("a :1.2) fox", 1.0)],
    "(red:much)": [("red:much", 1.1)],
    "(red:-1.5)": [("red", -1.5)],
    "(red:.5)": [("red", 0.5)],
    "(red: 1.3)(fox:1.2 )": [("red", 1.3), ("fox", 1.2)],  # blanks around a weight, as since 1.6.0
    "(red:nan)": [("red:nan", 1.1)],
    "a \\\\ b": [("a \\ b", 1.0)],
    "a BREAK b": [("a", 1.0), ("BREAK", -1.0), ("b", 1.0)],
    "BREAKER": [("BREAKER", 1.0)],
    "(a BREAK b)": [("a", 1.1), ("BREAK", -1.1), ("b", 1.1)],  # inside of weights it is a word, with a weight below 0
}


@pytest.mark.parametrize("prompt", PARSED)
def test_prompts_parse_to_texts_and_weights(prompt: str) -> None:
    found = a1111.parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in PARSED[prompt]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in PARSED[prompt]])


WEIGHTED: dict[str, list[Segments]] = {
    "a photo of a red fox": [[("a photo of a red fox", 1.0)]],
    "a (red:1.3) fox, [blurry]": [[("a", 1.0), ("red", 1.3), ("fox,", 1.0), ("blurry", 1 / 1.1)]],
    "((very)) red (fox:0.2)": [[("very", 1.21), ("red", 1.0), ("fox", 0.2)]],
    "a fox BREAK (a dog:1.2)": [[("a fox", 1.0)], [("a dog", 1.2)]],
    "a fox BREAK": [[("a fox", 1.0)]],
    "BREAK a fox": [[], [("a fox", 1.0)]],
    # 80 tokens, none of them a comma: cut after 75.
    "fox " * 80: [[("fox " * 75, 1.0)], [("fox " * 5, 1.0)]],
    # The last comma is 11 tokens before the end of the chunk: what is behind it begins the next one.
    "fox " * 64 + ", " + "dog " * 20: [[("fox " * 64 + ",", 1.0)], [("dog " * 20, 1.0)]],
    # 20 tokens before is near enough, 21 is too far.
    "fox " * 55 + ", " + "dog " * 20: [[("fox " * 55 + ",", 1.0)], [("dog " * 20, 1.0)]],
    "fox " * 54 + ", " + "dog " * 30: [[("fox " * 54 + "," + "dog " * 20, 1.0)], [("dog " * 10, 1.0)]],
    # Exactly 75 tokens and a comma: that is the 76th, and stays where it is, at the beginning of the next chunk.
    "fox " * 75 + ", dog": [[("fox " * 75, 1.0)], [(", dog", 1.0)]],
}


@pytest.mark.parametrize("prompt", WEIGHTED)
def test_weights_multiply_and_the_mean_of_each_chunk_is_restored(sd1: tuple[Any, Encoder], prompt: str) -> None:
    pipe, clip = sd1
    expected = np.concatenate([expected_chunk(pipe.tokenizer, pipe.text_encoder, part) for part in WEIGHTED[prompt]])
    assert close(clip.context([prompt], dialect="a1111").hidden_states[0], expected)


@pytest.mark.parametrize(("spelling", "depth"), [("a1111:1", 0), ("a1111:2", 1), ("a1111:4", 3)])
def test_clip_skip_counts_from_one(sd1: tuple[Any, Encoder], spelling: str, depth: int) -> None:
    pipe, clip = sd1
    segments = [("a", 1.0), ("red", 1.3), ("fox", 1.0)]
    expected = expected_chunk(pipe.tokenizer, pipe.text_encoder, segments, depth=depth)
    assert close(clip.context(["a (red:1.3) fox"], dialect="a1111", clip_skip=spelling).hidden_states[0], expected)


def test_sdxl_takes_the_penultimate_layers_as_they_are_whatever_clip_skip_says(sdxl: tuple[Any, Encoder]) -> None:
    """Each encoder restores its own mean; OpenCLIP's pads with 0 behind the first end token (process_tokens)."""
    pipe, clip = sdxl
    segments = [("a", 1.0), ("red", 1.3), ("fox", 1.0)]
    left = expected_chunk(pipe.tokenizer, pipe.text_encoder, segments, depth=1, normalized=False)
    right = expected_chunk(pipe.tokenizer_2, pipe.text_encoder_2, segments, depth=1, normalized=False, pad=0)
    expected = np.concatenate([left, right], axis=1)
    assert close(clip.context(["a (red:1.3) fox"], dialect="a1111").hidden_states[0], expected)
    with pytest.warns(UserWarning, match="clip skip for Stable Diffusion 1 alone; a1111:3 changes nothing"):
        found = clip.context(["a (red:1.3) fox"], dialect="a1111", clip_skip="a1111:3")
    assert close(found.hidden_states[0], expected)


def test_an_empty_negative_prompt_of_sdxl_is_zeros_whatever_the_others_are(sdxl: tuple[Any, Encoder]) -> None:
    """Its rule is for a whole batch, and its batches are single prompts."""
    _, clip = sdxl
    found = clip.context(["a", "b"], negative=["", ""], dialect="a1111")
    assert found.negative_hidden_states is not None and not found.negative_hidden_states.any()
    assert found.negative_pooled is not None and not found.negative_pooled.any()
    found = clip.context(["a", "b"], negative=["", "blurry"], dialect="a1111")
    assert found.negative_hidden_states is not None
    assert [bool(rows.any()) for rows in found.negative_hidden_states] == [False, True]


def test_openclips_encoders_have_open_clips_tokenizer() -> None:
    """modules/sd_hijack_open_clip.py: HTML and mojibake are repaired there, and not before CLIP-L."""
    pipe, clip = originals("sd2")
    text = "salt &amp; pepper"
    ids = oracles.open_clip().tokenizer.SimpleTokenizer().encode(text)
    tokens = [START, *ids, END, *[0] * (75 - len(ids))]
    with torch.no_grad():
        expected = pipe.text_encoder(torch.tensor([tokens])).last_hidden_state[0].numpy()
    assert close(clip.context([text], dialect="a1111").hidden_states[0], expected)
    assert not close(clip.context([text], dialect="diffusers").hidden_states[0], expected)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (fox:1.2.3)", r"expected a weight in the prompt, found '1.2.3'"),
        ("a [cat:dog:0.5]", r"\[cat:dog:0.5\] changes at a step"),
        ("a [fox:3]", r"\[fox:3\] changes at a step"),
        ("a [[[b]]:2]", r"changes at a step"),
        ("a [cat:dog:0.5 ]", r"changes at a step"),
        ("a [cat: 3 ]", r"changes at a step"),
        ("a [cat:dog:5e-1]", r"changes at a step"),
        ("a [cat:dog:+.5E2]", r"changes at a step"),
        ("a [cat|dog]", r"\[cat\|dog\] changes with each step"),
        ("a cat AND a dog", "AND in the prompt asks for several Contexts"),
        ("a fox <lora:style:0.8>", "<lora:style:0.8> asks for an extra network"),
        ("a cat \\AND a dog", "AND in the prompt asks for several Contexts"),  # no backslash escapes these two
        ("a fox \\<lora:style:0.8>", "<lora:style:0.8> asks for an extra network"),
        (f"a (fox:{'9' * 40})", r"expected a finite weight in the prompt, found 1e\+40"),
        ("(" * 3000 + "fox" + ")" * 3000, "expected a finite weight in the prompt"),
    ],
)
def test_what_is_no_one_context_is_refused_by_name(sd1: tuple[Any, Encoder], prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sd1[1].context([prompt], dialect="a1111")


@pytest.mark.parametrize("text", ["a cat AND a dog", "a fox <lora:style:0.8>"])
def test_what_is_looked_for_in_the_prompt_alone_is_text_in_a_negative_one(sd1: tuple[Any, Encoder], text: str) -> None:
    pipe, clip = sd1
    found = clip.context(["a fox"], negative=[text], dialect="a1111").negative_hidden_states
    assert found is not None and close(found[0], expected_chunk(pipe.tokenizer, pipe.text_encoder, [(text, 1.0)]))
    with pytest.raises(InputError, match="changes at a step"):
        clip.context(["a fox"], negative=["[cat:dog:0.5]"], dialect="a1111")


@pytest.mark.parametrize("prompt", ["\\[cat:dog:0.5\\]", "[a:b]", "[a:b:5e]", "(a|b)", "ANDY", "a < b", "a \\<b"])
def test_what_only_looks_like_it_is_text(sd1: tuple[Any, Encoder], prompt: str) -> None:
    assert sd1[1].context([prompt], dialect="a1111").chunks == 1


@pytest.mark.parametrize(
    ("commented", "plain"),
    [
        ("a fox # AND [red|blue]", "a fox"),
        ("a fox #(in\nthe snow", "a fox the snow"),
        ("#red\na fox", "a fox"),
        ("# nothing else", ""),
    ],
)
def test_what_stands_behind_a_number_sign_is_a_comment(sd1: tuple[Any, Encoder], commented: str, plain: str) -> None:
    clip = sd1[1]
    found = clip.context([commented], negative=[commented], dialect="a1111")
    expected = clip.context([plain], dialect="a1111").hidden_states
    assert np.array_equal(found.hidden_states, expected) and np.array_equal(found.negative_hidden_states, expected)
    text = clip.context([commented], dialect="comfyui").hidden_states
    assert not np.array_equal(text, clip.context([plain], dialect="comfyui").hidden_states)


def test_an_embedding_stands_where_the_tokens_of_its_name_do(sd1: tuple[Any, Encoder], tmp_path: Path) -> None:
    pipe, clip = sd1
    table = pipe.text_encoder.get_input_embeddings()
    dog = table(torch.tensor(ids_of(pipe.tokenizer, "dog dog"))).detach()
    path = tmp_path / "my style.pt"
    torch.save({"string_to_param": {"*": dog}}, path)
    expected = clip.context(["a (dog dog:1.2) fox"], dialect="a1111").hidden_states
    assert close(clip.context(["a (My Style:1.2) fox"], dialect="a1111", embeddings=[path]).hidden_states, expected)
    # Its vectors are never cut: what has no room for all of them begins with the next chunk.
    found = clip.context(["fox " * 74 + "my style"], dialect="a1111", embeddings=[path])
    expected = clip.context(["fox " * 74 + " BREAK dog dog"], dialect="a1111").hidden_states
    assert close(found.hidden_states, expected)
