"""The leaves of a pytree (an optimizer state) as named arrays: where each is stored, its kind, and restoring it."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from dflash.config import fault_list
from dflash.weights.runs.arrays import STORED_DTYPES
from dflash.weights.snapshot import WeightsError


def _leaf_path(keys: tuple[Any, ...]) -> str:
    """Where a leaf is stored: its keys as folder names, with characters that those can't hold as %XX."""
    names = [quote(jax.tree_util.keystr((key,), simple=True), safe="") or "%" for key in keys]
    # quote leaves dots alone, and two of them mean the parent folder.
    return "/".join(["tx", *(n.replace(".", "%2E") if not n.strip(".") else n for n in names or ["value"])])


def leaves_of(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by where they are stored. Raises WeightsError if two would share a place."""
    pairs = [(_leaf_path(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
    leaves = dict(pairs)
    if len(leaves) < len(pairs):
        twice = sorted({path for path, _ in pairs if sum(path == p for p, _ in pairs) > 1})
        raise WeightsError(f"leaves of an optimizer state need unique names; {twice} name several: rename them")
    return leaves


def leaf_kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a leaf: an array of numpy or jax, a shape of one, or a Python number."""
    typed = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else np.asarray(leaf)
    return tuple(typed.shape), str(typed.dtype)


def check_leaves(leaves: Mapping[str, Any]) -> None:
    """Raises WeightsError with every leaf whose dtype can't be stored."""
    kinds = {path: leaf_kind(leaf)[1] for path, leaf in leaves.items()}
    faults = [f"{path} is {kind}" for path, kind in kinds.items() if kind not in STORED_DTYPES]
    if faults:
        raise WeightsError(
            f"leaves of an optimizer state must be one of {list(STORED_DTYPES)}: " + fault_list(faults) + ". Store a "
            "random key as its jax.random.key_data"
        )


def restore(like: Any, value: np.ndarray) -> Any:
    """`value` as what `like` is: a Python number, numpy's array or scalar, else jax's array."""
    if isinstance(like, np.ndarray | np.generic):
        return value if isinstance(like, np.ndarray) else value[()]
    return value.item() if isinstance(like, bool | int | float) else jnp.asarray(value)
