"""The one place that knows which objectives there are."""

from anima.config.schema import Config
from anima.train.method import Method, Supervised
from anima.train.preference import Preference


def choose_method(config: Config) -> Method:
    """What `--objective` names.

    Raises:
        ModelError: an adapter that it needs lacks files.
    """
    return Preference(config) if config.objective == "dpo" else Supervised()
