"""``make chaos``: a cluster under random faults, and then every row counted. See ``__main__.py``."""
