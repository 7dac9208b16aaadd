"""What every command shares with the terminal: arguments that are checked first, progress, tables that fit."""

from console import plain

# Before anything here, or of what imports it, needs rich; in processes that are started later, too.
plain.stand_in()
