"""Base models and teachers on the Hub: asking it, downloading what is needed, reading configurations."""
