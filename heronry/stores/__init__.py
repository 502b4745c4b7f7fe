"""Stores of named bytes: in a folder, in Redis, in RAM."""
