"""Settings: declared once, read from YAML and the command line, checked, documented."""
