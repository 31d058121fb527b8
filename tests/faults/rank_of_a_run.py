"""Body of one rank of the fixture `ranks`: launch/train.py in a process whose libraries are imported already.

Not a test. The fork server that these processes come from saves ten seconds of imports a launch; all else is real.
"""

import importlib.util
import os
import sys
from typing import Any


def main(task: dict[str, Any]) -> None:
    """Become the rank: environment, output into a file, then the script as a launcher starts it."""
    log = os.open(task["LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(task["REPOSITORY"])
    os.environ.update(task["ENVIRONMENT"])
    sys.argv = ["launch/train.py", *task["ARGV"]]
    spec = importlib.util.spec_from_file_location("launch_train", f"{task['REPOSITORY']}/launch/train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch_train"] = module
    spec.loader.exec_module(module)
    module.run_command(module.main)


if __name__ == "__rank__":
    main(globals())
