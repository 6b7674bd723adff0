"""Names, conventions and files of checkpoints."""
