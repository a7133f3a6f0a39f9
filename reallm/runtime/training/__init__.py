"""What fine-tuning trains in a packed module."""
