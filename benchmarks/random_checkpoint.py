"""A Hugging Face checkpoint of a real architecture with random weights from a seed: for measuring, not for using.

python benchmarks/random_checkpoint.py vit-l-14 DIRECTORY
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch

import clip_export

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracles

# name: text (width, layers, heads), image (width, layers, heads, size, patch), embedding_dim
ARCHITECTURES = {
    "vit-b-32": ((512, 12, 8), (768, 12, 12, 224, 32), 512),
    "vit-b-16": ((512, 12, 8), (768, 12, 12, 224, 16), 512),
    "vit-l-14": ((768, 12, 12), (1024, 24, 16, 224, 14), 768),
}
DEMO = Path(clip_export.__file__).parent / "demo"


def make(name: str, directory: Path, *, seed: int = 0) -> Any:
    """Write the checkpoint `name` to `directory`. Returns transformers' model, in eval mode."""
    transformers = oracles.transformers()
    (text_width, text_layers, text_heads), (width, layers, heads, size, patch), dim = ARCHITECTURES[name]
    text = _config(text_width, text_layers, text_heads) | {"bos_token_id": 49406, "eos_token_id": 49407}
    vision = _config(width, layers, heads) | {"image_size": size, "patch_size": patch}
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(DEMO / file, directory / file)
    shape = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    transformers.CLIPImageProcessor(**shape).save_pretrained(directory)
    return model


def _config(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ARCHITECTURES)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    make(arguments.name, arguments.directory)
