"""Files, datasets and arrays to pictures, and pictures to the towers' inputs."""
