"""Training: run_folder, schedule, optimizer, engine, metrics, step, checkpoint, evaluate, method, trainer, results,
announcement, reference_pass, start_check, preference_watch, preference, choice.

Each file imports only earlier ones. The files up to announcement do not know which objective runs, how rows become
micro-batches, or what a LoRA layer is.
"""
