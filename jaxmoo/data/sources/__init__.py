"""Where records come from: the built-in corpus, files, hub data sets, or one's own `Source`."""
