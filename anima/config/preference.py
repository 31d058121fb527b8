"""The options of preference training (`--objective dpo`): which loss, how strong, against which reference.

Every option without effect on the chosen loss is refused, so that none is silently ignored.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from anima.config.checks import require

ConversationFormat = Literal[
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "input_output",
    "chip2",
    "oasst1",
    "text",
    "alpaca_clean",
    "self_instruct",
    "long_data",
    "hh_rlhf_chosen",
]
PairFormat = Literal["preference", "sharegpt_preference", "hh_rlhf", "alpaca_preference"]
LossType = Literal["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo"]

REFERENCE_FREE = ("simpo", "orpo")
"""Losses that compare the policy with nothing."""
ADAPTER_PREFIX = "adapter:"


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Preference training: the loss over pairs and its reference; only with --objective dpo."""

    loss_type: LossType = "sigmoid"
    """Loss of a pair: sigmoid is DPO (cDPO with label_smoothing); ipo, hinge (SLiC), robust; simpo and orpo need
    no reference."""
    beta: float = 0.1
    """Strength of the reference (of the odds ratio for orpo), 1 / nats: the larger, the closer to it one stays."""
    label_smoothing: float = 0.0
    """Assumed share of pairs with chosen and rejected exchanged, for sigmoid and robust."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood added to the loss (RPO)."""
    length_normalize: bool = False
    """Divide log-probabilities by the answer's tokens before they are compared (simpo and orpo always do)."""
    simpo_gamma: float = 0.5
    """Reward margin that simpo asks for."""
    reference: str = "auto"
    """What the policy is compared with: base, adapter:FOLDER, none, or auto: the adapter that training starts from,
    else the base."""
    reference_cache_dir: str = "~/.cache/anima/reference"
    """Folder for the reference's log-probabilities, keyed by everything they depend on."""

    def __post_init__(self) -> None:
        require(self.beta > 0, "a loss without strength", "beta", self.beta, "> 0")
        require(
            0 <= self.label_smoothing < 0.5,
            "more than half of the labels cannot be wrong",
            "label_smoothing",
            self.label_smoothing,
            "0 <= x < 0.5",
        )
        require(self.sft_weight >= 0, "a weight cannot be negative", "sft_weight", self.sft_weight, ">= 0")
        require(self.simpo_gamma >= 0, "a margin cannot be negative", "simpo_gamma", self.simpo_gamma, ">= 0")
        self._check_effects()
        known = self.reference in ("auto", "base", "none") or self.reference.startswith(ADAPTER_PREFIX)
        require(
            known and self.reference != ADAPTER_PREFIX,
            "no such reference",
            "reference",
            self.reference,
            "auto, base, adapter:FOLDER or none",
        )
        require(
            self.loss_type not in REFERENCE_FREE or self.reference in ("auto", "none"),
            f"{self.loss_type} has no reference",
            "reference",
            self.reference,
            "auto or none with this --loss_type",
        )

    def _check_effects(self) -> None:
        """Every option that was changed must matter for the chosen loss."""
        kind = self.loss_type
        require(
            self.label_smoothing == 0 or kind in ("sigmoid", "robust"),
            f"--label_smoothing has no effect on {kind}",
            "label_smoothing",
            self.label_smoothing,
            "0, or --loss_type sigmoid or robust",
        )
        require(
            kind != "robust" or self.label_smoothing > 0,
            "robust without wrong labels is sigmoid",
            "label_smoothing",
            self.label_smoothing,
            "0 < x < 0.5 with --loss_type robust",
        )
        require(
            self.sft_weight == 0 or kind != "orpo",
            "orpo holds the SFT term already",
            "sft_weight",
            self.sft_weight,
            "0 with --loss_type orpo",
        )
        require(
            not self.length_normalize or kind not in REFERENCE_FREE,
            f"{kind} divides by the answer's tokens already",
            "length_normalize",
            self.length_normalize,
            "False with this --loss_type",
        )
        require(
            self.simpo_gamma == PreferenceConfig.simpo_gamma or kind == "simpo",
            f"--simpo_gamma has no effect on {kind}",
            "simpo_gamma",
            self.simpo_gamma,
            "the default, or --loss_type simpo",
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with another model."""
        return self.loss_type not in REFERENCE_FREE and self.reference != "none"

    @property
    def reference_adapter(self) -> str | None:
        """The folder in adapter:FOLDER; None otherwise."""
        named = self.reference.startswith(ADAPTER_PREFIX)
        return self.reference.removeprefix(ADAPTER_PREFIX) if named else None

    def changed(self) -> list[str]:
        """Names of the options that differ from their defaults; a folder of the machine is none that anyone chose."""
        options = [item for item in fields(self) if item.name != "reference_cache_dir"]
        return [item.name for item in options if getattr(self, item.name) != item.default]


def check_objective(
    objective: str,
    preference: PreferenceConfig,
    *,
    longest: int,
    micro_batch_tokens: int,
    dataset_format: str,
    train_on: str,
) -> None:
    """Refuse options that do not go with the objective.

    Args:
        objective: sft or dpo.
        preference: Its options; they must be the defaults for sft.
        longest: Longest sequence, tokens; a pair has two.
        micro_batch_tokens: Tokens of a micro-batch, at most; 0 is not known yet.
        dataset_format: Layout of the rows.
        train_on: Tokens that carry the loss.

    Raises:
        ConfigError: an option has no effect, or the two contradict each other.
    """
    pairs = objective == "dpo"
    needed, unit = (2 * longest, "pair") if pairs else (longest, "sequence")
    require(
        needed <= micro_batch_tokens or micro_batch_tokens == 0,
        f"a {unit} of {needed} tokens does not fit into a micro-batch",
        "micro_batch_tokens",
        micro_batch_tokens,
        f"{needed} or more, or a smaller --max_seq_length",
    )
    layouts = get_args(PairFormat if pairs else ConversationFormat)
    require(
        dataset_format in ("auto", *layouts),
        f"rows of this layout are not what --objective {objective} trains on",
        "dataset_format",
        dataset_format,
        f"{', '.join(('auto', *layouts))} with this objective",
    )
    if not pairs:
        for name in preference.changed():
            require(
                False,
                f"--{name} has no effect on --objective {objective}",
                name,
                getattr(preference, name),
                "the default, or --objective dpo",
            )
        return
    require(
        train_on == "assistant",
        "of a pair only the answers carry loss",
        "train_on",
        train_on,
        "assistant with --objective dpo",
    )
