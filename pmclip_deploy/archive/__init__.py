"""A whole archive of images to Parquet files: what a model sees or answers of each, an error being a row like any other."""
