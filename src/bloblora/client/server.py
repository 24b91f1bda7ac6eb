"""One OpenAI-compatible server of text completions."""

import time
from typing import Any

try:
    import httpx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("bloblora.client needs httpx: pip install 'bloblora[client]'") from error

_BUSY = (429, 503)
_LONGEST_WAIT = 60.0


class ServerError(RuntimeError):
    """A server gave no usable answer; the message says which one, to what, and what would be right."""


class CompletionServer:
    """A server's ``/completions``; threads may share it.

    Args:
        base_url: up to and with ``/v1``.
        api_key: sent as ``Authorization: Bearer KEY``.
        timeout: seconds until an answer must be complete.
        retries: how often a request is sent again after 429 or 503, when ``Retry-After`` says or after 1, 2, 4 … s.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float = 120.0, retries: int = 5) -> None:
        self.base_url, self.timeout, self.retries = base_url.rstrip("/"), timeout, retries
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None)  # how many at once is the client's to say
        self._client = httpx.Client(base_url=self.base_url, headers=headers, timeout=timeout, limits=limits)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def complete(self, model: str, prompt: list[int], **options: Any) -> tuple[str, dict[str, Any]]:
        """One completion's text and log-probabilities.

        Args:
            model: name of the adapter.
            prompt: token ids.
            options: of the request; ``logprobs`` among them.

        Returns:
            The text; and ``token_logprobs``, nats, with ``echo`` those of the prompt before the new ones, and
            ``top_logprobs``.

        Raises:
            ServerError: no connection, no answer in time, an error, or an answer without log-probabilities.
        """
        response = self._post({"model": model, "prompt": prompt, **options})
        try:
            (choice,) = response.json()["choices"]
            text, logprobs = choice["text"], choice.get("logprobs")
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{self.base_url}, model {model!r}: not a completion: {response.text[:200]}") from error
        if logprobs and "content" in logprobs:
            logprobs = _flat(logprobs["content"])
        if not (logprobs and logprobs.get("token_logprobs")):
            raise ServerError(
                f"{self.base_url}, model {model!r}: the answer has no log-probabilities although 'logprobs' was asked "
                "for; use a server that gives them with /v1/completions, such as vLLM"
            )
        return text, logprobs

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        what = f"{self.base_url}, model {body['model']!r}"
        for attempt in range(self.retries + 1):
            try:
                response = self._client.post("/completions", json=body)
            except httpx.TimeoutException as error:
                raise ServerError(f"{what}: no answer in {self.timeout:g} s; give a longer timeout") from error
            except httpx.HTTPError as error:
                raise ServerError(f"{what}: {error}; is the server up, and does base_url end in /v1?") from error
            if response.status_code not in _BUSY or attempt == self.retries:
                break
            time.sleep(_wait(response, attempt))
        if response.is_success:
            return response
        reason = f"{what}: status {response.status_code}: {response.text[:500]}"
        if response.status_code == 404:
            reason += "; serve each draw by its name in manifest.json, whose 'commands' say how"
        if response.status_code in _BUSY:
            reason += f"; still so after {self.retries} retries: lower concurrency"
        raise ServerError(reason)


def _flat(content: list[dict[str, Any]]) -> dict[str, Any]:
    """Log-probabilities in the form of chats, which llama.cpp gives here too, in the form of completions."""
    tops = [{f"token_id:{top['id']}": top["logprob"] for top in token["top_logprobs"]} for token in content]
    return {"token_logprobs": [token["logprob"] for token in content], "top_logprobs": tops}


def _wait(response: httpx.Response, attempt: int) -> float:
    """Seconds until the next try."""
    try:
        asked = float(response.headers["Retry-After"])
    except (KeyError, ValueError):  # it may be a date
        asked = 2.0**attempt
    return min(max(asked, 0.0), _LONGEST_WAIT)
