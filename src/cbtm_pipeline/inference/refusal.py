"""Why a request gets no answer, as OpenAI's clients read it."""

from typing import Any

TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # further ones by class, in `kind`


class Refused(Exception):
    """A request that gets no answer. `param` is the field at fault, `retry_after_s` when to ask again."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to the refusal."""
        found = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def content(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients expect."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
