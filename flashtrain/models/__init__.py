"""Whole models: plain modules that know nothing of parallelism."""
