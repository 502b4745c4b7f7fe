"""Training: texts to token files, token files to rows, rows to a model."""
