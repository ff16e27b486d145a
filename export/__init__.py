"""From a checkpoint to a bundle: trace, quantise, check, pack."""
