"""A trained model for other libraries: averages of checkpoints, the formats, the model card; the parts of export.py."""
