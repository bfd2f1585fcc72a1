"""From checkpoints to models that others load."""
