<?php
// A receiver in plain PHP. WEBHOOK_SECRET=whsec_… php -S 127.0.0.1:9000 receiver.php
$body = file_get_contents('php://input'); // verify the bytes as they came
$id = $_SERVER['HTTP_WEBHOOK_ID'] ?? '';
$timestamp = $_SERVER['HTTP_WEBHOOK_TIMESTAMP'] ?? '';
$signatures = explode(' ', $_SERVER['HTTP_WEBHOOK_SIGNATURE'] ?? '');

$key = base64_decode(substr(getenv('WEBHOOK_SECRET'), strlen('whsec_')));
$wanted = 'v1,' . base64_encode(hash_hmac('sha256', "$id.$timestamp.$body", $key, true));
$verified = false;
foreach ($signatures as $each) {
    $verified = hash_equals($wanted, $each) || $verified;
}
if (!$verified || abs(time() - (int) $timestamp) > 300) {
    http_response_code(401);
    exit;
}

$event = json_decode($body, true);
$data = $event['data'];
if (str_starts_with($event['type'], 'batch.')) {
    // Deliveries may repeat: ignore a revision that is not newer than the one you have of this batch.
    error_log("{$event['type']} {$data['batch_id']} {$data['missing_total']} missing");
}
http_response_code(204);
