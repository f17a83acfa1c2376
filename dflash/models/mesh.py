"""Where everything lies on a mesh of devices: one table from logical axes to the mesh's, and what follows from it.

A mesh has two axes: `dp` splits the rows of a batch, `tp` splits the networks. A weight's logical axes are named where
its shape is declared (`Linear(..., rows=..., columns=...)`, `Param(..., axes=...)`); what is not declared lies whole
on every device. Programs run under `shard_map`: a layer sees this device's part of its weights,
and what it must exchange with other devices is written where it is exchanged (`total`, `side_by_side`). So a program's
collectives are those that stand in the source, and no others.

A weight of two halves (gate and up; queries, keys and values) is split half by half, so its rows are put into another
order when it is placed; key heads that are fewer than the devices are repeated. `Place` is that order.

In a TPU's memory a weight lies in the order in which its products read it (`order_of`). Left to itself the compiler
lays each argument out with the least padding, and turns it before a loop that wants it otherwise.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental.layout import Format, Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dflash.config import ConfigError, DraftConfig, TargetConfig
from dflash.metrics import round_up

DP, TP = "dp", "tp"

# A TPU's memory is read in rows of so many numbers: shorter ones are padded.
LANES = 128

# Logical axis -> mesh axis. A batch's rows; query heads; key heads (repeated where they are fewer than the devices);
# the inner width of an MLP or of every expert; the vocabulary (its last token repeated where it does not divide); the
# context features side by side, as a draft's `fc` reads them.
RULES = {"rows": DP, "heads": TP, "kv_heads": TP, "inner": TP, "vocab": TP, "features": TP}


class Network(Protocol):
    """What targets and drafts have in common: a network that can lie on a mesh."""

    mesh: Mesh | None

    @property
    def config(self) -> TargetConfig | DraftConfig: ...

    @property
    def dtype(self) -> jnp.dtype: ...


AnyNetwork = TypeVar("AnyNetwork", bound=Network)


class Part(NamedTuple):
    """`units` of a logical axis lie along an array's axis, `width` entries for each of them."""

    axis: str
    units: int
    width: int = 1


# For each axis of an array what lies along it, None for what is never split.
Axes = tuple[tuple[Part, ...] | None, ...]


def make_mesh(devices: Sequence[Any], *, dp: int = 1, tp: int = 1) -> Mesh:
    """A dp x tp mesh of the first devices, which may be those of a described topology. Raises ConfigError."""
    if dp < 1 or tp < 1 or dp * tp > len(devices):
        raise ConfigError(
            f"a mesh needs dp x tp devices, at least 1 x 1; got {dp} x {tp} with {len(devices)} devices: lower dp or tp"
        )
    return Mesh(np.array(devices[: dp * tp]).reshape(dp, tp), (DP, TP))


def open_mesh(device: jax.Device, *, dp: int = 1, tp: int = 1) -> Mesh | None:
    """A dp x tp mesh of devices like this one, or None for one CPU, whose programs run whole. Raises ConfigError."""
    mesh = make_mesh(jax.devices(device.platform), dp=dp, tp=tp)
    return None if mesh.size == 1 and device.platform == "cpu" else mesh


def ways(mesh: Mesh | None, axis: str) -> int:
    """How many devices lie along an axis of the mesh; 1 without a mesh."""
    return 1 if mesh is None else int(mesh.shape[axis])


def check_rows(mesh: Mesh | None, rows: int) -> None:
    """Raises ConfigError for a batch whose rows dp can't split evenly."""
    if rows % (dp := ways(mesh, DP)):
        raise ConfigError(f"a batch must be divisible by the mesh's dp, {dp}; got {rows} rows: take a multiple")


def platform_of(mesh: Mesh) -> str:
    """What the mesh's devices are: cpu, gpu or tpu."""
    return str(mesh.devices.flat[0].platform)


def check_mesh(config: TargetConfig | DraftConfig, mesh: Mesh | None) -> None:
    """Raises ConfigError with every reason why a network of this config can't lie on this mesh."""
    if mesh is None:
        return
    if sorted(mesh.axis_names) != [DP, TP]:
        raise ConfigError(f"a mesh has the axes {DP} and {TP}, this one has {list(mesh.axis_names)}: see make_mesh")
    tp, faults = mesh.shape[TP], []
    if config.num_heads % tp:
        faults.append(f"tp must divide the {config.num_heads} query heads")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        faults.append(f"tp must divide the {config.num_kv_heads} key heads, or be a multiple of them")
    if config.intermediate_size % tp:
        faults.append(f"tp must divide the inner width {config.intermediate_size}")
    if isinstance(config, DraftConfig) and config.num_features * config.hidden_size % tp:
        faults.append(f"tp must divide the {config.num_features} x {config.hidden_size} context features")
    if faults:
        raise ConfigError(f"the network can't lie on a mesh with tp {tp}: " + "; ".join(faults))


# ---- how one array is placed


def _units(part: Part, shards: int) -> np.ndarray:
    """Which of a logical axis each device holds, int [shards, each]."""
    if part.axis == "vocab":
        each = -(-part.units // shards)
        return np.minimum(np.arange(shards * each), part.units - 1).reshape(shards, each)
    if part.axis == "kv_heads" and shards > part.units:
        return (np.arange(shards) * part.units // shards)[:, None]
    assert part.units % shards == 0, (part, shards)  # `check_mesh` refuses it in words
    return np.arange(part.units).reshape(shards, -1)


@functools.lru_cache(maxsize=256)
def _order(parts: tuple[Part, ...], shards: int) -> np.ndarray:
    """The entries of an array's axis in the order in which they are placed, int [shards, entries of one device]."""
    order, first = [], 0
    for part in parts:
        units = _units(part, shards)[:, :, None] * part.width + np.arange(part.width)
        order.append(first + units.reshape(shards, -1))
        first += part.units * part.width
    return np.concatenate(order, axis=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """How an array of `axes` lies on a mesh: its shape there, and which entries of the array a device holds."""

    shape: tuple[int, ...]
    sharding: NamedSharding | Format
    orders: tuple[np.ndarray | None, ...]

    @classmethod
    def of(cls, shape: Sequence[int], axes: Axes | None, mesh: Mesh, *, batched: bool = False) -> "Place":
        """`batched` as in `order_of`."""
        axes = (None,) * len(shape) if axes is None else axes
        assert len(axes) == len(shape), (axes, shape)
        shards = ways(mesh, TP)
        orders = tuple(None if parts is None or shards == 1 else _order(parts, shards) for parts in axes)
        placed = tuple(n if order is None else order.size for n, order in zip(shape, orders, strict=True))
        here = [size if order is None else size // shards for size, order in zip(placed, orders, strict=True)]
        return cls(placed, in_order(mesh, spec(axes), order_of(here, batched)), orders)

    def entries(self, index: tuple[slice, ...]) -> tuple[slice | np.ndarray, ...]:
        """Of each axis of the array what a device with this `index` of the placed shape holds: a slice where it can."""
        slices: list[slice | np.ndarray] = []
        for order, part in zip(self.orders, index, strict=True):
            if order is None:
                slices.append(part)
                continue
            chosen = order.reshape(-1)[part]
            first, run = int(chosen[0]), np.arange(len(chosen))
            slices.append(slice(first, first + len(chosen)) if np.array_equal(chosen, first + run) else chosen)
        return tuple(slices)

    def put(self, value: Any) -> Array:
        """The array [as declared] on the mesh; each device is given its part."""
        if all(order is None for order in self.orders):
            return jax.device_put(value, self.sharding)
        value = np.asarray(value)

        def part(entries: tuple[slice | np.ndarray, ...]) -> np.ndarray:
            piece = value
            for axis, some in enumerate(entries):
                piece = piece[(slice(None),) * axis + (some,)]
            return piece

        return self.build(part)

    def build(self, part: Callable[[tuple[slice | np.ndarray, ...]], np.ndarray]) -> Array:
        """The array on the mesh, made by a function of the `entries` that a device holds.

        Devices that hold the same entries share what is made for the first of them.
        """
        made: dict[str, np.ndarray] = {}

        def of(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            key = str(index)
            if key not in made:
                made[key] = part(self.entries(index))
            return made[key]

        return jax.make_array_from_callback(self.shape, self.sharding, of)

    def take_back(self, value: Any) -> np.ndarray:
        """The array as declared, of what lies on the mesh."""
        whole = np.asarray(value)
        for axis, order in enumerate(self.orders):
            if order is not None:
                places = np.empty(order.max() + 1, int)
                places[order.reshape(-1)] = np.arange(order.size)
                whole = whole.take(places, axis)
        return whole


def in_order(mesh: Mesh, split: P, order: tuple[int, ...]) -> NamedSharding | Format:
    """How an array with this split lies on a mesh, its axes in this order in a TPU's memory."""
    sharding = NamedSharding(mesh, split)
    # On a mesh of no devices there are shapes, and no layouts.
    return Format(Layout(order), sharding) if isinstance(mesh, Mesh) and platform_of(mesh) == "tpu" else sharding


def order_of(shape: Sequence[int], batched: bool = False) -> tuple[int, ...]:
    """The axes of a device's part of a weight as they lie in a TPU's memory: the last in one piece.

    As they are declared; of matrices that are multiplied all at once (`batched`) the last axis is the one that takes
    less padding, as the compiler wants it for that product.
    """
    declared = tuple(range(len(shape)))
    if batched and _tiled(shape[-1], shape[-2]) < _tiled(shape[-2], shape[-1]):
        return (*declared[:-2], declared[-1], declared[-2])
    return declared


def _tiled(rows: int, columns: int) -> int:
    """Entries that a matrix takes in a TPU's memory, in tiles of 8 by 128."""
    return round_up(rows, 8) * round_up(columns, LANES)


def as_it_lies(x: Array) -> Array:
    """A part of a `batched` weight, with all its axes, in the order in which a TPU holds it: nothing is turned."""
    layout = Layout(order_of(x.shape, batched=True))
    return jax.lax.platform_dependent(x, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x)


def split_by(*axes: str | None) -> P:
    """How an array with these logical axes is split over a mesh."""
    return P(*(None if axis is None else RULES[axis] for axis in axes))


def spec(axes: Axes | None) -> P:
    """How an array that declares these axes is split over a mesh."""
    return split_by(*(None if parts is None else parts[0].axis for parts in axes or ()))


# How arrays that are no weights are split: not at all, by the rows of a batch, and columns [H, B*T] by them.
WHOLE, ROWS, COLUMNS = split_by(), split_by("rows"), split_by(None, "rows")


# ---- networks, caches and batches


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def place_of(weight: nnx.Variable[Any], mesh: Mesh) -> Place:
    """Where a weight of a network lies; it has the shape that the network declares."""
    declared = weight.get_metadata()
    return Place.of(weight.get_value().shape, declared.get("axes"), mesh, batched=declared.get("batched", False))


def place(model: AnyNetwork, mesh: Mesh | None) -> AnyNetwork:
    """The network with its weights on the mesh, each device holding its part; itself without a mesh.

    Weights of an abstract network (`nnx.eval_shape`) stay abstract and get their shapes and shardings there. A network
    that lies on this mesh is returned as it is. Raises ConfigError for a mesh that can't be.
    """
    if model.mesh == mesh:
        return model
    if model.mesh is not None:
        raise ConfigError("a network that lies on one mesh can't be moved to another: load it there")
    assert mesh is not None
    check_mesh(model.config, mesh)

    def put(weight: Any) -> Any:
        value, place = weight.get_value(), place_of(weight, mesh)
        if isinstance(value, jax.ShapeDtypeStruct):
            return weight.replace(jax.ShapeDtypeStruct(place.shape, value.dtype, sharding=place.sharding))
        return weight.replace(place.put(value))

    graph, weights = nnx.split(model)
    placed = nnx.merge(graph, jax.tree.map(put, weights, is_leaf=_is_weight))
    placed.mesh = mesh
    return placed


def gather(model: AnyNetwork) -> AnyNetwork:
    """The network as it is declared, on one device, to be written or handed on; itself without a mesh."""
    if model.mesh is None:
        return model
    mesh = model.mesh

    def whole(weight: Any) -> Any:
        axes = weight.get_metadata().get("axes") or (None,) * weight.ndim
        declared = [parts and sum(part.units * part.width for part in parts) for parts in axes]
        sizes = [size or here for size, here in zip(declared, weight.shape, strict=True)]
        return weight.replace(jnp.asarray(Place.of(sizes, axes, mesh).take_back(weight.get_value())))

    graph, weights = nnx.split(model)
    gathered = nnx.merge(graph, jax.tree.map(whole, weights, is_leaf=_is_weight))
    gathered.mesh = None
    return gathered


def sharding_of(network: Network, split: P) -> jax.sharding.Sharding | None:
    """Where an array with this split lies beside a network's weights; None where jax may choose."""
    if network.mesh is not None:
        return NamedSharding(network.mesh, split)
    weight = jax.tree.leaves(nnx.state(network))[0]
    devices = list(weight.sharding.device_set) if getattr(weight, "sharding", None) is not None else []
    return jax.sharding.SingleDeviceSharding(devices[0]) if len(devices) == 1 else None


# KiB of a chip's own memory (128 MiB on both) that one instruction may take; libtpu's default is an eighth of it. With
# half a product reads further ahead, and what is left is too small for the keys of a large batch, which the compiler
# would otherwise bring there, change, and write back whole at each step.
_SCOPED_VMEM_KIB = {"TPU v5 lite": 65536, "TPU v6 lite": 65536}


def compiler_options(network: Network) -> dict[str, str] | None:
    """What the compiler is told for the devices of a network: `compiler_options` of `jax.jit`; None: its defaults."""
    sharding = sharding_of(network, P())
    if sharding is None:
        return None
    device: Any = next(iter(sharding.device_set))
    limit = _SCOPED_VMEM_KIB.get(device.device_kind)
    return None if limit is None else {"xla_tpu_scoped_vmem_limit_kib": str(limit)}


def abstract(tree: Any, where: Any) -> Any:
    """Shapes and dtypes of a pytree of arrays placed like this (a prefix of shardings or formats; None: anywhere)."""
    if where is None:
        return tree
    return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree, where)


def of(graph: Any, weights: Any) -> Mesh | None:
    """The mesh of a network that `nnx.split` took apart."""
    return nnx.merge(graph, weights).mesh


def weight_specs(weights: Any) -> Any:
    """How the weights of a network (`nnx.state`) are split, as `shard_map` takes it."""
    return jax.tree.map(lambda w: spec(w.get_metadata().get("axes")), weights, is_leaf=_is_weight)


def spread(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: tuple[Any, ...], out_specs: Any
) -> Callable[..., Any]:
    """The function on every device of the mesh with its parts of the arguments; itself without a mesh."""
    if mesh is None:
        return function
    # Every exchange is written out in the layers, so there is nothing for the check to find.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on_every_device(function: Callable[..., Any], mesh: Mesh | None, out_specs: Any = WHOLE) -> Callable[..., Any]:
    """function(weights, *arrays): weights of one network, or of several, in parts, and all else whole on every device.

    What comes back is whole on every device too, unless `out_specs` say otherwise. Without a mesh, the function itself.
    """

    def run(weights: Any, *arrays: Any) -> Any:
        in_specs = (weight_specs(weights), *(WHOLE for _ in arrays))
        return spread(function, mesh, in_specs, out_specs)(weights, *arrays)

    return function if mesh is None else run


# ---- what a layer exchanges with the other devices of its row of the mesh


def is_split() -> bool:
    """Whether the program that is traced now runs in parts, on several devices."""
    return jax.sharding.get_abstract_mesh().size > 1


def total(x: Array) -> Array:
    """The sum of all devices' parts of a sum, on each of them."""
    return jax.lax.psum(x, TP)


def own_part(x: Array, size: int) -> Array:
    """This device's `size` entries of the first axis of x, which lies whole on every device."""
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TP) * size, size)


def first_row(rows: int) -> Array:
    """The number of this device's first row of an array of which every device holds `rows`; int32 []."""
    return jax.lax.axis_index(TP) * rows


def own_rows(table: Array, ids: Array) -> Array:
    """Rows `ids` int32 [N] of a table of which this device holds some: [N, H], zeros for those that it does not."""
    rows = table.shape[0]
    local = ids - first_row(rows)
    here = (local >= 0) & (local < rows)
    return jnp.where(here[:, None], table[jnp.clip(local, 0, rows - 1)], 0)


def shared_out(rows: Array, count: int) -> Array:
    """The sum of all devices' parts [count, H], shared out by rows: [count/tp, H], the last rows zero if need be."""
    missing = -count % jax.lax.axis_size(TP)
    return jax.lax.psum_scatter(jnp.pad(rows, ((0, missing), (0, 0))), TP, tiled=True)


def side_by_side(x: Array) -> Array:
    """Every device's x, stacked along a new first axis, in the order of the rows that they hold."""
    return jax.lax.all_gather(x, TP)


def rows_end_to_end(x: Array) -> Array:
    """Every device's rows of an array, one after the other: the whole array on each of them."""
    return jax.lax.all_gather(x, TP, tiled=True)


def everywhere(condition: Array) -> Array:
    """Whether a condition holds on all devices, whatever their rows of the batch; bool []."""
    if not is_split() or jax.lax.axis_size(DP) == 1:
        return condition
    return jax.lax.pmin(condition.astype(jnp.int32), DP).astype(bool)
