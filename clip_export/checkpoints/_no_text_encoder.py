"""What else is in files of the kind that text encoders are looked for in, said by a part of a key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from clip_export.checkpoints._tensors import StoredTensor
from clip_export.errors import UnknownCheckpointError

LORA = "a LoRA"
_EMBEDDING = "an embedding of textual inversion"
# What else people have in files of this kind, by a part of a key.
_OTHERS = (
    (re.compile(r"lora_(te|unet|down|up|[AB])|lora\.(up|down)|hada_w1|lokr_|\.alpha$"), LORA),
    (re.compile(r"string_to_param|emb_params|^clip_[lg]$|^<[^<>]+>$"), _EMBEDDING),
    (re.compile(r"control_model\.|controlnet_cond_embedding|input_hint_block"), "a ControlNet"),
    (
        re.compile(r"^model\.diffusion_model\.|^down_blocks\.|^diffusion_model\.|^joint_blocks\.|^input_blocks\."),
        "a UNet",
    ),
    (re.compile(r"^first_stage_model\.|^(encoder|decoder)\.(down|up|mid|conv)"), "a VAE"),
    (re.compile(r"^encoder\.block\.\d+\.layer\.|^text_encoders\.t5"), "a T5 text encoder"),
)
_REMEDIES = {
    LORA: "a LoRA has no text encoder of its own: merge it into its checkpoint, and build that",
    _EMBEDDING: "give it to `clip-export context` as an --embedding, with the bundle of the model that it is for",
}
# A text encoder that nothing else is with, as ComfyUI has them in its folder of those.
_BARE = re.compile(r"(.*\.)?(text_model\.embeddings\.|token_embedding\.weight)")
_NO_ENCODER = "name the whole checkpoint, or the pipeline's folder; a UNet or a VAE alone cannot encode a prompt"


def no_text_encoder(path: Path, stored: Mapping[str, StoredTensor]) -> UnknownCheckpointError:
    """The error for the caller to raise: what the file at `path` holds instead, by the keys of `stored`."""
    if not stored:
        return UnknownCheckpointError(f"{path.name} has no text encoder; it holds no weights at all", hint=_NO_ENCODER)
    held = held_in(stored)
    if not held and (bare := next(filter(_BARE.match, stored), None)):
        files = "put config.json and the tokenizer files of the original beside it, and call it model.safetensors"
        return UnknownCheckpointError(
            f"{path.name} holds a text encoder (weight {bare}), and weights alone do not say of which model",
            hint=files
            if "text_model." in bare
            else "name the whole checkpoint that it is of, or the pipeline's folder",
        )
    keys = list(stored)
    shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    what = " and ".join(held) if held else "nothing that is known here"
    return UnknownCheckpointError(
        f"{path.name} has no text encoder; it holds {what} ({shown})",
        hint=next((_REMEDIES[name] for name in held if name in _REMEDIES), _NO_ENCODER),
    )


def held_in(stored: Mapping[str, StoredTensor]) -> list[str]:
    """What of `_OTHERS` a file with these keys holds, in their order."""
    return [what for pattern, what in _OTHERS if any(map(pattern.search, stored))]
