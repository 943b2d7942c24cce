"""Tables of runs to fitted laws. Pure."""
