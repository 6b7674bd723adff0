"""The types and the mathematics of batch norm, over any Array API namespace."""
