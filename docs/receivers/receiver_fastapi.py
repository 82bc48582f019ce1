"""A receiver with FastAPI: pip install fastapi uvicorn standardwebhooks; WEBHOOK_SECRET=whsec_… python it"""

import os

import uvicorn
from fastapi import FastAPI, Request, Response
from standardwebhooks import Webhook, WebhookVerificationError

webhook = Webhook(os.environ["WEBHOOK_SECRET"])
seen: dict[str, int] = {}  # keep it in your database: the newest revision of each batch
app = FastAPI()


@app.post("/hooks/files")
async def receive(request: Request) -> Response:
    body = await request.body()
    try:
        # Verify the bytes as they came, before anything parses them.
        event = webhook.verify(body, dict(request.headers))
    except WebhookVerificationError:
        return Response(status_code=401)
    data = event["data"]
    if event["type"].startswith("batch."):
        key = f"{data['batch_id']}/{data['api_code']}"
        if data["revision"] > seen.get(key, 0):  # deliveries may repeat
            seen[key] = data["revision"]
            print(event["type"], data["batch_id"], data["missing_total"], "missing", flush=True)
    else:
        print(event["type"], flush=True)
    return Response(status_code=204)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "9000")), log_level="warning")
