"""From results to what the documents show: pandas makes the tables, matplotlib the pictures."""
