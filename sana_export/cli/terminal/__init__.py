"""The terminal: the console on stderr, answers on stdout, interrupts and failures."""
