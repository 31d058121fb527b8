"""Training: faults, run_folder, schedule, optimizer_state, optimizer, engine, briefing, metrics, health, meter, step,
stop, watchdog, checkpoint, evaluate, run, saving, resume, opening, rehearsal, trainer, results.

Each file imports only earlier ones. Does not know which objective runs, how rows become micro-batches, or what a
LoRA layer is.
"""
