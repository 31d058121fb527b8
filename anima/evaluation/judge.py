"""A model behind any OpenAI-compatible endpoint: one question, one reply. The only user of the openai client.

Owns retries, their jitter and the rate limit. The key is never printed, stored or put into an error.
"""

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import openai

from anima.errors import AnimaError, ConfigError
from anima.evaluation.reply import Reply

LONGEST_WAIT_SECONDS = 60.0
_WAIT_AND_TRY_AGAIN = (openai.RateLimitError, openai.APIConnectionError, openai.InternalServerError)


class JudgeError(AnimaError):
    """The endpoint did not answer; everything judged so far is stored."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the judge is and how it is asked.

    Attributes:
        base_url: Such as http://127.0.0.1:8000/v1; None for OpenAI's own.
        model: Its name there.
        api_key: Never shown.
        temperature: None leaves it to the endpoint (some models refuse any other).
        max_tokens: Longest reply.
        max_tokens_name: What the endpoint calls that limit.
        timeout_seconds: For one reply.
        max_retries: After the first try.
        requests_per_minute: None for no limit.
        seed: Of the private generator of the jitter.
    """

    base_url: str | None
    model: str
    api_key: str = field(repr=False)
    temperature: float | None = 0.0
    max_tokens: int = 1024
    max_tokens_name: str = "max_tokens"
    timeout_seconds: float = 120.0
    max_retries: int = 6
    requests_per_minute: float | None = None
    seed: int = 0


def endpoint_key(given: str | None, base_url: str | None, environment: Mapping[str, str]) -> str:
    """The key: the flag, else OPENAI_API_KEY, else a placeholder for a local server, which wants none.

    Raises:
        ConfigError: OpenAI's own endpoint without a key.
    """
    key = given or environment.get("OPENAI_API_KEY")
    if not key and base_url is None:
        raise ConfigError(
            "the judge has neither an endpoint nor a key",
            where="--base_url and OPENAI_API_KEY",
            fix="export OPENAI_API_KEY=…, or --base_url http://127.0.0.1:8000/v1 for a server of your own",
        )
    return key or "none"


class RateLimit:
    """Spaces calls of all threads evenly: at most so many a minute."""

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """None: no limit."""
        self._interval = 60 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        """Return when the next call may go out."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._interval
        if turn > now:
            self._sleep(turn - now)


class EndpointJudge:
    """Asks the endpoint. May be shared by threads."""

    def __init__(self, endpoint: Endpoint, sleep: Callable[[float], None] = time.sleep) -> None:
        """Nothing is sent yet."""
        self._endpoint = endpoint
        self._sleep = sleep
        self._limit = RateLimit(endpoint.requests_per_minute)
        # The tournament's own generator must not depend on how often the endpoint was busy.
        self._jitter = random.Random(endpoint.seed)
        self._client = openai.OpenAI(
            base_url=endpoint.base_url, api_key=endpoint.api_key, timeout=endpoint.timeout_seconds, max_retries=0
        )

    def ask(self, system: str, user: str) -> Reply:
        """One reply; a busy or failing endpoint is tried again with growing, jittered pauses.

        Raises:
            JudgeError: it still fails after all retries.
            ConfigError: it refuses the request (wrong key, unknown model, too long a text), or sends no completion.
        """
        for attempt in range(self._endpoint.max_retries + 1):
            self._limit.wait()
            try:
                return self._send(system, user)
            except _WAIT_AND_TRY_AGAIN as error:
                if getattr(error, "code", None) == "insufficient_quota":
                    raise self._refused(error) from None
                if attempt == self._endpoint.max_retries:
                    raise JudgeError(
                        "the judge does not answer",
                        where=self._endpoint.base_url or "OpenAI's endpoint",
                        got=self._without_key(error),
                        allowed=f"a reply after at most {self._endpoint.max_retries} retries",
                        fix="start the server or wait, and type the same command again: nothing is judged twice",
                    ) from None
                self._sleep(self._pause(attempt, error))
            except (openai.APIStatusError, ValueError) as error:  # ValueError: a body that is no JSON
                raise self._refused(error) from None
        raise AssertionError("the loop returns or raises")

    def _send(self, system: str, user: str) -> Reply:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        body: dict[str, object] = {self._endpoint.max_tokens_name: self._endpoint.max_tokens}
        if self._endpoint.temperature is not None:
            body["temperature"] = self._endpoint.temperature
        reply = self._client.chat.completions.create(
            model=self._endpoint.model,
            messages=messages,  # type: ignore[arg-type]  # plain dicts of the two roles
            extra_body=body,
        )
        # The client checks no reply: a page of some other server arrives as text, an error under status 200 as nothing.
        choices = getattr(reply, "choices", None)
        if not choices or choices[0].message is None:
            raise ValueError(f"a reply without a choice: {str(reply)[:200]}")
        usage = reply.usage
        return Reply(
            choices[0].message.content or "",
            (usage.prompt_tokens if usage else 0) or 0,
            (usage.completion_tokens if usage else 0) or 0,
            choices[0].finish_reason or "",
        )

    def _pause(self, attempt: int, error: Exception) -> float:
        """Seconds: what the endpoint asks for, or 1, 2, 4 … up to a minute, times a random 0.5 to 1."""
        response = getattr(error, "response", None)
        asked = response.headers.get("retry-after", "") if response is not None else ""
        try:
            least = float(asked)
        except ValueError:
            least = 0.0
        return max(least, min(LONGEST_WAIT_SECONDS, 2.0**attempt) * self._jitter.uniform(0.5, 1.0))

    def _refused(self, error: Exception) -> ConfigError:
        return ConfigError(
            "the judge's endpoint sends no chat completion"
            if isinstance(error, ValueError)
            else "the judge's endpoint refuses the request",
            where=self._endpoint.base_url or "OpenAI's endpoint",
            got=self._without_key(error),
            fix="check --judge_model, the key and --base_url (most end in /v1); some models want "
            "--max_tokens_name max_completion_tokens or --temperature None",
        )

    def _without_key(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        return (text.replace(self._endpoint.api_key, "(the key)") if self._endpoint.api_key else text)[:500]
