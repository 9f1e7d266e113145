"""What each command takes on its command line. Loads no PyTorch: --help and a typo are answered at once."""
