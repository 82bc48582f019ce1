// A receiver on the JDK alone. WEBHOOK_SECRET=whsec_… java Receiver.java
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.security.MessageDigest;
import java.util.Base64;
import javax.crypto.Mac;
import javax.crypto.spec.SecretKeySpec;

public class Receiver {
    static boolean verified(String secret, String id, String timestamp, String signatures, byte[] body) throws Exception {
        if (id == null || timestamp == null || signatures == null) return false;
        if (Math.abs(System.currentTimeMillis() / 1000 - Long.parseLong(timestamp)) > 300) return false;
        Mac mac = Mac.getInstance("HmacSHA256");
        mac.init(new SecretKeySpec(Base64.getDecoder().decode(secret.substring("whsec_".length())), "HmacSHA256"));
        mac.update((id + "." + timestamp + ".").getBytes());
        byte[] wanted = ("v1," + Base64.getEncoder().encodeToString(mac.doFinal(body))).getBytes();
        for (String each : signatures.split(" "))
            if (MessageDigest.isEqual(each.getBytes(), wanted)) return true;
        return false;
    }

    public static void main(String[] arguments) throws Exception {
        String secret = System.getenv("WEBHOOK_SECRET");
        int port = Integer.parseInt(System.getenv().getOrDefault("PORT", "9000"));
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", port), 0);
        server.createContext("/", exchange -> {
            byte[] body = exchange.getRequestBody().readAllBytes(); // verify the bytes as they came
            var headers = exchange.getRequestHeaders();
            int status = 401;
            try {
                if (verified(secret, headers.getFirst("webhook-id"), headers.getFirst("webhook-timestamp"), headers.getFirst("webhook-signature"), body)) status = 204;
            } catch (Exception malformed) { /* stays 401 */ }
            if (status == 204) System.out.println(new String(body)); // parse it with your JSON library
            exchange.sendResponseHeaders(status, -1);
            exchange.close();
        });
        server.start();
    }
}
