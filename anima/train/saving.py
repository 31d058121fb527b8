"""What a checkpoint holds, and how it gets to disk while training goes on.

adapter_*.…             the adapter in plain PEFT form, tokenizer and record: the caller's
optimizer.safetensors   masters and moments, unsharded (optimizer_state.py)
ranks.safetensors       of every rank: random state, sums since the last line of metrics
trainer_state.json      step (which is the position in the data and the schedule), history, identity, layout
"""

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anima import distributed
from anima.train import checkpoint, optimizer_state
from anima.train.meter import History, Meter
from anima.train.run import Run

FORMAT = 1
STATE, OPTIMIZER, RANKS = "trainer_state.json", "optimizer.safetensors", "ranks.safetensors"


def snapshot(run: Run, step: int, history: History, meter: Meter) -> Callable[[Path], None] | None:
    """Copy everything that training would change to host memory, and return what writes it, on rank 0. A collective.

    None, on every rank, if the adapter gives a loss that is not finite: then there is nothing worth keeping.
    """
    loss = probe_loss(run)
    if not math.isfinite(loss):
        return None
    groups = run.engine.export_optimizer()
    mine = {f"random.{name}": value for name, value in random_state(run.engine.device).items()}
    mine |= {f"meter.{name}": value for name, value in meter.export().items()}
    ranks = distributed.gather_objects(mine)
    if not run.engine.ranks.is_main:
        return _nothing
    write_adapter = run.adapter_writer()
    tensors, notes = optimizer_state.to_files(groups)
    state = {
        "format": FORMAT,
        "step": step,
        "num_steps": run.num_steps,
        "tracker_run_id": run.tracker.run_id,
        "probe_loss": loss,
        "identity": vars(run.identity),
        "history": history.to_json(),
        "optimizer": notes,
    }
    text = json.dumps(state, indent=1, ensure_ascii=False, allow_nan=False)

    def write(folder: Path) -> None:
        write_adapter(folder)
        checkpoint.write_tensors(folder / OPTIMIZER, tensors)
        by_rank = {f"{rank}.{name}": value for rank, values in enumerate(ranks) for name, value in values.items()}
        checkpoint.write_tensors(folder / RANKS, by_rank)
        (folder / STATE).write_text(text + "\n", encoding="utf-8")

    return write


def _nothing(folder: Path) -> None:
    raise AssertionError(f"only rank 0 writes {folder}")


def probe_loss(run: Run) -> float:
    """Loss of the probe micro-batch without dropout, the same on every rank; leaves everything as it was."""
    run.engine.eval_mode()
    with torch.no_grad():
        output = run.objective(run.engine, run.steps.probe().to(run.engine.device))
    run.engine.train_mode()
    loss = output.metrics["loss"]
    return float(loss.total.double() / loss.count.double())


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch, on the host and on the device: nothing else draws numbers while training."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on where `random_state` was."""
    torch.set_rng_state(state["cpu"].clone())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].clone(), device)


class Saver:
    """Writes one checkpoint at a time in a thread of its own, on rank 0.

    A failed one is reported and forgotten: the next is written at the next interval, older ones stay.

    Args:
        root: The run's checkpoints/ folder.
        keep: Newest checkpoints to keep, beside the best.
        say: Where messages go.

    Attributes:
        last_good: Newest checkpoint known to be whole.
        seconds: Longest time a checkpoint took, copying and writing.
    """

    def __init__(self, root: Path, *, keep: int, say: Callable[[str], None]) -> None:
        """Nothing is written yet."""
        self.last_good: Path | None = None
        self.seconds = 0.0
        self._root, self._keep, self._say = root, keep, say
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._news: list[str] = []

    def start(self, step: int, write: Callable[[Path], None], score: float | None, began: float) -> None:
        """Write a checkpoint beside the training.

        Args:
            step: Optimizer step.
            write: From `snapshot`.
            score: Held-out loss at this step, if measured.
            began: time.perf_counter() before the snapshot.
        """
        self.wait()
        blocked = time.perf_counter() - began
        arguments = (step, write, score, began, blocked)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def report(self) -> None:
        """Tell what has happened since the last call; a programming error in the thread is raised here."""
        while self._news:
            self._say(self._news.pop(0))
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Until nothing is being written; then report."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.report()

    def _write(
        self, step: int, write: Callable[[Path], None], score: float | None, began: float, blocked: float
    ) -> None:
        try:
            folder = checkpoint.commit(self._root, step, write, keep=self._keep, score=score)
            size = checkpoint.folder_bytes(folder)
        except OSError as error:
            still = f"; {self.last_good} stays" if self.last_good else ""
            self._news.append(
                f"step {step}: NOT SAVED: {error}{still}; training goes on, the next try is at the next --save_steps"
            )
            return
        except BaseException as error:  # noqa: BLE001  (raised again in the main thread)
            self._failure = error
            return
        self.last_good = folder
        seconds = time.perf_counter() - began
        self.seconds = max(self.seconds, seconds)
        self._news.append(
            f"step {step}: saved {folder} ({size / 2**20:.1f} MiB in {seconds:.1f} s, "
            f"for {blocked:.2f} s of which training stood still)"
        )


def state_of(folder: Path) -> dict[str, Any]:
    """The trainer_state.json of a checkpoint.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object of this format.
    """
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{STATE} is not of format {FORMAT}")
    return state
