"""Prepare a file in a process of its own: argv is the data file, the cache folder, seconds to wait per batch.

Prints "built" or "reused" and the fingerprint. The tokenizer is a few lines, so that the process starts fast.
"""

import json
import sys
import time
from typing import Any

from anima.config.schema import DataConfig
from anima.data.prepare import prepare


class Special:
    """A control token."""

    content, special = "</s>", True


class Letters:
    """One token a character; `delay` seconds a call."""

    chat_template = bos_token = None
    eos_token = "</s>"
    is_fast = False

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.added_tokens_decoder = {0: Special()}

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        time.sleep(self.delay if len(texts) > 4 else 0)
        marked = [text.replace("</s>", "\x00") for text in texts]
        return {"input_ids": [[ord(letter) for letter in text] for text in marked]}

    def convert_tokens_to_ids(self, token: str) -> int:
        """The only name asked for is that of the control token."""
        return 0

    def get_vocab(self) -> dict[str, int]:
        """Enough to tell it apart."""
        return {"</s>": 0}


if __name__ == "__main__":
    path, cache, delay = sys.argv[1:]
    config = DataConfig(train_files=(path,), data_cache_dir=cache)
    data = prepare(config, Letters(float(delay)), seed=1)  # type: ignore[arg-type]
    print(json.dumps([data.report.train_cache.reused, data.train.fingerprint, len(data.train)]))
