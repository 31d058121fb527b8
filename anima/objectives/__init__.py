"""What is minimised: objective (protocol), token_logps, sft, dpo (each file imports only earlier ones).

Pure functions of tensors; knows no ranks, no optimizer, no peft.
"""
