"""Programs that run the same model: a client here, a worker for each, most in an environment of their own."""
