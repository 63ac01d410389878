"""Plain, single-device building blocks of models."""
