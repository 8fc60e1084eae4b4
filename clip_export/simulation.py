"""A half precision on a CPU, honestly: the graph in fp32 with every rounding of the half graph written out.

ONNX Runtime's CPU kernels run a float16 graph without its roundings, and so without its overflows. What runs here is
derived from the half graph itself: precision/simulate.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from clip_export import backends
from clip_export.bundle import Bundle
from clip_export.choice import GRAPHS, Choice
from clip_export.encoder import Encoder
from clip_export.errors import MissingDependencyError
from clip_export.graph.files import missing
from clip_export.runtime import assemble
from clip_export.spec import Tower


@contextmanager
def simulated(bundle: Bundle, precision: str, *, second: bool = True) -> Iterator[Encoder]:
    """An Encoder that computes what a GPU computes with the `precision` graphs of `bundle`, rounding by rounding.

    Takes an fp32 copy of the graphs in a temporary directory, of a second text encoder too unless it is not wanted.
    Raises MissingDependencyError without onnx-ir.
    """
    lacks = simulation_lacks()
    if lacks is not None:
        raise lacks
    from clip_export.precision.simulate import simulate

    with tempfile.TemporaryDirectory(prefix="clip-export-") as work:

        def open_tower(tower: Tower) -> backends.Engine:
            target = Path(work) / f"{tower}.onnx"
            simulate(bundle.graph_path(tower, precision), target)
            return backends.open_engine(GRAPHS, target)

        choice = Choice(backend=GRAPHS, device="cpu", precision=precision)
        with ExitStack() as opened:
            encoder = opened.enter_context(assemble(bundle, choice, open_tower, batch_size=choice.batch_size))
            if second and bundle.second is not None:
                encoder.second = opened.enter_context(simulated(bundle.second, precision))
            yield encoder


def simulation_lacks() -> MissingDependencyError | None:
    """The error that `simulated` raises here for want of a package, None where nothing is missing."""
    lacking = missing("onnx", "onnx_ir")
    if not lacking:
        return None
    message = f"simulating it on the CPU needs {' and '.join(lacking)}, not installed here"
    return MissingDependencyError(message, hint="pip install onnx onnx-ir, or run it on a GPU that a plan fits")
