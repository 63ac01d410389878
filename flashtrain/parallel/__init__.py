"""Parallelism applied to plain modules from outside."""
