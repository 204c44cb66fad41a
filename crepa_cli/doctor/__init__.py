"""`crepa doctor`: whether training would start here, and what to do if it would not."""
