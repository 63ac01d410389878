"""Training methods: one file a paper."""
