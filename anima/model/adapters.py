"""Several adapters over one frozen base, one in force at a time, or none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from anima.errors import ModelError
from anima.model.lora import use_fused_layers


class Adapters:
    """A model that speaks through any of its adapters."""

    def __init__(self, base: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        """Put the adapters of `folders`, checked and by name, beside the layers of `base`; nothing is trainable.

        Raises:
            ModelError: an adapter's matrices do not fit the model.
        """
        self._base = base
        self._adapted: PeftModel | None = None
        # PEFT makes its names parts of a module's, where a dot or a word such as "update" cannot stand.
        self._inner = {name: f"adapter_{number}" for number, name in enumerate(folders)}
        for name, folder in folders.items():
            try:
                self._load(self._inner[name], folder)
            except (RuntimeError, ValueError) as error:
                raise ModelError(
                    "the adapter does not fit the model",
                    where=folder,
                    got=str(error).strip().splitlines()[0],
                    fix="use the base model that anima.json names",
                ) from error
        if self._adapted is not None:
            for parameter in self._adapted.parameters():
                parameter.requires_grad_(False)
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(base.dtype)
            self._adapted.eval()

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model; what it computes depends on who is speaking."""
        return self._base if self._adapted is None else cast(PreTrainedModel, self._adapted.get_base_model())

    @contextmanager
    def speaking(self, name: str | None) -> Iterator[PreTrainedModel]:
        """The model with one adapter in force; None for the base alone."""
        if self._adapted is None or name is None:
            if self._adapted is None:
                yield self.model
                return
            with self._adapted.disable_adapter():
                yield self.model
            return
        self._adapted.set_adapter(self._inner[name], inference_mode=True)
        yield self.model

    def _load(self, name: str, folder: Path) -> None:
        if self._adapted is None:
            config = PeftConfig.from_pretrained(str(folder))
            use_fused_layers(config)  # answers are computed as the training was
            self._adapted = PeftModel.from_pretrained(
                self._base, str(folder), adapter_name=name, config=config, autocast_adapter_dtype=False
            )
        else:
            self._adapted.load_adapter(str(folder), adapter_name=name, autocast_adapter_dtype=False)
