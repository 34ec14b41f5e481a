"""Images inside of tables: saved datasets and parquet files, read row by row."""

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Table = Any  # of libraries whose tables and values are not annotated


@cache
def saved_dataset(folder: Path) -> Table:
    """A dataset as the library's save_to_disk left it; its images are not decoded. Raises ValueError if it cannot be read."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{folder} is a saved dataset: it takes the datasets library, pip install 'advdmd[datasets]'"
        ) from None
    try:
        found: Table = datasets.load_from_disk(str(folder))
        for k, v in found.features.items():
            if isinstance(v, datasets.Image):
                found = found.cast_column(k, datasets.Image(decode=False))
    except Exception as e:  # whatever a damaged folder makes the library raise
        raise ValueError(f"{folder} cannot be read as a dataset: {e}") from None
    return found


def parquet_file(path: Path) -> Table:
    """An opened parquet file. Raises ValueError if it cannot be read."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path} takes the datasets library, pip install 'advdmd[datasets]'") from None
    try:
        return pq.ParquetFile(path)
    except Exception as e:  # whatever a damaged file makes the library raise
        raise ValueError(f"{path} cannot be read as a parquet file: {e}") from None


class ParquetRows:
    """Rows of one column, read a group at a time, of which the last is kept."""

    def __init__(self, path: Path, column: str):
        self.file, self.column = parquet_file(path), column
        self.starts = np.cumsum([0, *(self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups))])
        self.group, self.values = -1, list[Table]()

    def __getitem__(self, row: int) -> dict[str, Table]:
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        if group != self.group:
            self.values = self.file.read_row_group(group, [self.column]).column(self.column).to_pylist()
            self.group = group
        return {self.column: self.values[row - int(self.starts[group])]}


@lru_cache(maxsize=4)
def parquet_rows(path: Path, column: str) -> ParquetRows:
    """The rows of a column of a parquet file; of the last few files they stay open."""
    return ParquetRows(path, column)


def embedded_bytes(value: Table) -> bytes:
    """The bytes of an image in a table: themselves, or under "bytes"."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError("the dataset holds a path instead of the image: save it with its images embedded")
    return data
