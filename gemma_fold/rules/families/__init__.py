"""The rows of the table, by maker."""
