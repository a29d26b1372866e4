"""Refuses a setting whose value is out of range."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise ValueError with the key, its value and the remedy unless the condition holds."""
    if not condition:
        raise ValueError(f"{key} is {value}; {remedy}")
