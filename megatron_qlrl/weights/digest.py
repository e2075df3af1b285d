"""A digest that tells the weights of one model from another's without reading all of them."""

import hashlib
import json
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_qlrl.config.folder import weight_files
from megatron_qlrl.errors import CheckpointError

BLOCK_BYTES = 4096


def weights_digest(folder: Path) -> str:
    """Returns a digest of a Hugging Face folder's tensors: names, types, shapes, and a block out of
    the middle of each. It does not depend on how they are spread over files.

    A 60 GB model read whole would delay every start by minutes. Another model differs in every
    block and a trained one in nearly all; single numbers changed by hand may go unnoticed.

    Raises:
        CheckpointError: a file cannot be read.
    """
    blocks: dict[str, bytes] = {}
    try:
        for file, names in weight_files(folder).items():
            blocks |= _blocks(file, names or None)
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise CheckpointError(
            f"the weights of {folder} cannot be read: {error}; download the model again"
        ) from error
    return hashlib.sha256(b"".join(blocks[name] for name in sorted(blocks))).hexdigest()


def _blocks(file: Path, names: Collection[str] | None) -> dict[str, bytes]:
    """Returns description and middle of the named (None: all) tensors. A file is 8 bytes of header
    size, a JSON header, then the tensors."""
    blocks: dict[str, bytes] = {}
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name in sorted(header if names is None else names):
            start, end = header[name]["data_offsets"]
            middle = max(start, (start + end - BLOCK_BYTES) // 2)
            stream.seek(8 + size + middle)
            block = stream.read(min(BLOCK_BYTES, end - middle))
            described = [name, header[name]["dtype"], header[name]["shape"]]
            blocks[name] = json.dumps(described).encode() + block
    return blocks
