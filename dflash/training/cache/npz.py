"""Window caches from before they were directories: an .npz with the same arrays by name, and `meta`, a JSON string.

Parts that are stored as they are (np.savez) get memory-mapped, unchecked by their CRC; compressed parts are read into
memory whole. Nothing is unpickled.
"""

import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np

from dflash.host.disk import DAMAGE, parse_object


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _read_part(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array of the archive, whose header must match the data."""
    with archive.open(info) as part:
        shape, fortran, dtype = _header(part)
        begin = part.tell()
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if begin + int(np.prod(shape, dtype=object)) * dtype.itemsize != info.file_size:
            raise ValueError(f"{dtype} {list(shape)} is not what its {info.file_size} bytes hold")
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as part:
            return np.lib.format.read_array(part, allow_pickle=False)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name, extra = struct.unpack("<26x2H", file.read(30))
    offset = info.header_offset + 30 + name + extra + begin
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def read_npz(path: Path, names: Collection[str]) -> tuple[Any, dict[str, np.ndarray], list[str]]:
    """The JSON of `meta`, the arrays among `names` that exist, and every fault.

    bfloat16 may be stored under a name without `_u16`, as values that numpy saved as raw pairs of bytes.
    """
    raw: Any = {}
    arrays: dict[str, np.ndarray] = {}
    faults: list[str] = []
    wanted = {**{n.removesuffix("_u16"): n for n in names}, **{n: n for n in names}, "meta": "meta"}
    try:
        with zipfile.ZipFile(path) as archive:
            parts = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            for name in [n for n in wanted if n in parts]:
                try:
                    arrays[wanted[name]] = _read_part(path, archive, parts[name])
                except DAMAGE as error:
                    faults.append(f"{name} can't be read ({error})")
    except DAMAGE as error:
        return raw, arrays, [f"it is no readable .npz ({error})"]
    for name, array in arrays.items():
        if name.endswith("_u16") and array.dtype == np.dtype("V2"):
            arrays[name] = array.view(np.uint16)
    try:
        raw = parse_object(str(arrays.pop("meta")), "meta", ValueError, "build the cache again")
    except KeyError:
        faults.append("meta is missing")
    except ValueError as error:
        faults.append(str(error))
    return raw, arrays, faults
