"""What executes at predict time."""
