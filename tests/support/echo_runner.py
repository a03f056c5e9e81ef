"""A system under comparison that loads nothing: output token i of a request is its prompt's sum plus adapter plus i."""

import time

from benchmarks.peers.session import Outcome, Request, Work, main


class EchoRunner:
    """Serves at once."""

    def __init__(self, work: Work) -> None:
        self._vocab_size = work.vocab_size

    def run(self, requests: list[Request], num_output_tokens: int) -> Outcome:
        token_ids = [
            [
                (sum(request.prompt) + (request.adapter or 0) + index) % self._vocab_size
                for index in range(num_output_tokens)
            ]
            for request in requests
        ]
        now_s = time.perf_counter()
        return Outcome(token_ids, [now_s] * len(requests), [now_s] * len(requests))

    def versions(self) -> dict[str, str]:
        return {"echo": "1"}


if __name__ == "__main__":
    main(EchoRunner)
