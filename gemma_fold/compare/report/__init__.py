"""What is concluded, and what people and programs get to see of it."""
