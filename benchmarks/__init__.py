"""Measurements: one file per benchmark, each run with `python -m pmclip_deploy.benchmarks.NAME`, results as CSV."""
