"""Print the lowest versions that pyproject.toml allows, as constraints for pip.

    python .ci/lowest.py train eval > lowest.txt
    python -m pip install -c lowest.txt '.[train,eval]'
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
for requirement in wanted:
    bound = re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", requirement)
    if bound:
        print("{}=={}".format(*bound.groups()))
