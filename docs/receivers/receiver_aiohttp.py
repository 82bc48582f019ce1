"""A receiver with aiohttp. pip install aiohttp standardwebhooks; WEBHOOK_SECRET=whsec_… python receiver_aiohttp.py"""

import os

from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

webhook = Webhook(os.environ["WEBHOOK_SECRET"])
seen: dict[str, int] = {}  # keep it in your database: the newest revision of each batch


async def receive(request: web.Request) -> web.Response:
    body = await request.read()
    try:
        # Verify the bytes as they came, before anything parses them.
        event = webhook.verify(body, dict(request.headers))
    except WebhookVerificationError:
        return web.Response(status=401)
    data = event["data"]
    if event["type"].startswith("batch."):
        key = f"{data['batch_id']}/{data['api_code']}"
        if data["revision"] > seen.get(key, 0):  # deliveries may repeat
            seen[key] = data["revision"]
            print(event["type"], data["batch_id"], data["missing_total"], "missing", flush=True)
    else:
        print(event["type"], flush=True)
    return web.Response(status=204)


app = web.Application()
app.router.add_post("/hooks/files", receive)
if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(os.environ.get("PORT", "9000")), print=None)
