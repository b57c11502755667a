"""Chat templates that read the clock, held to one date."""

from __future__ import annotations

import datetime
import string

__all__ = ["at_date", "reads_clock"]

_CLOCK = "strftime_now"
_SIGN = "\ue000"


def reads_clock(template: str) -> bool:
    """Whether what a chat template writes depends on the time at which it is used.

    Example:
      >>> reads_clock("Today is {{ strftime_now('%d %b %Y') }}.")
      True
    """
    return _CLOCK in template


def at_date(template: str, date: datetime.date) -> str:
    """Return a chat template that does the same as another on one date, at midnight, for ever.

    Args:
      template: a template that reads the clock as templates do in transformers, by
        ``strftime_now(format)``; any other comes back unchanged.
      date: the date.

    Example:
      >>> import jinja2
      >>> fixed = at_date("{{ strftime_now('%d %b %Y') }}", datetime.date(2026, 7, 26))
      >>> jinja2.Template(fixed).render()
      '26 Jul 2026'
    """
    if not reads_clock(template):
        return template
    midnight = datetime.datetime.combine(date, datetime.time())
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
    known = {one: midnight.strftime(one) for one in directives}
    steps = {"%%": _SIGN, **{one: text for one, text in known.items() if text != one}, _SIGN: "%"}
    replaced = "".join(f"|replace({a!r}, {b!r})" for a, b in steps.items())
    # Before the first line, so that lines keep their numbers; on a line of its own where the
    # template begins with white space, which Jinja treats by what stands before it.
    space = "\n" if template[:1].isspace() else ""
    macro = f"{{% macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
    return f"{macro}{space}{template}"
