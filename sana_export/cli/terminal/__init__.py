"""What the command line shares: the console, standard output, interrupts and failures."""
