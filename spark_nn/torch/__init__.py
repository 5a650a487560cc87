"""PyTorch: its estimator and model, and what the workers do with it."""
