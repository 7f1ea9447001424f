"""Serve an exported model over HTTP with Ray Serve: rows in, one prediction for each out.

    pip install 'dist-ft[serve]'
    MODEL=out/ serve run docs.examples.serve:app
    curl localhost:8000 -d '[{"text": "a fine film"}]' -H 'content-type: application/json'

Rows have the columns of `dist-ft predict`. Requests that arrive together share a batch. A bad row
gets status 400, for its own request only.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from dist_ft.inference.predict import Predictor
from dist_ft.inference.request_batch import RequestError, answer_requests, parse_rows


@serve.deployment(num_replicas=1, max_ongoing_requests=64)
class Model:
    """A replica: the model, loaded once."""

    def __init__(self, path: str) -> None:
        """Load the exported folder at `path`."""
        self.predictor = Predictor(path)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def answer(self, requests: list[list[dict[str, Any]]]) -> list[Any]:
        """Return the predictions for each request, or the error that it alone failed with."""
        return answer_requests(self.predictor.predict, requests)

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer a JSON list of rows."""
        try:
            rows = parse_rows(await request.body())
        except RequestError as error:
            return JSONResponse({"error": str(error)}, 400)

        answer = await self.answer(rows)
        if isinstance(answer, RequestError):
            return JSONResponse({"error": str(answer)}, 400)
        if isinstance(answer, Exception):  # no row explains it: status 500, and a trace in the log
            raise answer
        return JSONResponse(answer)


app = Model.bind(os.environ.get("MODEL", "out/"))  # type: ignore[attr-defined]
