// A receiver with Spring Boot; Receiver.java beside it verifies the signature.
import org.springframework.beans.factory.annotation.Value;
import org.springframework.http.ResponseEntity;
import org.springframework.web.bind.annotation.PostMapping;
import org.springframework.web.bind.annotation.RequestBody;
import org.springframework.web.bind.annotation.RequestHeader;
import org.springframework.web.bind.annotation.RestController;

@RestController
public class FilesController {
    @Value("${webhook.secret}")
    private String secret;

    // The body as bytes: a parsed and printed body has another signature.
    @PostMapping("/hooks/files")
    public ResponseEntity<Void> receive(
            @RequestHeader("webhook-id") String id,
            @RequestHeader("webhook-timestamp") String timestamp,
            @RequestHeader("webhook-signature") String signatures,
            @RequestBody byte[] body) throws Exception {
        if (!Receiver.verified(secret, id, timestamp, signatures, body)) {
            return ResponseEntity.status(401).build();
        }
        // Parse it, and ignore a revision that is not newer than the one you have of (batch_id, api_code).
        return ResponseEntity.noContent().build();
    }
}
