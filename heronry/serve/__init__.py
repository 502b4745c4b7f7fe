"""A server for RWKV: OpenAI's API and those of others, continuous batching, states that are kept."""
