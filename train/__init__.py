"""Training: weights from data. torch lives here, never in the runtime."""
