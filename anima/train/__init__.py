"""Training: faults, run_folder, schedule, passes, budget, optimizer_state, optimizer, gradients, engine, briefing,
metrics, health, meter, step, stop, watchdog, checkpoint, evaluate, method, run, saving, discarded, resume, opening,
rehearsal, trainer, results, measuring, fitting, reference_pass, start_check, preference_watch, preference, choice.

Each file imports only earlier ones. The files up to results do not know which objective runs, how rows become
micro-batches, or what a LoRA layer is.
"""
