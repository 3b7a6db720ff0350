"""What a model costs, found without hardware and without memory."""
