"""Ask radiology images questions offline: load, Predictor, Answer and the errors."""
