"""Which model answers better, and how sure that is: verdict_text, lines, elo, bradley_terry, matches, biases,
separation, ratings, questions, contestants, answers, answerers, prompts, schedule, adaptive, reply, judge, progress,
translate, verdicts, cost, tournament, table, charts, page, options, mmlu, scoring, benchmarks, harness, measurements,
numbers (each imports only earlier ones).

The arena: questions to answers, answers to verdicts, verdicts to ratings, ratings to a report. All state is files of
JSON lines in one folder. From mmlu on: numbers about one model after the other.
"""
