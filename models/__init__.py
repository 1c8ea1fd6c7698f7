"""crosstile."""
