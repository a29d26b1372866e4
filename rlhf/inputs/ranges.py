"""A value of a setting is in its range, or refused with the value and the remedy."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raises ValueError with the key, its value and the remedy unless the condition holds."""
    if not condition:
        raise ValueError(f"{key} is {value}; {remedy}")
