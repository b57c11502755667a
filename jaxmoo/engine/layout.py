"""How one parameter lies on the devices, and how its per-objective gradients get there.

Inside ``shard_map`` every device holds one piece of every array. The functions here are all the
communication that gradients need: :func:`gather` makes the whole array from the pieces, and
:func:`scatter` takes per-objective gradients of the whole array, each device's own objectives and
examples, and leaves on each device all K objectives' gradients of its own piece. Together they
move what fully sharded data parallelism moves.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmoo.blocks.sections import Section, section_place, section_uniform
from jaxmoo.errors import ConfigError
from jaxmoo.mesh import DATA, FSDP, LANGUAGE, PIECES, sharded_axis
from jaxmoo.platforms import like_tpu, platform_of
from jaxmoo.slices import wired_axes

__all__ = [
    "Layout",
    "Topology",
    "gather",
    "reduce_pieces",
    "scatter",
    "scatter_vectors",
    "sections_of_piece",
    "sections_of_whole",
]


@dataclasses.dataclass(frozen=True)
class Topology:
    """Sizes of the mesh axes, the number of objectives, and what the devices are."""

    data: int
    language: int
    fsdp: int
    objectives: int  # K
    platform: str  # see jaxmoo.platforms
    wired_axes: int = 0  # see jaxmoo.slices

    @classmethod
    def of(cls, mesh: Mesh, objectives: int) -> Topology:
        """Read them from a mesh with the axes of :func:`jaxmoo.mesh.make_mesh`.

        Raises:
          ConfigError: the mesh has other axes, or devices of several kinds.
        """
        missing = {DATA, LANGUAGE, FSDP} - set(mesh.axis_names)
        if missing:
            raise ConfigError(
                f"mesh: expected axes data, language and fsdp, found {mesh.axis_names}. Make it "
                "with jaxmoo.mesh.make_mesh."
            )
        data, language, fsdp = (mesh.shape[axis] for axis in (DATA, LANGUAGE, FSDP))
        devices = list(mesh.devices.flat)
        return cls(data, language, fsdp, objectives, platform_of(devices), wired_axes(devices))

    @property
    def pieces(self) -> int:
        """Pieces an array is cut into."""
        return self.language * self.fsdp

    @property
    def tpu(self) -> bool:
        """Whether what is computed has the form that TPUs want."""
        return like_tpu(self.platform)

    @property
    def local_objectives(self) -> int:
        """Objectives per language group, places without an objective included."""
        return -(-self.objectives // self.language)

    def piece_index(self) -> jax.Array | int:
        """Which piece this device holds; inside ``shard_map`` only."""
        if self.pieces == 1:
            return 0
        return jax.lax.axis_index(PIECES)

    def total(self, x: jax.Array) -> jax.Array:
        """Sum over the devices that hold the other pieces."""
        return x if self.pieces == 1 else jax.lax.psum(x, PIECES)

    def own(self, x: jax.Array) -> jax.Array:
        """Take quantities [B, K] of all objectives to those of this device's [B, K / L]."""
        if self.language == 1:
            return x
        count = self.local_objectives
        x = jnp.pad(x, ((0, 0), (0, count * self.language - self.objectives)))
        first = jax.lax.axis_index(LANGUAGE) * count
        return jax.lax.dynamic_slice_in_dim(x, first, count, 1)

    def replica_mean(self, tree: Any) -> Any:
        """Average over replicas."""
        return tree if self.data == 1 else jax.lax.pmean(tree, DATA)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where one parameter array lies.

    Attributes:
      path: its dotted path.
      shape: shape of the array, or of one layer of an array that stacks layers.
      dtype: its dtype.
      gathered_dtype: dtype in which it is gathered and its gradients are sent.
      layers: number of layers stacked along a leading axis, or None.
      axis: axis of ``shape`` along which devices hold pieces; None when all hold everything.
      labels: block number of each section, int [layers or 1, parts]; None for a frozen array.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    gathered_dtype: Any
    layers: int | None
    axis: int | None
    labels: np.ndarray | None

    @classmethod
    def of(
        cls,
        path: str,
        array: Any,
        *,
        stacked: bool,
        pieces: int,
        labels: np.ndarray | None,
        dtype: Any,
    ) -> Layout:
        """Lay an array out on ``pieces`` devices.

        Args:
          path: its path.
          array: anything with ``shape`` and ``dtype``.
          stacked: whether its first axis stacks layers.
          pieces: number of pieces.
          labels: block number of each section, or None when it is frozen.
          dtype: dtype in which matrices are gathered, or None for their own. Vectors keep theirs:
            they are scales and biases, whose bytes do not matter. So do the codes of quantised
            matrices, which are integers, and the scales of their blocks.
        """
        shape = tuple(array.shape)
        layers, shape = (shape[0], shape[1:]) if stacked else (None, shape)
        exact = not jnp.issubdtype(array.dtype, jnp.floating)
        exact |= labels is None and path.endswith(".kernel.scales")
        own = dtype is None or len(shape) < 2 or exact
        return cls(
            path=path,
            shape=shape,
            dtype=array.dtype,
            gathered_dtype=array.dtype if own else jnp.dtype(dtype),
            layers=layers,
            axis=None if pieces == 1 else sharded_axis(path, shape, pieces),
            labels=None if labels is None else labels.reshape(layers or 1, -1),
        )

    @property
    def trained(self) -> bool:
        """Whether it is a trainable array."""
        return self.labels is not None

    @property
    def block_labels(self) -> np.ndarray:
        """The labels of a trainable array.

        Raises:
          ValueError: it is frozen.
        """
        if self.labels is None:
            raise ValueError(f"{self.path} is frozen: it lies in no block.")
        return self.labels

    @property
    def spec(self) -> P:
        """Sharding of the stored array."""
        lead = () if self.layers is None else (None,)
        return P(*lead, *(PIECES if a == self.axis else None for a in range(len(self.shape))))

    def piece_shape(self, pieces: int) -> tuple[int, ...]:
        """Shape of one device's piece of one layer."""
        return tuple(n // pieces if a == self.axis else n for a, n in enumerate(self.shape))

    def stack_shape(self, pieces: int) -> tuple[int, ...]:
        """Shape of one device's piece of the array, all layers of it."""
        lead = () if self.layers is None else (self.layers,)
        return (*lead, *self.piece_shape(pieces))

    @property
    def size(self) -> int:
        """Elements of one layer."""
        return math.prod(self.shape)


@jax.named_scope("gather_pieces")
def gather(piece: jax.Array, axis: int | None, topology: Topology) -> jax.Array:
    """Make the whole array from all devices' pieces."""
    if axis is None:
        return piece
    # Over all of a torus of three axes, the compiler adds up arrays that are zero but for a piece.
    for axes in reversed(PIECES) if topology.wired_axes == 3 else (PIECES,):
        piece = jax.lax.all_gather(piece, axes, axis=axis, tiled=True)
    return piece


@jax.named_scope("exchange")
def scatter(gradients: jax.Array, axis: int | None, topology: Topology) -> jax.Array:
    """Sum gradients over examples and hand each device all objectives' gradients of its piece.

    Args:
      gradients: [K / L, ...] of the whole array: this device's objectives, over its examples.
      axis: the array's axis along which devices hold pieces.
      topology: the mesh.

    Returns:
      [K, ...] of this device's piece, over the examples of its replica.
    """
    top, x = topology, gradients
    if axis is None:
        if top.fsdp > 1:
            x = jax.lax.psum(x, FSDP)
        if top.language > 1:
            x = jax.lax.all_gather(x, LANGUAGE, tiled=True)
        return x[: top.objectives]
    at = axis + 1
    lead, size, rest = x.shape[:at], x.shape[at], x.shape[at + 1 :]
    piece = size // top.pieces
    x = x.reshape(*lead, top.fsdp, top.language, piece, *rest)
    # Over examples first: what then goes to the other groups is F times smaller.
    if top.fsdp > 1:
        x = jax.lax.psum_scatter(x, FSDP, scatter_dimension=at)
    else:
        x = x.reshape(*lead, top.language, piece, *rest)
    if top.language > 1:
        x = jax.lax.all_to_all(x, LANGUAGE, split_axis=at, concat_axis=0, tiled=True)
    return x.reshape(-1, *lead[1:], piece, *rest)[: top.objectives]


@jax.named_scope("exchange")
def reduce_pieces(x: jax.Array, axis: int | None, topology: Topology) -> jax.Array:
    """Sum one gradient over all devices, of which each keeps its piece.

    Args:
      x: of the whole array: this device's part of the sum.
      axis: the array's axis along which devices hold pieces.
      topology: the mesh.

    Returns:
      This device's piece, summed over the replicas as well.
    """
    if axis is not None:
        x = jax.lax.psum_scatter(x, PIECES, scatter_dimension=axis, tiled=True)
    else:
        x = topology.total(x)
    return jax.lax.psum(x, DATA) if topology.data > 1 else x


def scatter_vectors(
    numbers: jax.Array, vectors: jax.Array, topology: Topology
) -> tuple[jax.Array, jax.Array]:
    """Hand each device its columns of all objectives' vectors, of all examples of its replica.

    Args:
      numbers: [K / L, N] one for each vector.
      vectors: [K / L, N, D]; D is divided by the number of pieces.
      topology: the mesh.

    Returns:
      ``(numbers [K, F N], vectors [K, F N, D / pieces])``.
    """
    top = topology
    cut = vectors.reshape(*vectors.shape[:2], top.pieces, -1)
    cut = jax.lax.all_to_all(jnp.moveaxis(cut, 2, 0), PIECES, 0, 0, tiled=True)

    def by_objective(x: jax.Array) -> jax.Array:  # [F L, K / L, N, ...]
        x = jnp.moveaxis(x.reshape(top.fsdp, top.language, *x.shape[1:]), 0, 2)
        return x.reshape(-1, top.fsdp * x.shape[3], *x.shape[4:])[: top.objectives]

    return by_objective(jax.lax.all_gather(numbers, PIECES)), by_objective(cut)


def sections_of_whole(
    gradients: jax.Array, leaf: int, labels: jax.Array, layer: jax.Array | int
) -> Section:
    """Cut one device's gradients of a whole array into sections of blocks.

    Args:
      gradients: [k, ...] of one layer, or of an array without layers.
      leaf: the array's number.
      labels: int [parts]: block of each equal part of its leading axis.
      layer: number of the layer in its stack.
    """
    parts = len(labels)
    shape = gradients.shape[1:] or (1,)
    values = gradients.reshape(len(gradients), parts, shape[0] // parts, *shape[1:])
    places = section_place(leaf, layer * parts + jnp.arange(parts))
    return Section(values, labels, places=places)


def sections_of_piece(
    gradients: jax.Array,
    layout: Layout,
    leaf: int,
    labels: jax.Array,
    layers: jax.Array | np.ndarray,
    topology: Topology,
) -> Section:
    """Cut one device's per-objective gradients of an array into sections of blocks.

    Args:
      gradients: [K, n, *piece] of n layers.
      layout: the array's layout.
      leaf: the array's number, from which its random numbers are made.
      labels: int [n, parts]: block of each equal part of each layer's leading axis.
      layers: int [n], numbers of the layers in their stack.
      topology: the mesh.

    Returns:
      A section with values [K, n x S, ...]; S is the number of sections in a piece.
    """
    k, n, parts = *gradients.shape[:2], labels.shape[1]
    counted: Any = 1.0
    if layout.axis is None and topology.pieces > 1:  # everyone holds it all: one device counts
        counted = jnp.float32(topology.piece_index() == 0)
    piece = gradients.shape[2:] or (1,)
    section_rows = (layout.shape[0] if layout.shape else 1) // parts
    # A piece may hold several sections, or part of one.
    height = math.gcd(piece[0], section_rows)
    start = topology.piece_index() * piece[0] if layout.axis == 0 else 0
    first_row = start + height * np.arange(piece[0] // height)
    section = first_row // section_rows

    def uniform(key: jax.Array, numbers: jax.Array) -> jax.Array:
        full = (section_rows, *piece[1:])
        if layout.axis not in (None, 0):
            full = (section_rows, *layout.shape[1:])

        def one(layer: jax.Array, section: jax.Array, row: jax.Array, number: jax.Array) -> Any:
            place = section_place(leaf, layer * parts + section)
            x = section_uniform(key, place, number, (math.prod(full),)).reshape(full)
            x = jax.lax.dynamic_slice_in_dim(x, row % section_rows, height, 0)
            if layout.axis not in (None, 0):
                width = piece[layout.axis]
                x = jax.lax.dynamic_slice_in_dim(
                    x, topology.piece_index() * width, width, layout.axis
                )
            return x

        over_sections = jax.vmap(one, in_axes=(None, 0, 0, 0))
        drawn = jax.vmap(over_sections, in_axes=(0, None, None, 0))(
            jnp.asarray(layers),
            jnp.asarray(section),
            jnp.asarray(first_row),
            numbers.reshape(n, -1),
        )
        return drawn.reshape(-1, *drawn.shape[2:])

    values = gradients.reshape(k, n * (piece[0] // height), height, *piece[1:])
    return Section(values, labels[:, section].reshape(-1), uniform, counted)
