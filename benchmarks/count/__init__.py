"""What counts without timing: traffic, machine code, host time, coverage."""
