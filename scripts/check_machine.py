"""Checks what installation needs, one line per problem. Runs under any Python 3."""

import importlib.util
import shutil
import sys

MIN_FREE_GB = 8
problems = []
if sys.version_info < (3, 11):  # noqa: UP036
    problems.append(
        "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=/path/to/python3.11"  # noqa: UP031
        % sys.version_info[:2]
    )
if importlib.util.find_spec("ensurepip") is None:
    problems.append("Python's ensurepip is missing: apt-get install python3-venv")
free_gb = shutil.disk_usage(".").free / 1e9
if free_gb < MIN_FREE_GB:
    problems.append(
        "%d GB of free disk space are needed, %.1f GB are left" % (MIN_FREE_GB, free_gb)  # noqa: UP031
    )
for problem in problems:
    sys.stderr.write("error: " + problem + "\n")
sys.exit(bool(problems))
