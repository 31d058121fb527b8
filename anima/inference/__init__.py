"""Using a model: generate, adapter_folder, chat (each file imports only earlier ones). Same templates as training."""
