"""Products and sums as each platform does them best."""
