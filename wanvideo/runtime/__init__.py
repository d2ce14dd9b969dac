"""Where weights lie, how blocks are compiled, how calls are timed."""
