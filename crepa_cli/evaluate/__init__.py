"""`crepa eval`: videos of the base model and of trained weights side by side, with their measures."""
