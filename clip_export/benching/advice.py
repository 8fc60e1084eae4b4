"""What to do about the stage that binds, with what it could bring at most."""

from __future__ import annotations

from clip_export.benching.end_to_end import EndToEnd

_ALL = 100  # times
_LARGE = 4  # times the pixels that the tower sees: decoding and resizing are mostly of what is thrown away


def advice(found: EndToEnd) -> str:
    """One line: what binds, its share, the most that can be gained there (Amdahl's law), and how."""
    stage = found.binds
    most = f"at most {found.gain:.2g} times as fast without it" if found.gain < _ALL else "nearly all of it"
    return f"{stage} binds ({most}): {_what_to_do(found, stage)}"


def _what_to_do(found: EndToEnd, stage: str) -> str:
    if stage in ("decode", "resize"):
        return _smaller_pictures(found)
    return {
        "read": "keep the files on a faster disk, or in the file cache, or store them smaller",
        "tokenize": "tokenize once and keep the ids, or share the work among processes",
        "copy": "hand in larger batches of pixels that are one array already",
        "copy back": "leave embeddings on the GPU: device_output=True",
        "compute": _faster_tower(found),
        "normalise": "ask for normalize=False where whoever takes the embeddings normalises them anyway",
    }[stage]


def _smaller_pictures(found: EndToEnd) -> str:
    assert found.picture_pixels is not None and found.tower_pixels is not None
    times = found.picture_pixels / found.tower_pixels
    if times >= _LARGE:
        return (
            f"pictures have {times:.0f} times the pixels that the tower sees; embed from smaller copies of them, "
            "and let clip-export verify --pairs say what that costs"
        )
    return "preprocess once and keep the pixels (encode_pixels), or give it more cores"


def _faster_tower(found: EndToEnd) -> str:
    if found.overlaps:
        return "a plan in fp16 or 8 bits (clip-export build --engine tensorrt), or larger batches"
    return "8 bits (clip-export build --precision int8cpu), more cores, or a GPU"
