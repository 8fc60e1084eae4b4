"""Doors to the originals that the tests compare with.

torchvision is used for its PIL transforms only, which are plain Python. Its wheel also stands beside a torch that its
compiled operators were not built for and cannot load in: it imports once the two that it registers fake kernels for
are declared.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch


@functools.cache
def _torchvision_library() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def torchvision() -> ModuleType:
    """The torchvision package, for its PIL transforms."""
    _torchvision_library()
    import torchvision

    return torchvision


def open_clip() -> ModuleType:
    """The open_clip package."""
    _torchvision_library()
    import open_clip

    return open_clip


def open_clip_train() -> ModuleType:
    """The training loop that comes with open_clip."""
    _torchvision_library()
    import open_clip_train.train

    return open_clip_train.train


def openai_clip() -> ModuleType:
    """OpenAI's clip package (as packaged in clip-anytorch)."""
    _torchvision_library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources announces its own end
        import clip

    return clip


def transformers() -> ModuleType:
    """The transformers package. torchvision must be importable before it is."""
    _torchvision_library()
    import transformers

    return transformers


def diffusers() -> ModuleType:
    """The diffusers package, with transformers importable beside it."""
    transformers()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def compel() -> ModuleType:
    """The compel package."""
    diffusers()
    import compel
    import compel.convenience_wrappers
    import compel.prompt_parser

    return compel
