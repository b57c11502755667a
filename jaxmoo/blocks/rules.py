"""The kinds of blocks."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from jaxmoo.blocks.piece import Blocks, Piece, Rule, natural_key
from jaxmoo.errors import ConfigError, did_you_mean
from jaxmoo.registry import imported, is_path
from jaxmoo.sizes import parse_size

# A path component that numbers a layer: "3", or Flax Linen's "Dense_3".
_NUMBERED = re.compile(r"(?:.*_)?\d+")


def _layer_depth(parts: Sequence[str]) -> int:
    """Number of leading components that name the layer; 1 when there is no numbered component."""
    return next((i + 1 for i, part in enumerate(parts) if _NUMBERED.fullmatch(part)), 1)


def _layer_of(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[: _layer_depth(parts)])


def _module_of(path: str) -> str:
    parts = path.split(".")
    depth = min(_layer_depth(parts) + 1, max(len(parts) - 1, 1))
    return ".".join(parts[: max(depth, _layer_depth(parts))])


def _experts_of(path: str) -> tuple[str, bool]:
    """The beginning of a path up to the experts, and whether they are stacked.

    Where they are not, it goes up to the expert's number. It is empty where the path is no
    expert's.
    """
    parts = path.split(".")
    if "experts" not in parts[:-1]:
        return "", False
    depth = parts.index("experts") + 1
    stacked = not parts[depth].isdigit()
    return ".".join(parts[: depth + (not stacked)]), stacked


def by(fn: Callable[[str], Hashable], spec: str = "by") -> Blocks:
    """Blocks named by a function of the dotted parameter path.

    Args:
      fn: maps a path such as ``"layers.3.mlp.up_proj.kernel"`` to a block name.
      spec: name of the rule in reports.

    Example:
      >>> import numpy as np
      >>> from jaxmoo.blocks import partition
      >>> params = {"a": np.zeros(3), "b": np.zeros(2), "head": np.zeros(1)}
      >>> partition(by(lambda path: "head" if path == "head" else "trunk"), params).names
      ('head', 'trunk')
    """
    return Blocks(spec, lambda pieces: [fn(piece.path) for piece in pieces])


def whole() -> Blocks:
    """One block that holds every parameter."""
    return by(lambda path: "whole", "whole")


def layer() -> Blocks:
    """One block per numbered layer; other parameters by the first component of their path."""
    return by(_layer_of, "layer")


def module() -> Blocks:
    """One block per sub-module of a layer, e.g. ``layers.3.self_attn``."""
    return by(_module_of, "module")


def expert() -> Blocks:
    """One block per expert of a layer's mixture; the rest of the layer is one, as in `layer`.

    Below a component ``experts`` of its path an array stacks the experts along its first axis; or
    the next component is an expert's number. An objective whose gradient of an expert is exactly
    zero, such as a language that sends it no token, is absent from that block.

    Raises:
      ConfigError: on use, there are no experts, or arrays of the same mixture stack different
        numbers of them.

    Example:
      >>> import numpy as np
      >>> from jaxmoo.blocks import partition
      >>> mlp = {"gate": np.zeros((4, 2)), "experts": {"up": np.zeros((2, 4, 8))}}
      >>> partition("expert", {"layers": [{"mlp": mlp}]}).names
      ('layers.0', 'layers.0.mlp.experts.0', 'layers.0.mlp.experts.1')
    """

    def label(pieces: Sequence[Piece]) -> Sequence[Hashable]:
        if not any(_experts_of(piece.path)[0] for piece in pieces):
            raise ConfigError(
                "expert blocks: expected parameters below a component 'experts' of their path, "
                f"found none among {', '.join(piece.path for piece in pieces[:3])}, ... What is "
                "trained has no experts; use layer blocks."
            )
        labels, first = [], {}
        for piece in pieces:
            above, stacked = _experts_of(piece.path)
            labels.append(f"{above}.{piece.part}" if stacked else above or _layer_of(piece.path))
            other = first.setdefault(above, piece)
            if stacked and piece.parts != other.parts:
                raise ConfigError(
                    f"expert blocks: {other.path} has {other.parts} experts along its first axis, "
                    f"but {piece.path} has {piece.parts}. Stack as many in all arrays below "
                    f"{above!r}."
                )
        return labels

    def parts(path: str, shape: tuple[int, ...], itemsize: int) -> int:
        del itemsize
        if not _experts_of(path)[1]:
            return 1
        if not shape:
            raise ConfigError(
                f"expert blocks: expected {path} to stack experts along its first axis, found a "
                "scalar. Give it one value for each expert, or keep it elsewhere."
            )
        return shape[0]

    return Blocks("expert", label, parts, lambda piece: bool(_experts_of(piece.path)[0]))


def leaf() -> Blocks:
    """One block per parameter array of each layer."""
    return by(lambda path: path, "leaf")


def of_bytes(limit: int | str) -> Blocks:
    """Consecutive pieces, in backward order, up to a size: the buckets of DDP and ZeRO.

    Backward order is the reverse of the paths' natural order (numbers compared as numbers), so
    the last layer comes first. A bucket holds whole layers, as many as fit, or part of one: a layer
    that no longer fits opens a new bucket, and so does a change between layers and the rest, which
    a model computes apart. An array larger than the limit is cut along its leading
    axis into equal parts.

    Args:
      limit: bytes per block, or a text such as ``"25MiB"`` (also KB, MB, GB, KiB, GiB).

    Example:
      >>> import numpy as np
      >>> from jaxmoo.blocks import partition
      >>> params = {"layers": [{"w": np.zeros(4, np.float32)} for _ in range(4)]}
      >>> partition(of_bytes(32), params).pieces
      (2, 2)
    """
    size = parse_size(limit, what=f"blocks=bytes:{limit}")

    def label(pieces: Sequence[Piece]) -> Sequence[Hashable]:
        order = sorted(range(len(pieces)), key=lambda i: (natural_key(pieces[i].path), i))
        backward = order[::-1]
        labels: list[Hashable] = [0] * len(pieces)
        block, filled, in_layers = 0, 0, False
        for _, run in itertools.groupby(backward, key=lambda i: _layer_of(pieces[i].path)):
            layer = list(run)
            numbered = any(map(_NUMBERED.fullmatch, pieces[layer[0]].path.split(".")))
            full = filled + sum(pieces[i].nbytes for i in layer) > size
            if filled and (full or numbered != in_layers):
                block, filled = block + 1, 0
            in_layers = numbered
            for i in layer:
                if filled and filled + pieces[i].nbytes > size:
                    block, filled = block + 1, 0
                labels[i] = f"bucket {block}"
                filled += pieces[i].nbytes
        return labels

    def parts(path: str, shape: tuple[int, ...], itemsize: int) -> int:
        del path
        needed = math.ceil(math.prod(shape) * itemsize / size)
        if needed <= 1 or not shape:
            return 1
        rows = shape[0]
        return next((d for d in range(min(needed, rows), rows) if rows % d == 0), rows)

    return Blocks(f"bytes:{limit}", label, parts)


def slices(count: int) -> Blocks:
    """Every array cut into equal slices along its leading axis, each a block.

    For the vocabulary's tables, which otherwise would be the largest blocks by far.

    Args:
      count: slices per array; must divide the leading axis.

    Example:
      >>> import numpy as np
      >>> from jaxmoo.blocks import partition
      >>> partition(slices(2), {"embedding": np.zeros((6, 4))}).names
      ('embedding 0', 'embedding 1')
    """
    if count < 1:
        raise ConfigError(f"slices blocks: expected at least 1 slice, found {count}.")

    def label(pieces: Sequence[Piece]) -> Sequence[Hashable]:
        return [f"{piece.path} {piece.part}" if count > 1 else piece.path for piece in pieces]

    def parts(path: str, shape: tuple[int, ...], itemsize: int) -> int:
        del itemsize
        if not shape or shape[0] % count:
            raise ConfigError(
                f"slices:{count} cannot cut {path} of shape {list(shape)}: expected a leading axis "
                f"that {count} divides."
            )
        return count

    return Blocks(f"slices:{count}", label, parts)


def shard(num_shards: int) -> Blocks:
    """What each of a number of devices holds of every layer.

    Arrays are cut into equal parts along their leading axis, the way fully sharded data
    parallelism lays them out, and the i-th parts of all arrays of a layer are a block. Resolving
    such a block takes no communication at all. The result depends on the number of devices.

    Args:
      num_shards: number of devices. Arrays whose leading axis they do not divide are in a block
        of their own, ``replicated``.

    Example:
      >>> import numpy as np
      >>> from jaxmoo.blocks import partition
      >>> params = {"w": np.zeros((4, 2)), "scale": np.zeros(3)}
      >>> partition(shard(2), params).names
      ('scale replicated', 'w shard 0', 'w shard 1')
    """
    if num_shards < 1:
        raise ConfigError(f"shard blocks: expected at least 1 shard, found {num_shards}.")

    def label(pieces: Sequence[Piece]) -> Sequence[Hashable]:
        return [
            f"{_layer_of(p.path)} " + (f"shard {p.part}" if p.parts == num_shards else "replicated")
            for p in pieces
        ]

    def parts(path: str, shape: tuple[int, ...], itemsize: int) -> int:
        del path, itemsize
        return num_shards if shape and shape[0] % num_shards == 0 else 1

    return Blocks(f"shard:{num_shards}", label, parts)


def random(num_blocks: int, seed: int = 0) -> Blocks:
    """A random partition into ``num_blocks`` blocks with equally many pieces (to within one).

    The control for every claim about *where* blocks are cut: same number of blocks, no structure.

    Args:
      num_blocks: how many blocks; at most the number of pieces.
      seed: which partition; the same seed gives the same one everywhere.
    """
    if num_blocks < 1:
        raise ConfigError(f"random blocks: expected at least 1 block, found {num_blocks}.")

    def label(pieces: Sequence[Piece]) -> Sequence[Hashable]:
        if num_blocks > len(pieces):
            raise ConfigError(
                f"random:{num_blocks} asks for more blocks than there are pieces "
                f"({len(pieces)}). Ask for at most {len(pieces)}."
            )
        order = np.random.default_rng(seed).permutation(len(pieces))
        labels = np.empty(len(pieces), int)
        labels[order] = np.arange(len(pieces)) % num_blocks
        return [f"random {i}" for i in labels]

    return Blocks(f"random:{num_blocks}" + (f":{seed}" if seed else ""), label)


def choose(rules: Mapping[str, Rule]) -> Blocks:
    """A rule for each part of the model.

    Args:
      rules: maps regular expressions over paths to rules; the first that is found in a path
        (``re.search``) decides.

    Returns:
      Blocks named as the rules name them; where two rules use the same name, the expression is
      put before it.

    Raises:
      ConfigError: a rule is unknown; or, on use, a path matches no expression or an expression is
        the first match of no path.

    Example:
      >>> import numpy as np
      >>> from jaxmoo.blocks import partition
      >>> rule = choose({"embed": "bytes:16", ".*": "whole"})
      >>> partition(rule, {"embed": np.zeros((4, 2), np.float32), "w": np.zeros(3)}).names
      ('bucket 0', 'bucket 1', 'whole')
    """
    chosen = {pattern: get(rule) for pattern, rule in rules.items()}

    def pattern_of(path: str) -> str:
        for pattern in chosen:
            if re.search(pattern, path):
                return pattern
        raise ConfigError(
            f"No blocks for {path!r}: it matches none of {list(chosen)}. Add a last entry '.*'."
        )

    def label(pieces: Sequence[Piece]) -> Sequence[Hashable]:
        patterns = [pattern_of(piece.path) for piece in pieces]
        labels: list[tuple[str, Hashable]] = [("", "")] * len(pieces)
        for pattern, rule in chosen.items():
            mine = [i for i, p in enumerate(patterns) if p == pattern]
            if not mine:
                raise ConfigError(f"The pattern {pattern!r} is the first match of no parameter.")
            for i, name in zip(mine, rule.label([pieces[i] for i in mine]), strict=True):
                labels[i] = (pattern, name)
        users = {name: {p for p, n in labels if n == name} for _, name in labels}
        return [name if len(users[name]) == 1 else f"{p}: {name}" for p, name in labels]

    def parts(path: str, shape: tuple[int, ...], itemsize: int) -> int:
        return chosen[pattern_of(path)].parts(path, shape, itemsize)

    def sparse(piece: Piece) -> bool:
        return chosen[pattern_of(piece.path)].sparse(piece)

    spec = ", ".join(f"{pattern} -> {rule.spec}" for pattern, rule in chosen.items())
    return Blocks(f"choose({spec})", label, parts, sparse)


def intersect(
    first: Rule,
    second: Rule,
) -> Blocks:
    """Cut by two rules at once: parameters share a block when they do under both.

    Example:
      >>> import numpy as np
      >>> from jaxmoo.blocks import partition
      >>> kind = by(lambda path: path.split(".")[-1])
      >>> params = {"layers": [{"w": np.zeros(2), "b": np.zeros(1)} for _ in range(2)]}
      >>> partition(intersect("layer", kind), params).names
      ('layers.0 & b', 'layers.0 & w', 'layers.1 & b', 'layers.1 & w')
    """
    a, b = get(first), get(second)

    def label(pieces: Sequence[Piece]) -> Sequence[Hashable]:
        return [f"{x} & {y}" for x, y in zip(a.label(pieces), b.label(pieces), strict=True)]

    def parts(path: str, shape: tuple[int, ...], itemsize: int) -> int:
        return math.lcm(a.parts(path, shape, itemsize), b.parts(path, shape, itemsize))

    def sparse(piece: Piece) -> bool:
        return a.sparse(piece) or b.sparse(piece)

    return Blocks(f"{a.spec} & {b.spec}", label, parts, sparse)


_PLAIN = {"whole": whole, "layer": layer, "module": module, "expert": expert, "leaf": leaf}
_KINDS = (*_PLAIN, "bytes", "slices", "shard", "random")
_FORMS = (*_PLAIN, "bytes:SIZE", "slices:N", "shard:N", "random:N")


def names() -> tuple[str, ...]:
    """Return the forms that :func:`get` understands."""
    return _FORMS


def get(spec: Rule) -> Blocks:
    """Return blocks from their written form, a function of the path, or :class:`Blocks`.

    Args:
      spec: ``"whole"``, ``"layer"``, ``"module"``, ``"expert"``, ``"leaf"``, ``"bytes:25MiB"``,
        ``"slices:16"``, ``"shard:8"``, ``"random:32"`` or ``"random:32:SEED"``; a function path
        -> name; or ``"package.module:object"``, where such a function or :class:`Blocks` are
        imported from.

    Raises:
      ConfigError: the form is unknown, its number cannot be read, or what is imported is not
        there or of another kind.

    Example:
      >>> get("random:32").spec
      'random:32'
      >>> get("layers")
      Traceback (most recent call last):
      ...
      jaxmoo.errors.ConfigError: Unknown blocks 'layers'. Did you mean 'layer'? Expected one of
      whole, layer, module, expert, leaf, bytes:SIZE, slices:N, shard:N, random:N, or a function
      from path to name.
    """
    if isinstance(spec, Blocks):
        return spec
    if callable(spec):
        return by(spec)
    kind, _, rest = str(spec).partition(":")
    if kind in _PLAIN and not rest:
        return _PLAIN[kind]()
    if kind == "bytes" and rest:
        return of_bytes(rest)
    if kind == "shard" and rest.isdigit():
        return shard(int(rest))
    if kind == "slices" and rest.isdigit():
        return slices(int(rest))
    if kind == "random" and re.fullmatch(r"\d+(:\d+)?", rest):
        return random(*map(int, rest.split(":")))
    if is_path(str(spec)) and kind not in _KINDS:
        return _own(str(spec))
    raise ConfigError(
        f"Unknown blocks {spec!r}.{did_you_mean(kind, _KINDS)} Expected one of "
        f"{', '.join(_FORMS)}, or a function from path to name."
    )


def _own(path: str) -> Blocks:
    """Blocks of the user's, imported from ``"package.module:object"``."""
    found = imported(path, "blocks")
    if isinstance(found, Blocks):
        return found
    try:
        inspect.signature(found).bind("path")
    except (TypeError, ValueError):
        raise ConfigError(
            f"Blocks {path!r}: expected a function from a parameter's path to the name of its "
            f"block, or jaxmoo.blocks.Blocks; found {found!r}."
        ) from None
    return by(found, path)
