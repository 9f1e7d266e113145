"""From a frozen tower to figures with intervals."""
