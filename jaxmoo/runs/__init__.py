"""What a run leaves in its directory, and what can be told from it."""
