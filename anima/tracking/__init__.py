"""Who is told how a run goes: terminal, sample, secrets, line_file, metrics_file, wandb_check, wandb_tracker, tracker,
progress, bar, summary (each imports only earlier ones).

Values arrive as plain floats and texts: nothing here knows torch, ranks beyond "is this the main one", or objectives.
"""
