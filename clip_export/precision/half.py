"""fp32 graph -> strongly typed half graph: weights and activations in half wherever they fit, the rest fp32.

LayerNormalization stays an fp32 node with casts around it. ONNX would let it read half and compute in fp32
(`stash_type`), but TensorRT's parser drops that attribute in a strongly typed network, where the type of the input is
the only statement of precision there is. The cast form builds for every GPU, and gamma and beta stay fp32 with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_export.errors import ExportError, InputError
from clip_export.precision.decide import Kept, Rule, decide
from clip_export.precision.fits import HALF_TYPES, Precision
from clip_export.precision.ranges import Ranges

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["HalfReport", "Kept", "convert"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfReport:
    """What became of a graph: `half` counts the nodes that run in half, `fp32` the others by rule.

    The rules: `operator` is fp32 always, `asked` is in a scope that was to be kept, `range` does not fit, `moves` only
    moves fp32 numbers. `kept` names those of `range`, each with the tensor, its value and the limit.

    Of a graph that was refined, `agreement` is the min cosine to the fp32 graph, and `refined` are the scopes that stay
    fp32 to reach it; they count as asked.
    """

    precision: str
    half: int
    fp32: Mapping[Rule, int]
    kept: tuple[Kept, ...]
    agreement: float | None = None
    refined: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return {
            "precision": self.precision,
            "half": self.half,
            "fp32": dict(self.fp32),
            "kept": [asdict(item) for item in self.kept],
            "agreement": self.agreement,
            "refined": list(self.refined),
        }


def convert(
    source: Path,
    target: Path,
    *,
    precision: str,
    ranges: Ranges,
    keep: Sequence[str] = (),
    everything: bool = False,
) -> HalfReport:
    """Write the fp32 graph at `source` to `target` in `precision`, fp16 or bf16; weights go beside it where large.

    `ranges` are those of `source`. `keep` are scopes that stay fp32 ("final_norm", "projection"). With `everything` all
    matrix products run in half, those of `keep` too, for GPUs that have no others. Inputs and outputs keep their types.
    The same graph and ranges give the same bytes.

    Raises InputError for an unknown precision, ExportError for a graph that is not fp32, PlanBuildError where
    `everything` would overflow or underflow, or where attention that has to stay fp32 cannot be taken apart.
    """
    import onnx_ir

    from clip_export.graph.files import save
    from clip_export.graph.primitives import decompose_attention
    from clip_export.precision._casts import write_types

    chosen = _checked(precision)
    model = onnx_ir.load(source)
    _require_fp32(model, source)
    half = HALF_TYPES[chosen]
    decisions = decide(model.graph, half, ranges, keep=keep, everything=everything)
    # TensorRT has no fp32 kernel for the Attention operator. What it becomes is not in `half`, so it stays fp32.
    decompose_attention(model, only=frozenset(decisions.fp32))
    write_types(model, half, decisions.half)
    save(model, target)
    return HalfReport(precision=chosen, half=len(decisions.half), fp32=decisions.count(), kept=decisions.kept)


def _checked(precision: str) -> Precision:
    for known in HALF_TYPES:
        if precision == known:
            return known
    raise InputError(f"there is no half precision {precision!r}", hint=f"choose one of: {', '.join(HALF_TYPES)}")


def _require_fp32(model: ir.Model, source: Path) -> None:
    """Raise ExportError unless every tensor has a type and none of them is of another floating type."""
    import onnx_ir as ir

    for node in model.graph:
        for value in node.outputs:
            dtype = value.dtype
            if dtype is None or (dtype.is_floating_point() and dtype != ir.DataType.FLOAT):
                found = "no type" if dtype is None else dtype.name.lower()
                raise ExportError(
                    f"{source.name}: expected float32 tensors, found {value.name} of {found}",
                    hint="convert the bundle's fp32 graph, not one that was converted before",
                )
