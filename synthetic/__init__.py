"""The SYNTHETIC radiology world of the demo: `synthetic.world.make_demo` draws it, `make_dataset.py demo` too."""
