"""The network: console, compute, new_folder, gguf, tokenizer, weights, nf4, attention, recompute, kernels, base_model,
stored_base, prequantize, fp8_kernels, fp8, qlora_linear, lora_layers, lora, adapters, packed, stored_adapter,
merge.

Each file imports only earlier ones. Owns transformers, bitsandbytes' NF4 and peft; knows nothing of data, losses or
training.
"""
