"""Lines on the terminal while answers and verdicts come in."""

from anima.evaluation.reply import Reply
from anima.evaluation.verdict_text import Reading

MAX_LINES = 20


class Progress:
    """A line for every twentieth of the work, and at the end."""

    def __init__(self, total: int, done_word: str) -> None:
        """Nothing is printed yet."""
        self._total, self._word = total, done_word
        self._every = max(1, -(-total // MAX_LINES))
        self._done = self._unparsable = self._printed = 0

    def reach(self, done: int) -> None:
        """So many are done in all."""
        self._done = done
        if done - self._printed >= self._every or done == self._total:
            self._printed = done
            unparsable = f", {self._unparsable:,} unparsable" if self._unparsable else ""
            print(f"  {done:,} of {self._total:,} {self._word}{unparsable}", flush=True)

    def read(self, reply: Reply, reading: Reading) -> None:
        """One more verdict came; a reply that was cut off at the limit often has none."""
        self._unparsable += reading.outcome is None
        self.reach(self._done + 1)
