"""``jaxmoo convert``: convert models between formats, compare and describe them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxmoo.commands.command import command
from jaxmoo.errors import ConfigError
from jaxmoo.files.outputs import typed_path
from jaxmoo.sizes import parse_size

__all__ = ["main"]

_EXAMPLES = """examples:
  jaxmoo convert inspect smollm2-135m-instruct
  jaxmoo convert from-hf path/to/hf-model path/to/checkpoint
  jaxmoo convert to-hf path/to/checkpoint path/to/hf-copy
  jaxmoo convert from-gguf path/to/model.gguf path/to/hf-model
  jaxmoo convert to-gguf runs/quickstart quickstart.gguf --type q8_0
  jaxmoo convert verify path/to/hf-model path/to/hf-copy
  jaxmoo convert to-hf runs/quickstart exported --step 30 --dtype bfloat16
  jaxmoo convert to-hf runs/lora adapter --adapter
"""

# Types of a GGUF file's matrices, as jaxmoo.hf.gguf_write has them.
_KINDS = ("f32", "f16", "bf16", "q8_0")


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo convert") -> int:
    """Run the command.

    Returns:
      Its exit code: see `command`; 1 also where models differ (verify).
    """
    options = _parser(prog).parse_args(arguments)
    import jax

    # Conversion needs memory, not speed; virtual devices only show that sharding changes nothing.
    jax.config.update("jax_platforms", options.platform)
    if options.devices is not None:
        _virtual_devices(options.devices)
    return _COMMANDS[options.command](options)


def _virtual_devices(number: int) -> None:
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", number)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--devices {number}: {error}") from error


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Convert models between Hugging Face directories and Orbax checkpoints, "
        "exactly, and compare and describe them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--platform", default="cpu", help="where parameters lie meanwhile (cpu)")
        sub.add_argument("--devices", type=int, help="number of virtual CPU devices")
        return sub

    sub = add("from-hf", "Hugging Face directory -> Orbax checkpoint")
    sub.add_argument("source", help="a directory, a model's id on the hub, or an embedded model")
    sub.add_argument("out", type=typed_path, help="directory to make")

    sub = add("from-gguf", "GGUF file -> Hugging Face directory, in float32")
    sub.add_argument(
        "file",
        type=typed_path,
        help="a GGUF file of one of the architectures in docs/conversion.md",
    )
    sub.add_argument("out", type=typed_path, help="directory to make")

    sub = add("to-hf", "Orbax checkpoint or training run -> Hugging Face directory")
    sub.add_argument(
        "source", type=typed_path, help="what from-hf made, or a training run's directory"
    )
    sub.add_argument("out", type=typed_path, help="directory to make")
    sub.add_argument("--step", type=int, help="which of a run's checkpoints (the newest)")
    sub.add_argument("--base", help="model that the run or adapters began with, if moved")
    sub.add_argument("--dtype", help="float32, bfloat16 or float16 (as the model came)")
    sub.add_argument(
        "--adapter", action="store_true", help="of a LoRA run: the adapters alone, in PEFT format"
    )
    sub.add_argument("--max-file-size", default="5GB", help="size of a file of weights (5GB)")

    sub.add_argument("--push-to-hub", metavar="REPO", help="upload it, with its card")
    sub.add_argument("--private", action="store_true", help="to a private repository, if made")

    sub = add("to-gguf", "A model of any kind -> GGUF file, for llama.cpp and Ollama")
    sub.add_argument(
        "source", help="Hugging Face directory, adapters, checkpoint, training run or model's name"
    )
    sub.add_argument("out", type=typed_path, help="file to make, .gguf")
    sub.add_argument("--type", choices=_KINDS, help="of the matrices (as the model came)")
    sub.add_argument("--step", type=int, help="which of a run's checkpoints (the newest)")
    sub.add_argument("--base", help="model that the run or adapters began with, if moved")

    sub = add("verify", "Compare two models: every tensor, and the logits of a prompt")
    sub.add_argument("a", help="Hugging Face directory, checkpoint or training run")
    sub.add_argument("b", help="the same")
    sub.add_argument("--step-a", type=int, help="if A is a run: which of its checkpoints")
    sub.add_argument("--step-b", type=int, help="if B is a run: which of its checkpoints")
    sub.add_argument("--tolerance", type=float, default=0.0, help="relative (0: equal bytes)")

    sub = add("inspect", "Architecture, sizes, tensors, dtypes and files of a model")
    sub.add_argument("directory", help="Hugging Face directory, checkpoint or training run")
    return parser


def _from_hf(options: argparse.Namespace) -> int:
    from jaxmoo.convert.models import from_hf
    from jaxmoo.hf.directory import check_target
    from jaxmoo.hf.source import resolve_source

    check_target(options.out)  # before anything is fetched
    from_hf(resolve_source(options.source), options.out)
    print(f"Wrote {options.out} (Orbax checkpoint).")
    return 0


def _from_gguf(options: argparse.Namespace) -> int:
    from jaxmoo.hf.gguf import convert_gguf

    convert_gguf(options.file, options.out)
    print(f"Wrote {options.out} (Hugging Face format).")
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    from jaxmoo.hf.push import prepare_push, push

    if options.push_to_hub:  # before long work
        options.push_to_hub = prepare_push(options.push_to_hub, options.private or None)
    _write_hf(options)
    if options.push_to_hub:
        print(f"Uploaded: {push(options.out, options.push_to_hub, 'jaxmoo convert to-hf')}")
    return 0


def _write_hf(options: argparse.Namespace) -> None:
    from jaxmoo.convert.models import to_adapter, to_hf

    if options.adapter:
        if options.dtype is not None:
            raise ConfigError("--dtype does not go with --adapter: adapters are float32")
        to_adapter(options.source, options.out, step=options.step, base=options.base)
        print(f"Wrote {options.out} (PEFT format).")
        return
    to_hf(
        options.source,
        options.out,
        step=options.step,
        dtype=None if options.dtype is None else _dtype(options.dtype),
        max_shard_bytes=parse_size(options.max_file_size, what="--max-file-size", needs_unit=True),
        base=options.base,
    )
    print(f"Wrote {options.out} (Hugging Face format).")


def _to_gguf(options: argparse.Namespace) -> int:
    from jaxmoo.convert.gguf import to_gguf
    from jaxmoo.hf.source import model_directory

    to_gguf(
        model_directory(options.source),
        options.out,
        kind=options.type,
        step=options.step,
        base=options.base,
    )
    print(f"Wrote {options.out} (GGUF).")
    return 0


def _verify(options: argparse.Namespace) -> int:
    steps = (options.step_a, options.step_b)
    from jaxmoo.convert.compare import compare
    from jaxmoo.hf.source import model_directory

    found = compare(model_directory(options.a), model_directory(options.b), steps=steps)
    print(found.table())
    return 0 if found.within(options.tolerance) else 1


def _inspect(options: argparse.Namespace) -> int:
    from jaxmoo.convert.describe import describe
    from jaxmoo.hf.source import model_directory

    print(describe(model_directory(options.directory)))
    return 0


_COMMANDS = {
    "from-hf": _from_hf,
    "from-gguf": _from_gguf,
    "to-hf": _to_hf,
    "to-gguf": _to_gguf,
    "verify": _verify,
    "inspect": _inspect,
}


def _dtype(name: str) -> str:
    known = ("float32", "bfloat16", "float16")
    if name not in known:
        raise ConfigError(f"--dtype must be one of {', '.join(known)}, got {name!r}")
    return name
