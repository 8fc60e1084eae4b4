"""ComfyUI's prompts, against values computed from its rules: comfy/sd1_clip.py in Comfy-Org/ComfyUI, read at commit
4bd7a4004ab8bf0e516222036dc97733ddf3aa74 (tokenize_with_weights, token_weights, encode_token_weights).

ComfyUI cannot be installed from a registry. What a prompt parses to is written down here by hand, from those rules;
states are computed with transformers' CLIPTextModel, and the formula of encode_token_weights:
z = (z - z_empty) * weight + z_empty, for each token whose weight is not 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_made import originals

from clip_export.context.dialects import comfyui
from clip_export.encoder import Encoder
from clip_export.errors import InputError

WITHIN = 1e-4
START, END = 49406, 49407


@pytest.fixture
def sd1() -> tuple[Any, Encoder]:
    return originals("sd1")


@pytest.fixture
def sdxl() -> tuple[Any, Encoder]:
    return originals("sdxl")


Segments = Sequence[tuple[str, float]]


def states_of(model: Any, tokens: list[int], *, depth: int, normalized: bool) -> np.ndarray:
    with torch.no_grad():
        hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1 - depth]
        norm = getattr(model, "final_layer_norm", None) or model.text_model.final_layer_norm
        return (norm(hidden) if normalized else hidden)[0].numpy()


def expected_chunk(
    tokenizer: Any, model: Any, segments: Segments, *, pad: int = END, depth: int = 0, normalized: bool = True
) -> np.ndarray:
    """One context from segments of text and weight, by the formula."""
    tokens, weights = [START], [1.0]
    for text, weight in segments:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += ids
        weights += [weight] * len(ids)
    tokens, weights = [*tokens, END], [*weights, 1.0]
    tokens += [pad] * (77 - len(tokens))
    weights += [1.0] * (77 - len(weights))
    z = states_of(model, tokens, depth=depth, normalized=normalized)
    empty = states_of(model, [START, END, *[pad] * 75], depth=depth, normalized=normalized)
    for place, weight in enumerate(weights):
        if weight != 1.0:
            z[place] = (z[place] - empty[place]) * weight + empty[place]
    return z


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and float(np.abs(found - expected).max()) <= WITHIN


# Parsing: parse_parentheses and token_weights

PARSED = {
    "a red fox": [("a red fox", 1.0)],
    "a (red) fox": [("a ", 1.0), ("red", 1.1), (" fox", 1.0)],
    "a ((red)) fox": [("a ", 1.0), ("red", 1.1 * 1.1), (" fox", 1.0)],
    "(red:1.3)": [("red", 1.3)],
    "((red:1.3) fox)": [("red", 1.3), (" fox", 1.1)],  # a stated weight replaces those around it
    "(a (b:0.5) c:2)": [("a ", 2.0), ("b", 0.5), (" c", 2.0)],
    "(red:much)": [("red:much", 1.1)],  # no number: text, and the weight of parentheses
    "(:1.2)": [(":1.2", 1.1)],
    "(a:b:1.2)": [("a:b", 1.2)],
    "[red]": [("[red]", 1.0)],  # square brackets mean nothing
    "a \\(literal\\) (b)": [("a \x00\x02literal\x00\x01 ", 1.0), ("b", 1.1)],
    # Unbalanced: what is never closed is text with its parenthesis; one closed too often makes the next one text.
    "a (red fox": [("a ", 1.0), ("(red fox", 1.0)],
    "a (red (fox)": [("a ", 1.0), ("red ", 1.1), ("(fox", 1.1)],
    "a) red (fox)": [("a) red (fox)", 1.0)],
    "": [],
    "()": [],
}


@pytest.mark.parametrize("prompt", PARSED)
def test_prompts_parse_to_segments_and_weights(prompt: str) -> None:
    found = comfyui.parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in PARSED[prompt]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in PARSED[prompt]])


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_is_refused(weight: str) -> None:
    with pytest.raises(InputError, match=f"expected a finite weight in the prompt, found '{weight}'"):
        comfyui.parse(f"a (fox:{weight})")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(a:1e39) cat", "expected a finite weight in the prompt, found 1e\\+39"),
        ("(" * 901 + "a" + ")" * 901, "expected at most 900 parentheses inside of each other"),
        ("(" * 100_000 + "a" + ")" * 100_000, "expected at most 900 parentheses inside of each other"),
        ("a (fox:3e38) " * 6, "the Context of the prompt 'a \\(fox:3e38.*…' is not finite"),
    ],
)
def test_weights_that_leave_no_numbers_are_refused(sd1: tuple[Any, Encoder], prompt: str, message: str) -> None:
    """3e38 is a float32, and what it makes of states need not be."""
    table = sd1[1].context(["a"]).hidden_states
    assert np.isfinite(table).all()
    with pytest.raises(InputError, match=message):
        sd1[1].context(["a", prompt], dialect="comfyui")
    with pytest.raises(InputError, match=message):
        sd1[1].context(["a"], negative=[prompt], dialect="comfyui")


def test_parentheses_nest_far_deeper_than_python_recurses() -> None:
    assert comfyui.parse("(" * 900 + "a:1.5" + ")" * 900) == [("a", 1.5)]
    assert comfyui.parse("(" * 300 + "a" + ")" * 300 + "b")[0][1] == pytest.approx(1.1**300)


# States

WEIGHTED: dict[str, list[Segments]] = {
    "a photo of a red fox": [[("a photo of a red fox", 1.0)]],
    "a (red:1.3) fox, (blurry:0.4)": [[("a", 1.0), ("red", 1.3), ("fox,", 1.0), ("blurry", 0.4)]],
    "((very)) red (fox:-1)": [[("very", 1.21), ("red", 1.0), ("fox", -1.0)]],
    "a (red:0) fox": [[("a", 1.0), ("red", 0.0), ("fox", 1.0)]],
}


@pytest.mark.parametrize("prompt", WEIGHTED)
def test_weights_move_states_away_from_the_empty_prompts(sd1: tuple[Any, Encoder], prompt: str) -> None:
    pipe, clip = sd1
    expected = np.concatenate([expected_chunk(pipe.tokenizer, pipe.text_encoder, part) for part in WEIGHTED[prompt]])
    assert close(clip.context([prompt], dialect="comfyui").hidden_states[0], expected)


@pytest.mark.parametrize(("spelling", "depth"), [("comfyui:-1", 0), ("comfyui:-2", 1), ("comfyui:-4", 3)])
def test_layers_of_sd1_are_normalized_and_those_of_sdxl_are_not(
    sd1: tuple[Any, Encoder], sdxl: tuple[Any, Encoder], spelling: str, depth: int
) -> None:
    """SDClipModel has layer_norm_hidden_state, which SDXL's two encoders switch off (comfy/sdxl_clip.py)."""
    segments = [("a", 1.0), ("red", 1.3), ("fox", 1.0)]
    pipe, clip = sd1
    expected = expected_chunk(pipe.tokenizer, pipe.text_encoder, segments, depth=depth)
    found = clip.context(["a (red:1.3) fox"], dialect="comfyui", clip_skip=spelling)
    assert close(found.hidden_states[0], expected)
    pipe, clip = sdxl
    left = expected_chunk(pipe.tokenizer, pipe.text_encoder, segments, depth=depth, normalized=False)
    right = expected_chunk(pipe.tokenizer_2, pipe.text_encoder_2, segments, depth=depth, normalized=False, pad=0)
    found = clip.context(["a (red:1.3) fox"], dialect="comfyui", clip_skip=spelling)
    assert close(found.hidden_states[0], np.concatenate([left, right], axis=1))


def test_the_pooled_embedding_is_that_of_the_first_chunk(sdxl: tuple[Any, Encoder]) -> None:
    pipe, clip = sdxl
    first = "fox " * 75
    tokens = [START, *pipe.tokenizer_2(first, add_special_tokens=False)["input_ids"], END]
    with torch.no_grad():
        expected = pipe.text_encoder_2(torch.tensor([tokens])).text_embeds.numpy()
    found = clip.context([first + "and more"], dialect="comfyui")
    assert found.pooled is not None and close(found.pooled, expected)


def test_an_empty_negative_prompt_is_encoded(sdxl: tuple[Any, Encoder]) -> None:
    pipe, clip = sdxl
    left = states_of(pipe.text_encoder, [START, END, *[END] * 75], depth=1, normalized=False)
    right = states_of(pipe.text_encoder_2, [START, END, *[0] * 75], depth=1, normalized=False)
    found = clip.context(["a fox"], negative=[""], dialect="comfyui")
    assert found.negative_hidden_states is not None
    assert close(found.negative_hidden_states[0], np.concatenate([left, right], axis=1))


# Chunks

WORDS = "fox " * 70  # 70 tokens


def test_a_segment_of_fewer_than_8_tokens_goes_whole_into_the_next_chunk(sd1: tuple[Any, Encoder]) -> None:
    pipe, clip = sd1
    found = clip.context([WORDS + "(a b c d e f g:1.2) end"], dialect="comfyui").hidden_states[0]
    expected = [[(WORDS, 1.0)], [("a b c d e f g", 1.2), ("end", 1.0)]]
    assert close(found, np.concatenate([expected_chunk(pipe.tokenizer, pipe.text_encoder, part) for part in expected]))


def test_a_segment_of_8_tokens_is_cut_where_the_chunk_ends(sd1: tuple[Any, Encoder]) -> None:
    pipe, clip = sd1
    found = clip.context([WORDS + "(a b c d e f g h:1.2) end"], dialect="comfyui").hidden_states[0]
    expected = [[(WORDS, 1.0), ("a b c d e", 1.2)], [("f g h", 1.2), ("end", 1.0)]]
    assert close(found, np.concatenate([expected_chunk(pipe.tokenizer, pipe.text_encoder, part) for part in expected]))


def test_a_chunk_that_is_just_full_is_one_chunk(sd1: tuple[Any, Encoder]) -> None:
    _, clip = sd1
    assert clip.context(["fox " * 75], dialect="comfyui").chunks == 1
    assert clip.context(["fox " * 76], dialect="comfyui").chunks == 2


def test_shorter_prompts_go_on_with_the_empty_one(sd1: tuple[Any, Encoder]) -> None:
    _, clip = sd1
    both = clip.context(["a fox", "fox " * 80], negative=["", ""], dialect="comfyui")
    alone = clip.context(["a fox"], dialect="comfyui").hidden_states[0]
    empty = clip.context([""], dialect="comfyui").hidden_states[0]
    assert both.hidden_states.shape == (2, 154, 128)
    assert close(both.hidden_states[0], np.concatenate([alone, empty]))
    assert both.negative_hidden_states is not None
    assert close(both.negative_hidden_states[1], np.concatenate([empty, empty]))


# Textual inversion


def with_vectors(pipe: Any, parts: Sequence[str | np.ndarray]) -> np.ndarray:
    """States of one context where an array stands for tokens: its rows are their embeddings."""
    model, table = pipe.text_encoder, pipe.text_encoder.get_input_embeddings()
    rows = [table(torch.tensor([START]))]
    for part in parts:
        if isinstance(part, str):
            rows.append(table(torch.tensor(pipe.tokenizer(part, add_special_tokens=False)["input_ids"])))
        else:
            rows.append(torch.from_numpy(part))
    filled = torch.cat(rows)
    padding = table(torch.full((77 - len(filled),), END))
    embeds = torch.cat([filled, padding])[None]
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(embeds[0]))
    try:
        with torch.no_grad():
            return model(torch.arange(77)[None]).last_hidden_state[0].numpy()
    finally:
        model.set_input_embeddings(table)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a embedding:toy fox", ["a", "toy", "fox"]),
        ("embedding:toy, fox", ["toy", ", fox"]),
        ("a (embedding:toy:1.0) fox", ["a", "toy", "fox"]),
        ("a embedding:toy[x] fox", ["a", "toy", "[x] fox"]),
        ("nembedding:toy fox", ["nembedding:toy fox"]),  # it has to begin a word
        ("a\nembedding:toy fox", ["a", "toy", "fox"]),
        ("a\tembedding:toy fox", ["a\tembedding:toy fox"]),  # behind a space or a new line, and no other blank
    ],
)
def test_an_embedding_stands_where_it_is_named(
    sd1: tuple[Any, Encoder], tmp_path: Path, prompt: str, parts: list[str]
) -> None:
    pipe, clip = sd1
    vectors = 0.1 * np.random.default_rng(0).standard_normal((3, 128), dtype=np.float32)
    path = tmp_path / "toy.pt"
    torch.save({"string_to_param": {"*": torch.from_numpy(vectors)}, "name": "other", "step": 5}, path)
    with torch.no_grad():
        expected = with_vectors(pipe, [vectors if part == "toy" else part for part in parts])
    assert close(clip.context([prompt], dialect="comfyui", embeddings=[path]).hidden_states[0], expected)


def test_an_embedding_that_is_not_there_is_left_out_with_a_warning(sd1: tuple[Any, Encoder], tmp_path: Path) -> None:
    _, clip = sd1
    path = tmp_path / "toy.pt"
    torch.save({"toy": torch.zeros(128)}, path)
    with pytest.warns(UserWarning, match="no embedding is called 'dog', and ComfyUI leaves it out; given are: toy"):
        found = clip.context(["a embedding:dog fox"], dialect="comfyui", embeddings=[path])
    assert close(found.hidden_states, clip.context(["a fox"], dialect="comfyui").hidden_states)
    with pytest.warns(UserWarning, match="no embedding is called 'dog', and ComfyUI leaves it out; given are: none"):
        found = clip.context(["a embedding:dog fox"], dialect="comfyui")
    assert close(found.hidden_states, clip.context(["a fox"], dialect="comfyui").hidden_states)
