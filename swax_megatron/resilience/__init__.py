"""How a run survives: stopping in time, events, watchdog, spike guard, goodput, and the faults that test them."""

STOP_FILE = "STOP"  # in a run directory: stop, save, and do not start again while it is there
