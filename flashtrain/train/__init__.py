"""Loop, step and side effects of training, each apart from the others."""
