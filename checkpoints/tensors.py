"""TensorInfo: where one tensor of a checkpoint lies and how it is read. Made by the format readers, read by the loader.

Never holds an open file or any of the tensor's bytes: each read maps the file anew.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, under its Hugging Face name.

    Attributes:
        name: as the Hugging Face model names it (in an Orbax checkpoint: the parameter's path).
        shape: in Hugging Face order, so (out, in) for a linear layer.
        dtype: name of the stored type: a numpy or ml_dtypes name, or a GGUF type such as `Q4_1`.
        file: the file, or Orbax folder, that holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    reader: Callable[[np.dtype | None], np.ndarray] = field(repr=False, compare=False)

    def read(self, dtype: Any = None) -> np.ndarray:
        """The values: memory-mapped and read-only where the file holds them as they are, else a new array.

        Args:
            dtype: what they are cast to, without another copy of them on the way; None: as stored, or float32 where
                they are stored in blocks.

        Raises:
            CheckpointError: the file is gone, or has been cut since it was opened.
        """
        try:
            return self.reader(None if dtype is None else np.dtype(dtype))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file}: tensor {self.name}: cannot be read: {error}") from error


def map_bytes(path: Path, offset: int, length: int) -> np.ndarray:
    """`length` bytes of a file from `offset`, memory-mapped, uint8, read-only.

    Raises:
        OSError, ValueError: there is no such file, or it is shorter than that.
    """
    if length == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r", offset=offset, shape=(length,))
