"""From raw rows to the micro-batches of one optimizer step; knows no model and no process group.

The files in the order of the line, each importing only those before it: tokenizer, records, dialogues, tool_messages,
formats, text_files, json_rows, table_rows, hub, file_hash, sources, segments, text_templates, jinja_templates,
pair_formats, rendering, model_template, templates, encode, shared_prompts, limits, order, batching, dataset, pairs,
kinds, cache, report, mixture, row_work, row_batches, workers, prepare, loader.
"""
