"""Prompts -> Context, what the cross-attention of a diffusion model takes.

    layers.py     clip-skip in every tool's numbering, and what each family of models takes if nobody says
    units.py      one text encoder: its tokens, its vectors of textual inversion, one row for its engine
    dialects/     what a prompt means to a tool, a file a tool: weights, chunks, BREAK, empty prompts
    inversion.py  files of textual inversion
    encoding.py   prompts through a dialect and one or two encoders
    result.py     the Context, and its file

docs/context.md has the table of what each tool does. Nothing here needs torch, files of torch.save included.
"""

from __future__ import annotations

from clip_export.context.dialects import PromptDialect, dialect_names
from clip_export.context.encoding import encode_context
from clip_export.context.inversion import read_embeddings
from clip_export.context.result import Context

__all__ = ["Context", "PromptDialect", "dialect_names", "encode_context", "read_embeddings"]
