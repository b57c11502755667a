"""The command ``jaxmoo``, as ``python -m jaxmoo``."""

from jaxmoo.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())
