"""`crepa doctor`: whether training would start here, and what to do where it would not."""
