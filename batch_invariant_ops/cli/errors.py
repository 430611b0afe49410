"""What a user can put right: one line, no traceback."""


class BadInput(Exception):
    """Its text names the setting, its value, and what would be valid."""
