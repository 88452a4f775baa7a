"""What a user can mend."""


class UserError(ValueError):
    """Something the user can mend: one clear sentence that says what to do. Commands print it and exit with 2."""


def require(holds: bool, sentence: str) -> None:
    """Fails: UserError with this sentence unless ``holds``."""
    if not holds:
        raise UserError(sentence)
