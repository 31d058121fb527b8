"""Data looked at before a GPU minute is spent: findings, oddities, near_duplicates, preferences, check, stats, samples,
terminal, pages.

Each file imports only earlier ones. Everything goes through the data stage, so what is shown is what training sees.
"""
