"""Body of one process of the fixture `run_ranks`; conftest.py runs this file with the upper-case names filled in.

Not a test. It joins the process group, calls the function, reports, and always leaves the group.
"""

import importlib.util
import os
import pickle
import sys
import traceback
from datetime import timedelta
from typing import Any


def find_function(source: str, name: str) -> Any:
    """The function `name` of the file `source`, which need not be importable by name."""
    spec = importlib.util.spec_from_file_location("tests_of_this_rank", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def main(task: dict[str, Any]) -> None:
    """Join, call, report `(rank, failed, payload)`, leave."""
    rank, world_size = task["RANK"], task["WORLD_SIZE"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(task["PORT"]))
    import torch.distributed as dist

    try:
        function = find_function(task["SOURCE"], task["NAME"])
        dist.init_process_group(
            "gloo",
            init_method=f"file://{task['STORE']}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        # Plain pickle copies tensors; the queue's own would share their memory, which ends with this process.
        task["REPORTS"].put((rank, False, pickle.dumps(function(*task["ARGS"]))))
    except BaseException:
        task["REPORTS"].put((rank, True, traceback.format_exc()))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__rank__":
    main(globals())
