"""The options of a run and what fills them: checks, policy, preference, benchmarks, schema, spelling, paths,
flags, cli, deepspeed_json.

Each file imports only earlier ones. Needs nothing heavy: a mistake is told before torch is imported.
"""
