"""Training: run_folder, schedule, optimizer, engine, metrics, step, checkpoint, evaluate, trainer, results.

Each file imports only earlier ones. Does not know which objective runs, how rows become micro-batches, or what a
LoRA layer is.
"""
