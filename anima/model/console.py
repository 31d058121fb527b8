"""What the libraries may say on the terminal: their errors, and one progress bar where a person watches."""

import logging
import warnings

import transformers


def quiet_libraries(*, show_progress: bool) -> None:
    """Silence advice that our users can do nothing about; errors stay.

    Args:
        show_progress: Whether loading a model may draw its progress bar.
    """
    transformers.logging.set_verbosity_error()
    if not show_progress:
        transformers.logging.disable_progress_bar()
    for name in ("DeepSpeed", "bitsandbytes", "peft", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch|bitsandbytes)\b")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\b")
    # Said by the run itself, in the line that names the optimizer.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU", category=UserWarning)
