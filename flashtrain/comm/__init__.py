"""Communication as data: schedules, the transports that run them, and the products they hide behind."""
