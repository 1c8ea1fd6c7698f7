"""Matrix multiplication with its epilogue inside: `activation(a @ b + bias) + residual`."""
