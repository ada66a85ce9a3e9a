"""Other software that decodes the same model: a client here, workers that run in an environment of their own."""
