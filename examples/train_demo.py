"""Train the demo checkpoint: a whole CLIP in small, on rendered scenes.

    python examples/train_demo.py --seed 0 --out clip_export/demo
    python examples/train_demo.py --evaluate clip_export/demo

N pictures and N captions are embedded, the N x N matrix of their similarities is formed, and the symmetric
contrastive loss under a learned scale is minimised. The model keeps CLIP's vocabulary, its context of 77 tokens, its
heads of 64 and its QuickGELU; only widths, depths and picture size are small. The same seed on the same machine with
the same number of threads gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torchvision_shim  # noqa: F401  (before transformers)
from demo_metrics import HeldOut, embed_ids, embed_images, evaluate, measure, tokenise
from demo_tokenizer import CONTEXT, build_tokenizer, save_tokenizer
from PIL import Image
from scenes import COUNTS, SHAPES, Scene, all_scenes, caption, is_held_out, render, short_caption
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

SIDE, PATCH, START, END = 64, 8, 49406, 49407
EMBEDDING = 128
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": 4}
TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_hidden_layers": 4}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of RGB in 0..1
MAX_SCALE = math.log(100)  # CLIP's bound on the learned log scale
SHORT = 0.15  # share of captions that leave attributes out
NOISE = 0.02  # standard deviation of the noise on training pictures, in units of normalised pixels
RENDERINGS = 2  # different drawings of each description
EASY = 0.15  # share of the steps that see single large objects only
FAMILY = 4  # scenes of a batch that differ in shape alone


# ------------------------------------------------------------------ model and data


def new_model() -> CLIPModel:
    """A fresh CLIP with the demo's sizes."""
    shared = {"hidden_act": "quick_gelu", "projection_dim": EMBEDDING}
    tokens = {"vocab_size": END + 1, "max_position_embeddings": CONTEXT, "bos_token_id": START, "eos_token_id": END}
    text = {**tokens, "pad_token_id": END, **TEXT, **shared}
    vision = {"image_size": SIDE, "patch_size": PATCH, **VISION, **shared}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING))
    initialise(model)
    return model


def initialise(model: CLIPModel) -> None:
    """Weights of unit gain, and an end token of zero, so that at the start captions already differ where it is read.

    CLIP's own initialisation is small everywhere: then all captions have nearly the same embedding, neither tower has
    a reason to tell shapes apart before the other does, and both take thousands of steps to begin.
    """
    for name, weight in model.named_parameters():
        if (weight.ndim == 2 and ".layers." in name) or "patch_embedding" in name:
            depth = 2 * len(model.text_model.encoder.layers) if "fc2" in name or "out_proj" in name else 1
            torch.nn.init.normal_(weight, std=(weight[0].numel() * depth) ** -0.5)
    embeddings = model.text_model.embeddings
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.1)
    for layer in model.text_model.encoder.layers:  # words have to reach the end token against nothing but zero
        torch.nn.init.normal_(layer.self_attn.out_proj.weight, std=TEXT["hidden_size"] ** -0.5)
    with torch.no_grad():
        embeddings.token_embedding.weight[END] = 0


def new_processor() -> CLIPProcessor:
    """CLIP's preprocessing at the demo's picture size, and CLIP's tokenizer."""
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE},
                                image_mean=list(MEAN), image_std=list(STD))  # fmt: skip
    return CLIPProcessor(images, build_tokenizer())


def training_picture(job: tuple[Scene, int]) -> np.ndarray:
    """One drawing as the model's uint8 pixels (side, side, 3)."""
    picture = render(job[0], job[1], pixels=160, oversample=2)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def training_pictures(scenes: list[Scene], seed: int, workers: int) -> Tensor:
    """All drawings of all training scenes: uint8 (renderings, scenes, 3, side, side)."""
    jobs = [(scene, seed * 1000 + number) for number in range(RENDERINGS) for scene in scenes]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pictures = pool.map(training_picture, jobs, chunksize=256)
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return stacked.reshape(RENDERINGS, len(scenes), 3, SIDE, SIDE)


class Batches:
    """An endless stream of (pixels, captions); no description, and so no caption, comes twice in a batch.

    Among random scenes colour, count and place nearly always suffice to tell the pairs apart, and shapes, the quietest
    in pixels, would be learned late or never. So batches alternate: one has full captions of scenes in families of four
    that differ in shape alone, the next has every pair of colour and shape twice, in different numbers, with short
    captions. The first batches, while `easy`, are only of the second kind, and of large objects.
    """

    def __init__(self, seed: int, size: int, workers: int) -> None:
        """Render the training scenes; `size` is the number of pairs in a batch."""
        self.scenes = [scene for scene in all_scenes() if not is_held_out(scene)]
        self.numbers = {scene: number for number, scene in enumerate(self.scenes)}
        self.pictures = training_pictures(self.scenes, seed, workers)
        self.rng, self.size = random.Random(seed), size
        self.queue: list[Scene] = []
        self.classes: dict[tuple[str, str, int], list[Scene]] = {}
        for scene in self.scenes:
            self.classes.setdefault((scene.colour, scene.shape, scene.count), []).append(scene)
        self.turn, self.easy = 0, True

    def family(self, scene: Scene) -> list[Scene]:
        """The scene and training scenes that differ from it in shape alone, FAMILY in all where there are as many."""
        others = (replace(scene, shape=shape) for shape in SHAPES if shape != scene.shape)
        known = [other for other in others if other in self.numbers]
        return [scene, *self.rng.sample(known, min(FAMILY - 1, len(known)))]

    def draw(self) -> list[Scene]:
        """The scenes of the next batch, all different."""
        taken: dict[Scene, None] = {}
        while len(taken) < self.size:
            if not self.queue:
                self.queue = self.rng.sample(self.scenes, len(self.scenes))
            taken.update(dict.fromkeys(self.family(self.queue.pop())))
        return list(taken)[: self.size]

    def words(self, scenes: list[Scene]) -> list[str]:
        """One caption for each scene, some of them short; a short one already taken gives way to a full one."""
        captions: list[str] = []
        for scene in scenes:
            short = short_caption(scene, self.rng) if self.rng.random() < SHORT else ""
            captions.append(short if short and short not in captions else caption(scene, self.rng))
        return captions

    def line_up(self) -> tuple[list[Scene], list[str]]:
        """Two scenes for each pair of colour and shape, and short captions, which tell these two and the count."""
        absent = self.rng.choice(list(COUNTS))
        classes = [members for (_, _, count), members in self.classes.items() if count != absent]
        if self.easy:
            classes = [[scene for scene in members if scene.size == "large"] for members in classes]
        scenes = [self.rng.choice(members) for members in classes]
        return scenes, [short_caption(scene, self.rng) for scene in scenes]

    def next(self) -> tuple[Tensor, list[str]]:
        """Normalised pixels (N, 3, side, side) and N captions."""
        self.turn += 1
        if self.turn % 2 and not self.easy:
            scenes = self.draw()
            captions = self.words(scenes)
        else:
            scenes, captions = self.line_up()
        drawings = torch.tensor([self.rng.randrange(RENDERINGS) for _ in scenes])
        pixels = self.pictures[drawings, torch.tensor([self.numbers[scene] for scene in scenes])].float() / 255
        pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return pixels + NOISE * torch.randn_like(pixels), captions


# ------------------------------------------------------------------ training


def contrastive_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's loss of N unit image rows and N unit text rows, (N, D) both: pair i belongs to pair i, both ways."""
    logits = log_scale.exp() * images @ texts.T  # (N, N)
    pairs = torch.arange(len(images))
    return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


def optimisers(model: CLIPModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices of the blocks, at ten times `rate`; AdamW at `rate` for everything else.

    With AdamW alone the same accuracy takes about twice the steps.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=10 * rate, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0),
    ]


def rate_at(step: int, steps: int, warm_up: int = 100) -> float:
    """The share of the full learning rate at a step: a linear rise, then a half cosine down to nothing."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train_step(model: CLIPModel, optims: list[torch.optim.Optimizer], pixels: Tensor, ids: Tensor) -> float:
    """One update; returns the loss."""
    model.train()
    loss = contrastive_loss(embed_images(model, pixels), embed_ids(model, ids), model.logit_scale)
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optim in optims:
        optim.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_SCALE)
    return loss.item()


def train(options: argparse.Namespace) -> tuple[CLIPModel, CLIPProcessor, list[dict[str, float]]]:
    """Train from scratch; returns the model, its processor and the curve, printed as it grows."""
    torch.manual_seed(options.seed)
    model, processor = new_model(), new_processor()
    batches = Batches(options.seed, options.batch, options.threads)
    held_out = HeldOut(processor, groups=5, seed=options.seed + 1)  # not the groups of the final figures
    optims = optimisers(model, options.rate)
    full_rates = [optim.param_groups[0]["lr"] for optim in optims]
    curve, losses, begun = [], [], time.monotonic()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(batches.scenes)} descriptions", flush=True)
    for step in range(options.steps):
        for optim, full_rate in zip(optims, full_rates, strict=True):
            optim.param_groups[0]["lr"] = full_rate * rate_at(step, options.steps)
        batches.easy = step < EASY * options.steps
        pixels, words = batches.next()
        losses.append(train_step(model, optims, pixels, tokenise(processor.tokenizer, words)))
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            point = {"step": step + 1, "loss": round(sum(losses) / len(losses), 4),
                     "scale": round(model.logit_scale.exp().item(), 2), **measure(model, processor.tokenizer, held_out),
                     "seconds": round(time.monotonic() - begun)}  # fmt: skip
            print(json.dumps(point), flush=True)
            curve.append(point)
            losses = []
    return model, processor, curve


# ------------------------------------------------------------------ saving


def save(model: CLIPModel, processor: CLIPProcessor, curve: list, options: argparse.Namespace) -> None:
    """Write the checkpoint in half precision beside `--out` and put it in place whole, keeping an older README."""
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".train-") as name:
        fresh = Path(name, "new")
        model.half().save_pretrained(fresh)
        (fresh / "model.safetensors").chmod(0o644)  # written for its owner alone
        processor.image_processor.save_pretrained(fresh)
        save_tokenizer(processor.tokenizer, fresh)
        record = {"command": command(options), "seed": options.seed, "threads": options.threads,
                  "torch": torch.__version__, "held_out": evaluate(fresh), "curve": curve}  # fmt: skip
        (fresh / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        if out.exists():
            keep = out / "README.md"
            if keep.exists():
                shutil.copy(keep, fresh)
            out.rename(Path(name, "old"))
        fresh.rename(out)
    print(json.dumps(record["held_out"]))


def command(options: argparse.Namespace) -> str:
    """The command line that repeats this training."""
    flags = " ".join(
        f"--{name} {getattr(options, name)}" for name in ("seed", "steps", "batch", "rate", "threads", "every")
    )
    return f"python examples/train_demo.py {flags} --out {options.out}"


def main() -> None:
    """Read the flags and train, or measure a saved checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="measure this checkpoint instead of training")
    parser.add_argument("--groups", type=int, default=20, help="groups of 64 scenes to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rate", type=float, default=2e-3, help="full learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=250, help="steps between points of the curve")
    parser.add_argument("--out", type=Path, default=Path("clip_export/demo"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.evaluate:
        print(json.dumps(evaluate(options.evaluate, options.groups), indent=1))
    else:
        save(*train(options), options)


if __name__ == "__main__":
    main()
