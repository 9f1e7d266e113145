"""Downloads to the layouts that readers want: the subcommands of make_dataset.py."""
