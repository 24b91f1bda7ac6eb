"""What is wrong with data, all of it at once."""

from collections.abc import Sequence

_SHOWN = 20


class DataError(ValueError):
    """Records that can't be used; ``problems`` lists every one, the message the first 20."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        more = [f"… and {len(problems) - _SHOWN} more problems"] if len(problems) > _SHOWN else []
        super().__init__("\n".join([*self.problems[:_SHOWN], *more]))
