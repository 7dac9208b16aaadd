"""What every command shares with the terminal: arguments that are checked first, progress, tables that fit."""
