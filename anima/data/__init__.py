"""From raw rows to the micro-batches of one optimizer step; knows no model and no process group.

The files in the order of the line, each importing only those before it: tokenizer, records, formats, text_files,
json_rows, table_rows, hub, sources, segments, text_templates, jinja_templates, pair_formats, model_template, templates,
encode, limits, order, batching, dataset, pairs, kinds, cache, report, prepare, loader.
"""
