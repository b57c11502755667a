"""Between Hugging Face directories and Orbax checkpoints, in both directions.

A *checkpoint directory* is what `from_hf` makes::

    checkpoint.json      the Hugging Face tensors it stands for, with shapes and dtypes
    config.json          and tokenizer files, as they were
    params/              an Orbax checkpoint: the decoder's parameters as a nested dict

Nothing else is needed to go back.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoo import mesh
from jaxmoo.config.training import Config
from jaxmoo.config.training import load_config as load_run_config
from jaxmoo.convert.kinds import CHECKPOINT_FILE, base_of, kind_of, tokenizer_of
from jaxmoo.convert.params import restore_params, save_params, spread
from jaxmoo.data.tokenization.tokenizer import (
    NO_ENDING,
    chat_tokenizer,
    ending_token,
    read_template,
)
from jaxmoo.errors import CheckpointError
from jaxmoo.files.outputs import typed_path
from jaxmoo.hf.adapter import describe_adapter, load_adapter, save_adapter
from jaxmoo.hf.card import ModelCard
from jaxmoo.hf.directory import check_target, first_process, new_directory, read_unchanged
from jaxmoo.hf.generation import left_to_callers
from jaxmoo.hf.load import check_tensors, load_config, load_model, read_json, with_dtypes
from jaxmoo.hf.save import (
    MAX_SHARD_BYTES,
    check_space,
    copy_companions,
    model_tensors,
    save_model,
)
from jaxmoo.hf.source import resolve_source
from jaxmoo.hf.tokenizer import check_tokenizer, load_tokenizer
from jaxmoo.hf.weights import DTYPES, Weights
from jaxmoo.models.architecture import DecoderConfig
from jaxmoo.models.decoder import Decoder
from jaxmoo.models.lora import ADAPTERS, add_adapters, merge_adapters
from jaxmoo.models.paths import segments_for, trainable_filter
from jaxmoo.models.quantization import projections
from jaxmoo.runs.checkpoint import STATE, read_about, read_item, unchecked
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runs.fingerprint import fingerprint
from jaxmoo.runs.provenance import check_base, check_settings
from jaxmoo.runs.run_card import adapter_card, loadable_name, run_card
from jaxmoo.runs.trained_parameters import load_base, split_model

__all__ = [
    "Opened",
    "from_hf",
    "open_model",
    "stored_tensors",
    "to_adapter",
    "to_hf",
]

_PARAMS = "params"


class Opened(NamedTuple):
    """A model with what is needed to export it.

    Attributes:
      model: the decoder.
      source: directory with its config and tokenizer.
      dtypes: dtype of each Hugging Face tensor, by name.
      card: facts that are known about it, or None.
      chat_template: where it is not the one in ``source``.
      stop: tokens that end a reply, beside those of ``source``.
      merge_onto: what its adapters are to be merged into, if they are on a quantised base and not
        merged yet; see :func:`jaxmoo.hf.save_model`.
    """

    model: Decoder
    source: Path
    dtypes: Mapping[str, str]
    card: ModelCard | None
    chat_template: str | None = None
    stop: tuple[int, ...] = ()
    merge_onto: str | None = None


def from_hf(source: Path, out: Path, *, say: Callable[[str], None] = print) -> None:
    """Convert a Hugging Face directory into a checkpoint directory.

    Parameters are spread over all of JAX's devices, keep their dtypes, and are written as they lie
    there. The directory appears only when all is written. Several processes may call together, if
    they see the same files; each reads and writes only what lies on its devices.

    Args:
      source: the Hugging Face directory; see `jaxmoo.hf.resolve_source`.
      out: the directory to make; may exist if it is empty.
      say: called with lines for a person to read.

    Raises:
      CheckpointError: when ``out`` is not empty or ``source`` is damaged.
      ConfigError: when the architecture is not supported.
    """
    source, out = typed_path(source), typed_path(out)
    first_process(lambda: check_target(out))
    _check_tokenizer(source, load_config(source))
    model = load_model(source, param_dtype=None, shardings=spread)
    params = nnx.state(model)
    stored = Weights(source)
    tensors = {
        tensor.name: {"shape": list(tensor.shape), "dtype": tensor.dtype.name}
        for tensor in model_tensors(model, stored.dtype)
    }
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def write_rest() -> None:
        (directory / "config.json").write_bytes((source / "config.json").read_bytes())
        copy_companions(source, directory)
        text = json.dumps({"format": 1, "tensors": tensors}, indent=1)
        (directory / CHECKPOINT_FILE).write_text(text + "\n", "utf-8")

    with new_directory(out) as directory:
        first_process(lambda: check_space(directory, size))
        say(f"Writing {size / 1e9:.2f} GB of parameters ...")
        save_params(directory / _PARAMS, params, out)
        first_process(write_rest)


def to_hf(
    source: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Convert a checkpoint directory, or a step of a training run, into a Hugging Face directory.

    Several processes may call together, as for `from_hf`; the first one writes.

    Args:
      source: what `from_hf` made, the output directory of a training run, or adapters in PEFT
        format.
      out: the directory to make; may exist if it is empty.
      step: which of the run's checkpoints; the newest by default.
      dtype: dtype of all tensors; by default each has that of the model it comes from.
      max_shard_bytes: size beyond which the weights are split into several files.
      base: the model that the run began with, or that adapters belong to, if it is no longer where
        their config says.
      say: called with lines for a person to read.

    Raises:
      CheckpointError: when ``out`` is not empty, or ``source`` is damaged, of another kind, or has
        no such step.
    """
    out = typed_path(out)
    first_process(lambda: check_target(out))
    opened = open_model(typed_path(source), step=step, base=base, merge=False, say=say)
    if opened.merge_onto is None:
        merge_adapters(opened.model)
    tokenizer = tokenizer_of(typed_path(source), opened.source)
    _check_tokenizer(tokenizer, opened.model.config)
    save_model(
        opened.model,
        out,
        source=opened.source,
        dtype=opened.dtypes if dtype is None else dtype,
        max_shard_bytes=max_shard_bytes,
        card=opened.card,
        chat_template=opened.chat_template,
        stop=opened.stop,
        tokenizer=tokenizer,
        merge_onto=opened.merge_onto,
    )
    if kind_of(typed_path(source)) == "run" and not opened.stop:
        say(NO_ENDING)


def _check_tokenizer(path: Path, config: DecoderConfig) -> None:
    """Raise unless the tokenizer in a directory, if there is one, fits a model."""
    if (path / "tokenizer.json").is_file():
        check_tokenizer(load_tokenizer(path), config.vocab_size, path)


def to_adapter(
    source: Path,
    out: Path,
    *,
    step: int | None = None,
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write the adapters of a step of a training run as a directory in PEFT format.

    Args:
      source: the output directory of the run.
      out: the directory to make; may exist if it is empty.
      step: as for `to_hf`.
      base: as for `to_hf`.
      say: called with lines for a person to read.

    Raises:
      CheckpointError: when ``out`` is not empty, or ``source`` is damaged, trained no adapters, or
        has no such step.
    """
    check_target(typed_path(out))
    run = RunDirectory(source)
    if kind_of(typed_path(source)) != "run" or load_run_config(run.config).lora.rank is None:
        raise CheckpointError(f"{source} is not a training run with adapters (lora.rank)")
    opened = _open_run(run, step, base, say)
    save_adapter(
        opened.model,
        typed_path(out),
        base_model=loadable_name(opened.source),
        card=None if opened.card is None else adapter_card(opened.card),
    )
    if note := left_to_callers(opened.source, opened.stop):
        say(f"Note: {note}")


def open_model(
    path: Path,
    *,
    step: int | None = None,
    base: str | None = None,
    shardings: Callable[[nnx.State], Any] = spread,
    merge: bool = True,
    say: Callable[[str], None] = print,
) -> Opened:
    """Load the model in a directory of any kind, every parameter in its stored dtype.

    Adapters, of a run or in PEFT format, are merged into the parameters they adapt; those of a run
    on a quantised base into what its ``lora.merge_onto`` says.

    Args:
      path: a Hugging Face directory, adapters, a checkpoint directory or a training run.
      step: which of a run's checkpoints; the newest by default.
      base: see `to_hf`.
      shardings: ``state -> pytree of shardings`` of its parameters; by default they are spread over
        all devices.
      merge: whether the adapters of a run are merged.
      say: called with lines for a person to read.

    Raises:
      CheckpointError: when the directory is damaged, of no kind, or has no such step.
    """
    path = typed_path(path)
    kind = kind_of(path)
    if kind == "run":
        opened = _open_run(RunDirectory(path), step, base, say, shardings)
        return _merged(opened, shardings) if merge else opened
    if kind == "adapter" and step is None:
        return _open_adapter(path, base, shardings)
    if step is not None or base is not None:
        raise CheckpointError(f"a step or base was given, but {path} is not a training run")
    if kind == "checkpoint":
        return read_unchanged(lambda: _read_checkpoint(path, shardings), path)
    weights = Weights(path)
    model = load_model(path, param_dtype=None, shardings=shardings)
    return Opened(model, path, weights.dtypes(), None)


def _merged(opened: Opened, shardings: Callable[[nnx.State], Any]) -> Opened:
    """The model of a run with its adapters merged."""
    model = opened.model
    if opened.merge_onto == "base":
        whole = load_model(
            opened.source, segments=model.segments, param_dtype=None, shardings=shardings
        )
        for first in model.layers:
            pairs = zip(projections(model, first), projections(whole, first), strict=True)
            for (_, _, linear), (_, _, base) in pairs:
                linear.kernel = base.kernel
    merge_adapters(model)
    return opened._replace(merge_onto=None)


def stored_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor that a checkpoint directory stands for.

    Raises:
      CheckpointError: when its list is damaged.
    """
    content = read_json(path / CHECKPOINT_FILE)
    if content.get("format") != 1:
        raise CheckpointError(
            f"{path / CHECKPOINT_FILE} has format {content.get('format')!r}, expected 1"
        )
    try:
        tensors = {
            name: (tuple(map(int, tensor["shape"])), str(tensor["dtype"]))
            for name, tensor in content["tensors"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / CHECKPOINT_FILE} is damaged: {error!r}") from error
    unknown = {dtype for _, dtype in tensors.values()} - set(DTYPES.values())
    if unknown:
        raise CheckpointError(
            f"{path / CHECKPOINT_FILE} is damaged: unknown dtype {', '.join(sorted(unknown))}"
        )
    return tensors


def _open_adapter(path: Path, base: str | None, shardings: Callable[[nnx.State], Any]) -> Opened:
    """A model with the adapters of a directory in PEFT format merged into it."""
    found = describe_adapter(path)
    source = base_of(path, found, base)
    config = load_config(source)
    if found.layers[-1] >= config.num_hidden_layers:
        raise CheckpointError(
            f"the adapters in {path} are on layer {found.layers[-1]}, but the model in {source} "
            f"has {config.num_hidden_layers} layers: name the model they belong to with --base"
        )
    pattern = rf"^layers\.({'|'.join(map(str, found.layers))})\."
    segments = segments_for(config, pattern)
    model = load_model(source, segments=segments, param_dtype=None, shardings=shardings)
    add_adapters(model, found.lora, found.layers)
    graph, abstract, rest = nnx.split(model, trainable_filter(ADAPTERS), ...)
    model = nnx.merge(graph, load_adapter(path, abstract, found.lora, shardings(abstract)), rest)
    merge_adapters(model)
    template = path / "chat_template.jinja"
    return Opened(
        model,
        source,
        Weights(source).dtypes(),
        None,
        read_template(str(template)) if template.is_file() else None,
    )


def _read_checkpoint(path: Path, shardings: Callable[[nnx.State], Any]) -> Opened:
    tensors = stored_tensors(path)
    config = load_config(path)
    graph, state = nnx.split(Decoder.abstract(config))
    check_tensors({name: shape for name, (shape, _) in tensors.items()}, state, config, path)
    dtypes = {name: dtype for name, (_, dtype) in tensors.items()}
    like = with_dtypes(state, dtypes.__getitem__, config)
    try:
        state = restore_params(path / _PARAMS, like, shardings=shardings)
    # A damaged checkpoint fails in any way at all inside the library, and says it at length.
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path / _PARAMS} cannot be restored: {reason}") from error
    return Opened(nnx.merge(graph, state), path, dtypes, None)


def _open_run(
    run: RunDirectory,
    step: int | None,
    base: str | None,
    say: Callable[[str], None],
    shardings: Callable[[nnx.State], Any] = spread,
) -> Opened:
    config = load_run_config(run.config)
    steps = run.steps()
    if not steps:
        raise CheckpointError(
            f"{run.path} has no complete checkpoint in {run.checkpoints}. Start the run again with "
            "the same command: it writes one at its end, when it is interrupted, and every "
            "train.checkpoint_every steps."
        )
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise CheckpointError(
            f"{run.path} has no checkpoint of step {step}. It has {', '.join(map(str, steps))}."
        )
    source = resolve_source(base or config.model.source)
    say(f"Step {step} of {run.path}, on the weights of {base or config.model.source}.")
    model = load_base(config, source, shardings=shardings, param_dtype=None)
    architecture = model.config
    graph, trained, frozen = split_model(config, model)
    like, within = trained, "params"
    if config.optimizer.ema is not None:
        like, within = with_dtypes(trained, lambda _: "float32", architecture), "ema"
    elif config.lora.rank is None:
        like = with_dtypes(trained, lambda _: config.model.param_dtype, architecture)
    del trained, model
    about = read_about(run.checkpoints, step)
    check_settings(about, step, config)
    check_base(
        about,
        step,
        architecture,
        fingerprint(frozen, NamedSharding(mesh.make_mesh(1), P()), dtype=config.model.param_dtype),
        base or config.model.source,
    )
    if note := unchecked(run.checkpoints, step, about):
        say(note)
    restore = functools.partial(restore_params, like=like, within=within, shardings=shardings)
    trained = read_item(run.checkpoints, step, STATE, restore)
    return Opened(
        nnx.merge(graph, trained, frozen),
        source,
        Weights(source).dtypes(),
        run_card(run, config, step),
        read_template(config.data.chat_template),
        _stop(source, config),
        None if config.lora.quantize_base is None else config.lora.merge_onto,
    )


def _stop(source: Path, config: Config) -> tuple[int, ...]:
    """The token that ended replies in a run."""
    if not (source / "tokenizer.json").is_file():
        return ()
    ending = ending_token(chat_tokenizer(source, config.data)[0])
    return () if ending is None else (ending,)
