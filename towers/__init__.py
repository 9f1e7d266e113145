"""Networks for one side of a pair, and weights of others. Know no objective."""
