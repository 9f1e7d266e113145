"""How a command runs: its flags, its checkpoints, its log."""
