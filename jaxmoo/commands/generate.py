"""``jaxmoo generate``: let a model reply to prompts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxmoo.commands.command import command
from jaxmoo.commands.processes import add_mesh, add_processes, mesh_axes, together
from jaxmoo.errors import ConfigError
from jaxmoo.files.atomic import replace_text
from jaxmoo.files.outputs import check_writable, typed_path
from jaxmoo.runtime.memory import named_when_full

if TYPE_CHECKING:
    from jaxmoo.evaluate.replies import Prompt, Reply

__all__ = ["main"]

_EXAMPLES = """examples:
  jaxmoo generate runs/quickstart --prompt 'Buongiorno!'
  jaxmoo generate path/to/model --file prompts.jsonl --output replies.jsonl
  jaxmoo generate path/to/model --prompt 'A story:' --raw --temperature 0.8 --top-p 0.95 --seed 1

A line of prompts.jsonl is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]},
and may have "stop": ["\\n"], tokens that end this reply.
"""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@command()
def main(arguments: Sequence[str] | None = None, prog: str = "jaxmoo generate") -> int:
    """Run the command; return its exit code: see `command`."""
    options = _parser(prog).parse_args(arguments)
    return together(options, lambda: _generate(options))


def _generate(options: argparse.Namespace) -> None:
    from jaxmoo.evaluate.replies import Replies, reply
    from jaxmoo.hf.directory import first_process
    from jaxmoo.hf.source import model_directory

    if options.output is not None:
        check = options.output.absolute().parent
        first_process(lambda: check_writable(check, "--output"), "write the replies")
    prompts = _prompts(options)
    sampling = {name: value for name in _SAMPLING if (value := getattr(options, name)) is not None}
    settings = Replies(
        model=model_directory(options.model),
        prompts=prompts,
        step=options.step,
        base=options.base,
        new_tokens=options.max_tokens,
        stop=tuple(options.stop),
        sample=options.sample or bool(sampling),
        sampling=sampling,
        seed=options.seed,
        batch_size=options.batch_size,
        dtype=options.dtype,
        mesh=mesh_axes(options),
    )
    with named_when_full("Use a smaller --batch-size or --max-tokens, or more devices."):
        replies = reply(settings, lambda line: print(line, file=sys.stderr))
    first_process(lambda: _show(options, prompts, replies), "write the replies")


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    from jaxmoo.evaluate.replies import Prompt, read_prompts

    system = () if options.system is None else ({"role": "system", "content": options.system},)
    prompts = [] if options.file is None else read_prompts(options.file)
    for text in options.prompt:
        messages = (*system, {"role": "user", "content": text})
        prompts.append(Prompt(text=text) if options.raw else Prompt(messages))
    if (options.raw or options.system is not None) and options.file is not None:
        raise ConfigError("--raw and --system are for --prompt; a file says what its prompts are.")
    if options.raw and options.system is not None:
        raise ConfigError("--raw uses no chat template, and so has no place for --system.")
    return prompts


def _show(options: argparse.Namespace, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> None:
    lines = []
    for prompt, one in zip(prompts, replies, strict=True):
        asked = (
            {"messages": list(prompt.messages)} if prompt.text is None else {"text": prompt.text}
        )
        said = {"reply": one.text, "tokens": one.tokens, "stopped": one.stopped}
        lines.append(json.dumps(asked | said, ensure_ascii=False))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.output, "".join(f"{line}\n" for line in lines))
        print(f"Wrote {len(lines)} replies to {options.output}.", file=sys.stderr)
    else:
        print(replies[0].text if len(replies) == 1 else "\n".join(lines))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Let a model reply to prompts, many at a time: by its likeliest tokens, or by "
        "tokens drawn. One reply is printed as it is; several, and --output, are JSON Lines.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        help="Hugging Face directory, adapters (PEFT), checkpoint, training run, built-in name, or "
        "id on a hub",
    )
    parser.add_argument("--step", type=int, help="which of a run's checkpoints (the newest)")
    parser.add_argument("--base", help="model that the run or adapters began with, if moved")
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given several times"
    )
    group.add_argument("--file", type=typed_path, help="file of prompts, such as .jsonl")
    group.add_argument("--system", metavar="TEXT", help="system message before every --prompt")
    group.add_argument(
        "--raw", action="store_true", help="continue each --prompt as it is, without chat template"
    )
    group.add_argument("--output", type=typed_path, help="file for the replies, .jsonl")
    group = parser.add_argument_group("replies")
    group.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="of a reply (%(default)s)"
    )
    group.add_argument(
        "--stop",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="tokens that end a reply, beside the model's own",
    )
    group = parser.add_argument_group(
        "drawing tokens",
        "Without these the likeliest token is taken. Each of them draws tokens instead; what is "
        "not given is as the model's generation_config.json says.",
    )
    group.add_argument("--sample", action="store_true", help="draw as the model's makers do")
    group.add_argument("--temperature", type=float, metavar="T", help="divides the logits")
    group.add_argument("--top-k", type=int, metavar="K", help="from the K likeliest tokens")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="from the likeliest that together have P"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="from those at least P times as likely as the best"
    )
    group.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    group = parser.add_argument_group("computation")
    group.add_argument("--batch-size", type=int, default=16, help="prompts at a time (%(default)s)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_mesh(group, ("data", "fsdp", "tensor"))
    add_processes(parser)
    return parser
