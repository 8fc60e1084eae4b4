"""The text tower: token ids to hidden states, a pooled state and an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn, zeros

from clip_export.spec import TextSpec
from clip_export.towers.transformer import Transformer


class TextTower(nn.Module):
    """`outputs` names what `forward` returns, in that order: hidden_states, pooled, embedding."""

    def __init__(self, spec: TextSpec, outputs: Sequence[str]) -> None:
        super().__init__()
        width = spec.transformer.width
        self.outputs = tuple(outputs)
        self.token_embedding = nn.Embedding(spec.vocab_size, width)
        self.positional_embedding = nn.Parameter(zeros(spec.context_length, width))
        self.blocks = Transformer(spec.transformer, causal=spec.causal)
        self.final_norm = nn.LayerNorm(width, eps=spec.transformer.layer_norm_eps)
        if spec.embedding_dim is not None:
            self.projection = nn.Linear(width, spec.embedding_dim, bias=False)

    def forward(self, input_ids: Tensor, eot_index: Tensor) -> tuple[Tensor, ...]:
        """Encode `input_ids` int32 [batch, sequence]; `eot_index` int32 [batch] is the position that is pooled.

        Returns float32: hidden_states [batch, sequence, width] after the final LayerNorm, pooled [batch, width],
        embedding [batch, embedding_dim], not normalized.
        """

        def end_of_text(states: Tensor) -> Tensor:
            # gather with int64: an int32 index mixed with the exporter's int64 arange makes an invalid graph.
            index = eot_index.long()[:, None, None].expand(-1, 1, states.shape[2])
            return states.gather(1, index)

        states = self.token_embedding(input_ids) + self.positional_embedding[: input_ids.shape[1]]
        results: dict[str, Tensor] = {}
        if "hidden_states" in self.outputs:
            results["hidden_states"] = self.final_norm(self.blocks(states))
            pooled = end_of_text(results["hidden_states"])
        else:
            pooled = self.final_norm(self.blocks(states, end_of_text))
        results["pooled"] = pooled.squeeze(1)
        if "embedding" in self.outputs:
            results["embedding"] = self.projection(pooled).squeeze(1)
        return tuple(results[name] for name in self.outputs)


class ContextTower(TextTower):
    """The text tower for a diffusion model: the states of any layer, chosen for each text when it is run.

    `outputs` are among those of TextTower and raw_states.
    """

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, eot_index: Tensor, layer: Tensor, attention_mask: Tensor, inputs_embeds: Tensor
    ) -> tuple[Tensor, ...]:
        """Encode `input_ids` as TextTower does, with what context_inputs.py says of the other inputs.

        Returns float32: hidden_states [batch, sequence, width] of `layer`, after the final LayerNorm, raw_states the
        same before it; pooled and embedding of the last layer whatever `layer` is.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        earlier = positions[None, :] <= positions[:, None]
        visible = earlier[None, None] & (attention_mask != 0)[:, None, None, :]
        known = input_ids >= 0
        tokens = self.token_embedding(torch.where(known, input_ids, 0))
        embedded = torch.where(known[:, :, None], tokens, inputs_embeds)
        states = chosen = embedded + self.positional_embedding[: input_ids.shape[1]]
        for number, block in enumerate(self.blocks, start=1):
            states = block(states, visible=visible)
            wanted = layer == len(self.blocks) - number
            chosen = torch.where(wanted[:, None, None], states, chosen)
        index = eot_index.long()[:, None, None].expand(-1, 1, states.shape[2])
        pooled = self.final_norm(states.gather(1, index))
        results = {"hidden_states": self.final_norm(chosen), "raw_states": chosen, "pooled": pooled.squeeze(1)}
        if "embedding" in self.outputs:
            results["embedding"] = self.projection(pooled).squeeze(1)
        return tuple(results[name] for name in self.outputs)
