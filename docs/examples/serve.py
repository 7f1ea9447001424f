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

from dist_ft.core.errors import DistFtError
from dist_ft.inference.predict import Predictor


@serve.deployment(num_replicas=1, max_ongoing_requests=64)
class Model:
    """A replica: the model, loaded once."""

    def __init__(self, path: str) -> None:
        """Load the exported folder at `path`."""
        self.predictor = Predictor(path)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def answer(self, requests: list[list[dict[str, Any]]]) -> list[Any]:
        """Return the predictions for each request, or the error of a bad one."""
        rows = [row for request in requests for row in request]
        try:
            predictions = iter(self.predictor.predict(rows))
            return [[next(predictions) for _ in request] for request in requests]
        except DistFtError:
            return [self._predict_alone(request) for request in requests]

    def _predict_alone(self, rows: list[dict[str, Any]]) -> Any:
        try:
            return self.predictor.predict(rows)
        except DistFtError as error:
            return error

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer a JSON list of rows."""
        try:
            rows = await request.json()
        except ValueError:
            rows = None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return JSONResponse(
                {"error": 'the body must be a JSON list of rows, such as [{"text": "..."}]'}, 400
            )
        answers = await self.answer(rows)
        return (
            JSONResponse({"error": str(answers)}, 400)
            if isinstance(answers, DistFtError)
            else JSONResponse(answers)
        )


app = Model.bind(os.environ.get("MODEL", "out/"))  # type: ignore[attr-defined]
