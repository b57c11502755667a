"""Which examples are trained on and which are held out: duplicates, leaks and the split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxmoo.data.example import Example, normalise
from jaxmoo.errors import ConfigError

_HASH_BYTES = 6  # 48 bits: exact in a float, so that the fraction below stays under 1


# Given digests of what some languages have, returns those of what all have, where others divide the
# rest.
Share = Callable[[set[bytes]], set[bytes]]


def alone(mine: set[bytes]) -> set[bytes]:
    """What all have where nobody else has any: a `Share`."""
    return mine


def deduplicate(examples: Iterable[Example]) -> list[Example]:
    """Keep the first of all examples with the same normalised prompt and reply.

    Args:
      examples: of one language.

    Returns:
      The distinct examples in their order.

    Example:
      >>> pairs = [("Hi", "Hello"), ("Hi ", "Hello"), ("Hi", "Hey")]
      >>> [e.reply for e in deduplicate(Example.from_pair("en", *pair) for pair in pairs)]
      ['Hello', 'Hey']
    """
    distinct: dict[tuple[str, str], Example] = {}
    for example in examples:
        distinct.setdefault(example.key, example)
    return list(distinct.values())


def hash_fraction(text: str) -> float:
    """Map a text to a number in [0, 1) that is the same on every machine and in every run.

    Args:
      text: any text.

    Returns:
      The first bytes of its SHA-256 as a fraction.

    Example:
      >>> round(hash_fraction("user:Hello"), 6)
      0.836952
    """
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:_HASH_BYTES], "big") / 2 ** (8 * _HASH_BYTES)


def side_key(example: Example) -> str:
    """Return the text whose hash is an example's side, where nothing links it with others.

    A group replaces the prompt as the name of the side, so that parallel translations, whose
    prompts differ, go to the same side in every language.

    Args:
      example: an example.

    Returns:
      Its group if it has one, else its prompt.

    Example:
      >>> side_key(Example.from_pair("en", "Hi", "Hello"))
      'user:Hi'
    """
    return example.prompt_key if example.group is None else f"\x00group:{example.group}"


def split_examples(
    examples: Sequence[Example], held_out: float, *, disjoint_replies: bool = False
) -> tuple[list[Example], list[Example]]:
    """Split one language's examples into training and held-out ones.

    The side of an example is a hash of its normalised *prompt*, so all examples of one prompt
    fall on the same side, whatever their order, the seed, the machine, the other languages of the
    run, or the examples added later. Examples of one `Example.group` stay together too, and with
    `disjoint_replies` so do those that share a reply: linked examples go where the smallest of
    their groups or prompts goes.

    Args:
      examples: of one language.
      held_out: the fraction of prompts to hold out, in [0, 1].
      disjoint_replies: keep every reply on one side. Right where many prompts paraphrase one
        another, wrong where replies are labels or numbers that both sides need.

    Returns:
      The training examples in the given order, and the held-out ones in the order of their
      hashes, so that the first n of them are the same n whatever the order of `examples`.

    Raises:
      ConfigError: `held_out` is not a fraction.
    """
    if not 0 <= held_out <= 1:
        raise ConfigError(f"held_out is a fraction between 0 and 1, found {held_out}.")
    train: list[Example] = []
    held: list[Example] = []
    for example, key in zip(examples, _linked_keys(examples, disjoint_replies), strict=True):
        (held if hash_fraction(key) < held_out else train).append(example)
    return train, _in_order(held)


class Split(NamedTuple):
    """One language's examples, divided.

    Attributes:
      train: to train on; of an unseen language empty.
      held_out: to evaluate.
      leaked: held-out examples that are left out, because they, or others of their group, are among
        the training examples of another language.
    """

    train: list[Example]
    held_out: list[Example]
    leaked: int


def split_languages(
    examples: Mapping[str, Sequence[Example]],
    seen: Collection[str],
    held_out: float,
    *,
    disjoint_replies: bool = False,
    share: Share = alone,
) -> dict[str, Split]:
    """Split every language's examples, and keep those of one language out of another's training.

    Args:
      examples: per language its distinct examples.
      seen: the languages to train on; of the others everything is held out.
      held_out: see `split_examples`.
      disjoint_replies: see `split_examples`.
      share: makes what all languages train on of what these do.

    Returns:
      Per language its parts, held-out examples in the order of `split_examples`.

    Raises:
      ConfigError: `held_out` is not a fraction.

    Example:
      >>> both = {code: [Example.from_pair(code, "1 + 1", "2")] for code in ("en", "fa")}
      >>> [(len(s.train), len(s.held_out), s.leaked)
      ...  for s in split_languages(both, ["en"], 0.1).values()]
      [(1, 0, 0), (0, 0, 1)]
    """
    sides = {
        language: split_examples(
            part, held_out if language in seen else 1.0, disjoint_replies=disjoint_replies
        )
        for language, part in examples.items()
    }
    return _without_leaks(sides, share)


def _without_leaks(
    sides: Mapping[str, tuple[list[Example], list[Example]]], share: Share
) -> dict[str, Split]:
    """Leave out held-out examples that are, or whose group is, among the training examples."""
    trained = share({d for train, _ in sides.values() for e in train for d in _digests(e)})
    split = {}
    for language, (train, held) in sides.items():
        clean = [e for e in held if trained.isdisjoint(_digests(e))]
        split[language] = Split(train, clean, len(held) - len(clean))
    return split


def _digests(example: Example) -> list[bytes]:
    """What names an example, and its group, among those of all languages: 16 bytes each."""
    prompt, reply = example.key
    names = [f"{len(prompt)}:{prompt}{reply}"]
    if example.group is not None:
        names.append(f"group:{example.group}")
    return [_digest(name) for name in names]


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def with_own_held_out(
    train: Mapping[str, Sequence[Example]],
    held_out: Mapping[str, Sequence[Example]],
    *,
    share: Share = alone,
) -> dict[str, Split]:
    """Put training and held-out examples together that come from sources of their own.

    Args:
      train: per seen language its distinct examples.
      held_out: per seen and unseen language its distinct examples.
      share: as in `split_languages`.

    Returns:
      Per language of `held_out` its parts, held-out examples in the order of `split_examples`,
      without those that are also trained on, in any language.

    Example:
      >>> one, two = (Example.from_pair("en", f"{n} + 1", str(n + 1)) for n in (1, 2))
      >>> with_own_held_out({"en": [one]}, {"en": [one, two]})["en"].held_out == [two]
      True
    """
    return _without_leaks(
        {code: (list(train.get(code, ())), _in_order(held)) for code, held in held_out.items()},
        share,
    )


def with_unevaluated(
    split: Mapping[str, Split],
    evaluated: Mapping[str, Sequence[Example]],
    seen: Collection[str],
    *,
    disjoint_replies: bool = False,
    share: Share = alone,
) -> dict[str, Split]:
    """Give held-out examples that are not evaluated back to training.

    Args:
      split: per language its parts.
      evaluated: per language the first of its held-out examples, which are evaluated.
      seen: the languages to train on.
      disjoint_replies: see `split_examples`.
      share: makes what all languages evaluate of what these do.

    Returns:
      The same with more to train on: what shares no prompt and no group with an example that is
      evaluated in any language, and with `disjoint_replies` no reply. What is evaluated, and the
      number of examples that are not used, is left in ``held_out``.
    """

    def names(example: Example) -> list[bytes]:
        return [_digest(key) for key in _links(example, disjoint_replies)]

    taken = share({name for part in evaluated.values() for e in part for name in names(e)})
    result = dict(split)
    for code in split.keys() & set(seen):
        first = evaluated[code]
        rest = split[code].held_out[len(first) :]
        free = [taken.isdisjoint(names(example)) for example in rest]
        back = [example for example, ok in zip(rest, free, strict=True) if ok]
        left = [example for example, ok in zip(rest, free, strict=True) if not ok]
        train = [*split[code].train, *back]
        result[code] = split[code]._replace(train=train, held_out=[*first, *left])
    return result


def _in_order(held_out: Iterable[Example]) -> list[Example]:
    """Held-out examples by their own hashes: not by their sides', which linked ones share."""
    return sorted(held_out, key=lambda example: hash_fraction("\x1e".join(example.key)))


def _links(example: Example, disjoint_replies: bool) -> list[str]:
    """What links an example with others: its side's key, its prompt, and if asked its reply."""
    keys = list(dict.fromkeys((side_key(example), example.prompt_key)))
    return [*keys, f"\x7freply:{normalise(example.reply)}"] if disjoint_replies else keys


def _linked_keys(examples: Sequence[Example], disjoint_replies: bool) -> list[str]:
    """One key per example, the same for all examples that must stay together (union-find)."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    own = []
    for example in examples:
        key, *others = _links(example, disjoint_replies)
        own.append(key)
        for other in others:
            first, second = sorted((root(key), root(other)))
            parent[second] = first  # the smallest key of a set is its name
    return [root(key) for key in own]
