"""From a file to a tensor: images, tables, readers, views. Knows no network."""
