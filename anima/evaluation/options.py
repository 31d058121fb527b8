"""The flags of launch/arena.py, one dataclass a verb. Knows nothing of what the verbs do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from anima.config.checks import require
from anima.errors import ConfigError
from anima.evaluation.questions import QuestionField
from anima.evaluation.ratings import Method

if TYPE_CHECKING:
    from anima.evaluation.judge import Endpoint


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Where the model is that judges or translates."""

    judge_model: str | None = None
    """The model's name at the endpoint; else the environment's ANIMA_JUDGE_MODEL."""
    base_url: str | None = None
    """OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; else OPENAI_BASE_URL, else OpenAI's own."""
    api_key: str | None = field(default=None, repr=False)
    """Key of the endpoint; better in the environment's OPENAI_API_KEY, where no process list shows it."""
    temperature: float | None = 0.0
    """Of the replies; None leaves it to the endpoint."""
    max_tokens: int = 1024
    """Longest reply, tokens."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls that limit."""
    concurrency: int = 8
    """Calls at a time."""
    requests_per_minute: float | None = None
    """Most calls a minute; None for no limit."""
    max_retries: int = 6
    """Tries after the first when the endpoint is busy or down; pauses double up to a minute, with jitter."""
    timeout_seconds: float = 120.0
    """Longest wait for one reply, seconds."""
    price_input: float = 0.0
    """Price of a million tokens that are sent."""
    price_output: float = 0.0
    """Price of a million tokens that come back."""

    def __post_init__(self) -> None:
        require(self.concurrency >= 1, "no call at a time", "concurrency", self.concurrency, "1 or more")
        require(self.max_tokens >= 1, "no room for a reply", "max_tokens", self.max_tokens, "1 or more")
        require(self.max_retries >= 0, "a negative number", "max_retries", self.max_retries, "0 or more")
        limit = self.requests_per_minute
        require(limit is None or limit > 0, "no call would go out", "requests_per_minute", limit, "above 0, or None")
        require(self.timeout_seconds > 0, "no time to reply", "timeout_seconds", self.timeout_seconds, "above 0")

    def endpoint(self, environment: Mapping[str, str], seed: int) -> "Endpoint":
        """The endpoint with what the environment adds.

        Raises:
            ConfigError: no model's name, or no key for OpenAI's own endpoint.
        """
        from anima.evaluation.judge import Endpoint, endpoint_key  # here, because rating needs no client

        model = self.judge_model or environment.get("ANIMA_JUDGE_MODEL")
        if not model:
            raise ConfigError(
                "the judge's model is not named",
                where="--judge_model",
                allowed="a model's name at the endpoint",
                fix="--judge_model NAME, or export ANIMA_JUDGE_MODEL=NAME",
            )
        base_url = self.base_url or environment.get("OPENAI_BASE_URL")
        if base_url is not None and not _is_url(base_url):
            raise ConfigError("no URL", where="--base_url", got=base_url, allowed="http://… or https://…")
        return Endpoint(
            base_url=base_url,
            model=model,
            api_key=endpoint_key(self.api_key, base_url, environment),
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            max_tokens_name=self.max_tokens_name,
            timeout_seconds=self.timeout_seconds,
            max_retries=self.max_retries,
            requests_per_minute=self.requests_per_minute,
            seed=seed,
        )


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


@dataclass(frozen=True, kw_only=True)
class AnswersOptions:
    """Let contestants answer the questions."""

    arena: str
    """Folder of the tournament."""
    questions: str
    """Question set: JSON list or JSON lines with question_id, text, category and maybe translation."""
    contestants: tuple[str, ...] = ()
    """NAME=ADAPTER_FOLDER, base:NAME=MODEL_FOLDER or file:NAME=ANSWERS.jsonl (question_id, answer)."""
    run: tuple[str, ...] = ()
    """Run folders: their base and their adapters take part as base, sft, dpo."""
    previous: str | None = None
    """Folder of an earlier arena whose best rated adapter takes part as previous-best."""
    prefix: tuple[str, ...] = ()
    """NAME=TEXT put before every question of this one contestant; reported, because it is an advantage."""
    question_field: QuestionField = "text"
    """Which words are asked."""
    num_questions: int | None = None
    """Only the first so many questions; None for all."""
    max_new_tokens: int = 512
    """Longest answer, tokens."""
    batch_size: int = 8
    """Questions at a time."""
    quantization: Literal["nf4", "none"] = "nf4"
    """Storage of bases given as base:NAME; adapters run on what they were trained on."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "an empty batch", "batch_size", self.batch_size, "1 or more")
        require(self.max_new_tokens >= 1, "an empty answer", "max_new_tokens", self.max_new_tokens, "1 or more")
        number = self.num_questions
        require(number is None or number >= 1, "no question", "num_questions", number, "1 or more, or None")


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Have pairs of answers judged, always in both orders."""

    arena: str
    """Folder of the tournament."""
    endpoint: EndpointOptions = field(default_factory=EndpointOptions)
    judge_prompts: str = "choice"
    """choice or scores (1 to 10), both by category; threeclass (one prompt for all); or a file of prompts."""
    schedule: Literal["all", "balanced", "adaptive"] = "all"
    """All battles; the same number for every pair; or first that, then where neighbours are not yet told apart."""
    battles_per_pair: int = 20
    """balanced: battles of every pair; adaptive: those of the start."""
    battles_per_round: int = 10
    """adaptive: most battles of a pair before ratings are fitted again."""
    max_battles: int | None = None
    """adaptive: stop after so many battles in all."""
    max_cost: float | None = None
    """Refuse to start, or to go on, if the estimate is above this; in the currency of the prices."""
    seed: int = 0
    """Of the schedule and of the pauses' jitter, which share no generator."""
    dry_run: bool = field(default=False, metadata={"bare": "True"})
    """Print the estimate and stop."""

    def __post_init__(self) -> None:
        for name in ("battles_per_pair", "battles_per_round"):
            require(getattr(self, name) >= 1, "no battle", name, getattr(self, name), "1 or more")


@dataclass(frozen=True, kw_only=True)
class RateOptions:
    """Rate an arena, or any file of matches."""

    arena: str | None = None
    """Folder of the tournament; ratings.json and matches.jsonl are written there."""
    matches: str | None = None
    """Instead: JSON lines with model_a, model_b, winner (model_a, model_b, tie) and optional question_id, category,
    position, judge, length_a, length_b."""
    method: Method = "all"
    """bradley_terry, elo_orderings (the mean over random orders), elo (one order), or all."""
    json: str | None = None
    """Where to write the result as JSON as well."""
    orders: Literal["separate", "merged"] = "separate"
    """What ratings are fitted to. separate: every verdict is a match (of an arena only battles with both orders), and
    both orders are resampled together. merged: a battle is one match, won only if both orders agree, else a tie."""
    judge: str | None = None
    """Only the verdicts of this judge."""
    k: float = 32.0
    """Elo's K."""
    scale: float = 400.0
    """Elo points that make the odds of winning `base` to 1."""
    base: float = 10.0
    """See scale."""
    start: float = 1000.0
    """Elo before the first match."""
    start_ratings: tuple[str, ...] = ()
    """NAME=RATING of models that start elsewhere, for Elo in one order: continues a recorded tournament."""
    num_orderings: int = 10_000
    """Random orders of the matches."""
    num_bootstrap: int = 1000
    """Resampled fits for the intervals."""
    seed: int = 0
    """Of the orders and the resampling."""

    def __post_init__(self) -> None:
        one = (self.arena is None) != (self.matches is None)
        require(one, "one of the two is rated", "arena or --matches", [self.arena, self.matches], "exactly one")
        require(self.num_orderings >= 1, "no order", "num_orderings", self.num_orderings, "1 or more")
        require(self.num_bootstrap >= 2, "no interval", "num_bootstrap", self.num_bootstrap, "2 or more")
        require(self.scale > 0, "the scale is positive", "scale", self.scale, "above 0")
        require(self.base > 1, "the base is above 1", "base", self.base, "above 1")
        used = not self.start_ratings or self.method in ("elo", "all")
        require(used, "this method starts nowhere", "start_ratings", self.start_ratings, "with --method elo or all")

    def started(self) -> dict[str, float]:
        """Start ratings by model.

        Raises:
            ConfigError: not NAME=NUMBER.
        """
        ratings = {}
        for entry in self.start_ratings:
            name, _, value = entry.rpartition("=")
            try:
                ratings[name] = float(value)
            except ValueError:
                name = ""
            require(bool(name), "no start rating", "start_ratings", entry, "NAME=NUMBER")
        return ratings


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Show ratings on the terminal and write them with all battles as one HTML page."""

    arena: str
    """Folder of the tournament."""
    html: str | None = None
    """Where to write the page; None for report.html in the folder."""
    price_input: float = 0.0
    """Price of a million tokens that were sent."""
    price_output: float = 0.0
    """Price of a million tokens that came back."""


@dataclass(frozen=True, kw_only=True)
class TranslateOptions:
    """Translate a question set; the questions are asked in that language with --question_field translation."""

    arena: str
    """Folder of the tournament, which remembers translations."""
    questions: str
    """Question set to translate."""
    output: str
    """Where to write the set with its translations, as a JSON list."""
    language: str = "Simplified Chinese"
    """Its name in English."""
    endpoint: EndpointOptions = field(default_factory=EndpointOptions)
    seed: int = 0
    """Of the pauses' jitter."""
