"""The state that batch norm keeps between calls."""
