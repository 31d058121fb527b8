"""The network: console, compute, gguf, tokenizer, attention, recompute, kernels, base_model, fp8_kernels,
fp8, qlora_linear, lora, packed.

Each file imports only earlier ones. Owns transformers, bitsandbytes' NF4 and peft; knows nothing of data, losses or
training.
"""
