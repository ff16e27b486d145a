"""The bundle: what its manifest holds, how its folder is read, verified, written and signed."""
