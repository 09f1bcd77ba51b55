"""Where bytes live: host memory, disk. A tier keeps records at places; what is worth keeping is decided elsewhere."""
