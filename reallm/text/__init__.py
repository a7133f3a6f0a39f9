"""Text to calibrate, train and evaluate on, cut into windows of tokens."""
