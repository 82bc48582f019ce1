// A receiver with Node's own modules. WEBHOOK_SECRET=whsec_… node receiver.mjs
import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer } from "node:http";

const key = Buffer.from(process.env.WEBHOOK_SECRET.replace(/^whsec_/, ""), "base64");
const seen = new Map(); // keep it in your database: the newest revision of each batch

function verified(headers, body) {
  const id = headers["webhook-id"], timestamp = headers["webhook-timestamp"] ?? "";
  if (!(Math.abs(Date.now() / 1000 - Number(timestamp)) < 300)) return false;
  const wanted = createHmac("sha256", key).update(`${id}.${timestamp}.`).update(body).digest();
  return (headers["webhook-signature"] ?? "").split(" ").some((each) => {
    const given = Buffer.from(each.replace(/^v1,/, ""), "base64");
    return each.startsWith("v1,") && given.length === wanted.length && timingSafeEqual(given, wanted);
  });
}

createServer((request, response) => {
  const parts = [];
  request.on("data", (part) => parts.push(part));
  request.on("end", () => {
    const body = Buffer.concat(parts); // verify the bytes as they came
    if (request.method !== "POST" || !verified(request.headers, body)) return response.writeHead(401).end();
    const { type, data } = JSON.parse(body);
    if (!type.startsWith("batch.")) console.log(type);
    else if (data.revision > (seen.get(`${data.batch_id}/${data.api_code}`) ?? 0)) { // deliveries may repeat
      seen.set(`${data.batch_id}/${data.api_code}`, data.revision);
      console.log(type, data.batch_id, data.missing_total, "missing");
    }
    response.writeHead(204).end();
  });
}).listen(Number(process.env.PORT ?? 9000), "127.0.0.1");
