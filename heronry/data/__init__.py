"""What is learned from: texts and pictures from their sources to batches."""
