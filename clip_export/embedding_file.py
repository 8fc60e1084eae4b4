"""Embeddings to disk as they are made, in constant memory: .npy with the rows' names beside it, or .parquet.

| suffix | holds |
|---|---|
| .npy | float32 [n, dim]; OUT.rows.jsonl beside it has one object a row: `index` and `input` |
| .parquet | columns `index` int64, `input` string, `embedding` fixed-size list of dim float32 |

`index` is the row's place among the inputs, from 0: it has gaps where inputs were left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from clip_export.errors import MissingDependencyError, OutputError
from clip_export.output_file import staged_file, writing

SUFFIXES = (".npy", ".parquet")
# Rows that are held until they make a row group: small ones would make a parquet file large and slow to read.
_ROW_GROUP = 4096

Floats = npt.NDArray[np.float32]
Row = tuple[int, str]  # index, input


class EmbeddingWriter(Protocol):
    """Takes rows in their order."""

    def write(self, rows: Sequence[Row], embeddings: Floats) -> None:
        """Add `rows` with their `embeddings`, float32 [len(rows), dim]."""
        ...


@contextmanager
def embedding_file(path: str | os.PathLike[str]) -> Iterator[EmbeddingWriter]:
    """A writer for `path`, which appears, complete, when the block ends without an error.

    Raises OutputError for a suffix that is neither .npy nor .parquet or a place that cannot be written, and
    MissingDependencyError where .parquet needs pyarrow.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise OutputError(
            f"{os.fsdecode(path)}: the suffix {suffix!r} means no format that is known",
            hint=f"name the output {' or '.join('OUT' + known for known in SUFFIXES)}",
        )
    with ExitStack() as stack:
        if suffix == ".npy":
            rows_file = stack.enter_context(staged_file(rows_path(path)))
            npy = _NpyWriter(path, stack.enter_context(staged_file(path)), rows_file)
            yield npy
            npy.finish()
        else:
            _require_pyarrow()
            parquet = _ParquetWriter(path, stack.enter_context(staged_file(path)))
            yield parquet
            parquet.finish()


def rows_path(path: str | os.PathLike[str]) -> Path:
    """Where the names of the rows of a .npy file lie: OUT.rows.jsonl."""
    return Path(path).with_suffix(".rows.jsonl")


class _NpyWriter:
    """numpy's format 1.0: a header that says how many rows follow, written once more when the number is known."""

    def __init__(self, path: str | os.PathLike[str], file: BinaryIO, rows_file: BinaryIO) -> None:
        self._path, self._file, self._rows_file = path, file, rows_file
        self._rows, self._dim, self._data_start = 0, 0, 0

    def write(self, rows: Sequence[Row], embeddings: Floats) -> None:
        with writing(self._path):
            if self._data_start == 0:
                self._dim = embeddings.shape[1]
                self._write_header()
                self._data_start = self._file.tell()
            self._file.write(np.ascontiguousarray(embeddings, dtype="<f4").data)
            for index, name in rows:
                line = json.dumps({"index": index, "input": name}, ensure_ascii=False)
                self._rows_file.write(line.encode("utf-8", "backslashreplace") + b"\n")
        self._rows += len(rows)

    def finish(self) -> None:
        # The rows first, to the disk: once the array has taken its place nothing but a rename may be left to fail.
        with writing(rows_path(self._path)):
            self._rows_file.flush()
            os.fsync(self._rows_file.fileno())
        with writing(self._path):
            self._file.seek(0)
            self._write_header()
            assert self._file.tell() == self._data_start  # numpy leaves room for the number of rows to grow

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._rows, self._dim)}
        np.lib.format.write_array_header_1_0(self._file, header)


class _ParquetWriter:
    def __init__(self, path: str | os.PathLike[str], file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._writer: Any = None
        self._rows: list[Row] = []
        self._embeddings: list[Floats] = []

    def write(self, rows: Sequence[Row], embeddings: Floats) -> None:
        self._rows += rows
        self._embeddings.append(embeddings)
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def finish(self) -> None:
        if self._rows:
            self._flush()
        with writing(self._path):
            self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        values = np.concatenate(self._embeddings)
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        indices, inputs = zip(*self._rows, strict=True)
        names = [name.encode("utf-8", "backslashreplace").decode() for name in inputs]
        columns = {
            "index": pa.array(indices, pa.int64()),
            "input": pa.array(names, pa.string()),
            "embedding": embedding,
        }
        table = pa.table(columns)
        with writing(self._path):
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._file, table.schema)
            self._writer.write_table(table)
        self._rows, self._embeddings = [], []


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "a .parquet output needs pyarrow, which cannot be imported",
            hint="pip install 'clip-export[parquet]', or name the output OUT.npy",
        ) from error
