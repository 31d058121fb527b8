"""What is minimised: objective (protocol), token_logps, sft, dpo, preference, reference.

Each file imports only earlier ones. Functions of tensors, and the cache of what a reference said; knows no ranks, no
optimizer, no peft.
"""
