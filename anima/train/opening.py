"""Opens a run's folder and trackers: afresh, or where a checkpoint left them. Rank 0 acts, every rank learns of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from anima import distributed
from anima.config.cli import write_config
from anima.config.schema import Config
from anima.distributed import Ranks
from anima.tracking.metrics_file import rewind
from anima.tracking.tracker import NullTracker, Tracker, start_tracker
from anima.train import resume, run_folder
from anima.train.run import Identity, Origin


@dataclass
class Opened:
    """A run that may begin.

    Attributes:
        origin: Checkpoint to go on from; None for a fresh start.
        notices: What a person should know about that choice.
        tracker: Of this rank.
        lock: Keeps other processes out of the folder while it is open.
    """

    origin: Origin | None = None
    notices: tuple[str, ...] = ()
    tracker: Tracker = field(default_factory=NullTracker)
    lock: IO[str] | None = None


def open_run(config: Config, ranks: Ranks, identity: Identity) -> Opened:
    """Choose the checkpoint, check that this run may go on from it, claim the folder, start the trackers. A collective.

    Args:
        config: The run's config.
        ranks: This process among the others.
        identity: This run; base_fingerprint is not known yet and empty.

    Raises:
        CheckpointError: nothing that can be resumed, or another process holds the folder.
        TrackingError: a tracker does not start.
    """
    opened = Opened()

    def act() -> tuple[Origin | None, tuple[str, ...]]:
        opened.lock = run_folder.claim(config.output.output_dir)
        origin, notices = resume.choose(config)
        if origin is not None:
            notices += tuple(resume.check_config(origin, identity.config, config.allow_changed))
            notices += tuple(resume.check_identity(origin, identity, config.allow_changed))
        output_dir = Path(config.output.output_dir)
        continues = origin is not None and origin.continues
        step = origin.step if origin is not None and continues else -1
        latest = rewind(output_dir, step) if config.resume != "never" else -1
        run_id = origin.state["tracker_run_id"] if origin is not None and continues else None
        opened.tracker = start_tracker(
            config.output,
            resolved_config=config.flat(),
            is_main=True,
            run_id=run_id,
            logged_until=-1 if run_id is None else latest,
        )
        write_config(config, output_dir / run_folder.CONFIG)
        return origin, notices

    opened.origin, opened.notices = distributed.decided_by_main(ranks, act)
    return opened
