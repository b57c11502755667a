"""Files that are written whole, read with their digests, and named as people type them."""
