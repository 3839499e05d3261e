"""Says in one line each what this machine lacks, before anything is installed. Runs under any Python 3."""

import importlib.util
import shutil
import sys

GIGABYTES = 8
problems = []
if sys.version_info < (3, 11):  # noqa: UP036
    problems.append(
        "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=/path/to/python3.11"  # noqa: UP031
        % sys.version_info[:2]
    )
if importlib.util.find_spec("ensurepip") is None:
    problems.append("Python's ensurepip is missing: apt-get install python3-venv")
free = shutil.disk_usage(".").free / 1e9
if free < GIGABYTES:
    problems.append("%d GB of free disk are needed, %.1f GB are left here" % (GIGABYTES, free))  # noqa: UP031
for problem in problems:
    sys.stderr.write("error: " + problem + "\n")
sys.exit(bool(problems))
