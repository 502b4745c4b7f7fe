"""Text to token ids and back, messages to prompts: nothing here knows a model."""
