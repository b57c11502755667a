"""Studies: many training runs that differ in one thing, compared with intervals."""
