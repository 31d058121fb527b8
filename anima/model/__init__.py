"""The network: console, compute, new_folder, gguf, tokenizer, weights, nf4_kernels, nf4, shared_keys,
attention_kernels, attention, host_memory, offload, recompute, agreement, cublaslt, fp8_kernels, row_kernels, fp8,
fp8_rows, qlora_linear, lora_layers, kernels, fused_layer, base_model, stored_base, prequantize, lora, adapters,
packed, replay, decoding, stored_adapter, merge.

Each file imports only earlier ones. Owns transformers, bitsandbytes' NF4 and peft; knows nothing of data, losses or
training.
"""
