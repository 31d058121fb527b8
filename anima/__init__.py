"""Anima: QLoRA fine-tuning of models that do not fit, with SFT and DPO under DeepSpeed ZeRO-2."""

__version__ = "0.1.0"
