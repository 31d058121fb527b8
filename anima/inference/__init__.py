"""Using a model: fixed_loop, generate, adapter_folder, stops, answering, chat, dialogue, talk, merged_folder, merging
(each file imports only earlier ones). Same templates as in training.
"""
